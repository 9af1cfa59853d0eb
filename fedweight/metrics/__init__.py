"""How well clients are served: summaries over clients."""

from .spread import (
    best10,
    client_spread,
    deviation,
    entropy,
    gini,
    jain,
    mean,
    minimum,
    uniform_cosine,
    variance,
    worst10,
)

__all__ = [
    "best10",
    "client_spread",
    "deviation",
    "entropy",
    "gini",
    "jain",
    "mean",
    "minimum",
    "uniform_cosine",
    "variance",
    "worst10",
]
