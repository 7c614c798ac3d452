"""The report of one or several runs: HTML, PNG, and the L0 ratio at equal score."""
