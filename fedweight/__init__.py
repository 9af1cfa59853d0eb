"""fedweight: simulate federated clients, and decide how much each one counts."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .simulations import simulate
    from .studies import Configuration, Run, run

__version__ = "0.1.0"

__all__ = ["Configuration", "Run", "__version__", "run", "simulate"]

_WHERE = {
    "Configuration": ".studies",
    "Run": ".studies",
    "run": ".studies",
    "simulate": ".simulations",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: an edge device needs little."""
    if name not in _WHERE:
        raise AttributeError(f"module 'fedweight' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name], __name__), name)
