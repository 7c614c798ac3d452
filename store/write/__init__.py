"""Writing a store: shard files, windows, contexts."""
