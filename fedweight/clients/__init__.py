"""Clients: local training and the ClientApp around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.lazy import lazy_exports
from .objectives import OBJECTIVES, objective

if TYPE_CHECKING:
    from .app import TrainingApp
    from .client_tasks import client_number
    from .objectives import Around, Batch, Facts, Loss, Model, Objective
    from .probes import ClientRound
    from .queries import Answer, ClientQuery
    from .settings import TrainingSettings

__all__ = [
    "OBJECTIVES",
    "Answer",
    "Around",
    "Batch",
    "ClientQuery",
    "ClientRound",
    "Facts",
    "Loss",
    "Model",
    "Objective",
    "TrainingApp",
    "TrainingSettings",
    "client_number",
    "objective",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Around": ".objectives",
        "Batch": ".objectives",
        "Facts": ".objectives",
        "Loss": ".objectives",
        "Model": ".objectives",
        "Answer": ".queries",
        "ClientQuery": ".queries",
        "ClientRound": ".probes",
        "Objective": ".objectives",
        "TrainingApp": ".app",
        "TrainingSettings": ".settings",
        "client_number": ".client_tasks",
    },
)
