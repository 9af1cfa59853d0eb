"""fedweight: simulate federated clients, and decide how much each one counts."""

__version__ = "0.1.0"
