"""Studies: simulation files, runs, and what they write."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .check import Checked, check_file
    from .configuration import Configuration
    from .result import Run
    from .runner import Progress, run

__all__ = ["Checked", "Configuration", "Progress", "Run", "check_file", "run"]

_WHERE = {
    "Checked": ".check",
    "Configuration": ".configuration",
    "Progress": ".runner",
    "Run": ".result",
    "check_file": ".check",
    "run": ".runner",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: a look at a file needs little."""
    if name not in _WHERE:
        raise AttributeError(f"module 'fedweight.studies' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name], __name__), name)
