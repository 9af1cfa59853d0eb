"""Clients: local training and the ClientApp around it."""

from .app import TrainingApp, client_number
from .objectives import OBJECTIVES, Batch, Objective, objective
from .training import TrainingSettings

__all__ = [
    "OBJECTIVES",
    "Batch",
    "Objective",
    "TrainingApp",
    "TrainingSettings",
    "client_number",
    "objective",
]
