"""Clients: local training and the ClientApp around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.lazy import lazy_exports
from .objectives import OBJECTIVES, objective

if TYPE_CHECKING:
    from .app import TrainingApp
    from .objectives import Batch, Objective
    from .probes import ClientRound
    from .queries import Answer, ClientQuery
    from .settings import TrainingSettings
    from .tasks import client_number

__all__ = [
    "OBJECTIVES",
    "Answer",
    "Batch",
    "ClientQuery",
    "ClientRound",
    "Objective",
    "TrainingApp",
    "TrainingSettings",
    "client_number",
    "objective",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Batch": ".objectives",
        "Answer": ".queries",
        "ClientQuery": ".queries",
        "ClientRound": ".probes",
        "Objective": ".objectives",
        "TrainingApp": ".app",
        "TrainingSettings": ".settings",
        "client_number": ".tasks",
    },
)
