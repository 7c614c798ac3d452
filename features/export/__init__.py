"""SAEs and their features in the layouts of other projects; registry.py lists the formats."""
