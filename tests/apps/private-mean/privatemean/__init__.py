"""Differential privacy on both sides, and a mod."""
