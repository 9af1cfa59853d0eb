"""Simulations: grids that run a Flower app, and the way to start one."""

from .grid import SimulationGrid
from .local import LocalGrid
from .simulate import ENGINES, simulate

__all__ = ["ENGINES", "LocalGrid", "SimulationGrid", "simulate"]
