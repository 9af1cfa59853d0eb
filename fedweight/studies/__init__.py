"""Studies: simulation files, runs, and what they write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.lazy import lazy_exports

if TYPE_CHECKING:
    from .check import Checked, check_file
    from .comparing import compare
    from .comparison import Comparison
    from .configuration import Configuration
    from .contributing import contribution, contribution_runs
    from .progress import Progress
    from .result import Run
    from .runner import resume, run

__all__ = [
    "Checked",
    "Comparison",
    "Configuration",
    "Progress",
    "Run",
    "check_file",
    "compare",
    "contribution",
    "contribution_runs",
    "resume",
    "run",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Checked": ".check",
        "Comparison": ".comparison",
        "Configuration": ".configuration",
        "Progress": ".progress",
        "Run": ".result",
        "check_file": ".check",
        "compare": ".comparing",
        "contribution": ".contributing",
        "contribution_runs": ".contributing",
        "resume": ".runner",
        "run": ".runner",
    },
)
