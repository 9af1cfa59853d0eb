"""Trees as bytes, several messages on their way at once."""
