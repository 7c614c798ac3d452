"""The text: its sources, the token ids of its documents, and the contexts that they are packed into."""
