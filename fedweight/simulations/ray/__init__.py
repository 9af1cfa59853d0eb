"""Clients in Ray's workers: the only place that imports Ray."""
