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
    from .trackers import MLflow, TensorBoard, Tracker, WandB

__all__ = [
    "Checked",
    "Comparison",
    "Configuration",
    "MLflow",
    "Progress",
    "Run",
    "TensorBoard",
    "Tracker",
    "WandB",
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
        "MLflow": ".trackers",
        "Progress": ".progress",
        "Run": ".result",
        "TensorBoard": ".trackers",
        "Tracker": ".trackers",
        "WandB": ".trackers",
        "check_file": ".check",
        "compare": ".comparing",
        "contribution": ".contributing",
        "contribution_runs": ".contributing",
        "resume": ".runner",
        "run": ".runner",
    },
)
