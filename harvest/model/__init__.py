"""The language model: its files, loading it, its sites, and running it up to the last site that is needed."""
