"""SAEs and their features in the layouts of other projects."""
