"""One file an SAE architecture: the formulas of its paper, which are the oracle of every fast step."""
