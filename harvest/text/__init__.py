"""From text to contexts: documents, their tokens, and the files that these are written to."""
