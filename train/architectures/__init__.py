"""SAE architectures, one file each: the formulas of the paper. The fast training steps are tested against them."""
