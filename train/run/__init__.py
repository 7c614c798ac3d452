"""A training run: its settings, its groups of SAEs, the loop, checkpoints and the folder of the run."""
