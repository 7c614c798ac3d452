"""The report of one or several runs: an HTML file, PNG plots, and the L0 ratio at equal score."""
