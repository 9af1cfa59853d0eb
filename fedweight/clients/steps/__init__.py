"""The steps of local training: one client after another, and many at once."""
