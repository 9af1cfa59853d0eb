"""Simulations: grids that run a Flower app, and the way to start one."""

from .engine import ENGINES, simulate
from .grid import SimulationGrid
from .local import LocalGrid
from .plan import Plan

__all__ = ["ENGINES", "LocalGrid", "Plan", "SimulationGrid", "simulate"]
