"""One training step of a stack of SAEs: Adam, the dense and the sparse step, each in plain torch and compiled."""
