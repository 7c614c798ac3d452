"""The feature browser: its static files, the local server, and the blind comparison of two SAEs."""
