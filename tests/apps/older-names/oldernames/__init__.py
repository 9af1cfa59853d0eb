"""A small network with Flower's older names."""
