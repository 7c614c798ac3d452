"""Where the files of a store are: a local folder, an object store, a local cache of it; one mapped shard file."""
