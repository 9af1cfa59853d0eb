"""fedweight: simulate federated clients, and decide how much each one counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .core.lazy import lazy_exports
from .core.version import __version__

if TYPE_CHECKING:
    from .simulations import simulate
    from .studies import Comparison, Configuration, Run, compare, resume, run

__all__ = [
    "Comparison",
    "Configuration",
    "Run",
    "__version__",
    "compare",
    "resume",
    "run",
    "simulate",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Comparison": ".studies",
        "Configuration": ".studies",
        "Run": ".studies",
        "compare": ".studies",
        "resume": ".studies",
        "run": ".studies",
        "simulate": ".simulations",
    },
)
