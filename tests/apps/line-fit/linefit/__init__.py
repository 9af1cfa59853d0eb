"""A line fitted by clients with data of their own."""
