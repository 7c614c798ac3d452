"""Where the files of stores are: local folders, object stores and a cache of them; transfer; open shard files."""
