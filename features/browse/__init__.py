"""The feature browser: static files, the local server, the blind comparison."""
