"""Studies: simulation files, runs, and what they write."""

from .configuration import Configuration
from .result import Run
from .runner import Progress, run

__all__ = ["Configuration", "Progress", "Run", "run"]
