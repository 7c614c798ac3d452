"""The language model: its files, loading it, its sites, and running it as far as they need."""
