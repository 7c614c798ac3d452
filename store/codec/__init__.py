"""How rows become compressed chunks and rows again: the planes codec, zstd frames, checksums, compiled loops."""
