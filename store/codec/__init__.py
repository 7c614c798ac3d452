"""Encoding rows as compressed chunks and decoding them: the planes codec, zstd, checksums, compiled loops."""
