"""One training step: the fast one of `gated` and `relu` (dense and sparse), and autograd for other architectures."""
