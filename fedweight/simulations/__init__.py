"""Simulations: grids that run a Flower app, and the way to start one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.lazy import lazy_exports

if TYPE_CHECKING:
    from .engine import Simulated, simulate
    from .grid import SimulationGrid
    from .local import LocalGrid
    from .plan import ENGINES, Plan
    from .workers.grid import ProcessGrid

__all__ = [
    "ENGINES",
    "LocalGrid",
    "Plan",
    "ProcessGrid",
    "Simulated",
    "SimulationGrid",
    "simulate",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "ENGINES": ".plan",
        "LocalGrid": ".local",
        "Plan": ".plan",
        "ProcessGrid": ".workers.grid",
        "Simulated": ".engine",
        "SimulationGrid": ".grid",
        "simulate": ".engine",
    },
)
