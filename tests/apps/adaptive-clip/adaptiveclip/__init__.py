"""A clipping norm that the server finds."""
