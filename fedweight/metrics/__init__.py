"""How well clients are served: summaries over clients."""

from .spread import client_spread

__all__ = ["client_spread"]
