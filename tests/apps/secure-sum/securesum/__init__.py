"""Secure aggregation, and a client that drops out."""
