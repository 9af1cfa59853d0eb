"""The server between the messages and a method: which replies are used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.lazy import lazy_exports

if TYPE_CHECKING:
    from .loop import ServerState, federate
    from .phase import Given, Population, Question
    from .schedules import Buffered, Deadline

__all__ = [
    "Buffered",
    "Deadline",
    "Given",
    "Population",
    "Question",
    "ServerState",
    "federate",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Buffered": ".schedules",
        "Deadline": ".schedules",
        "Given": ".phase",
        "Population": ".phase",
        "Question": ".phase",
        "ServerState": ".loop",
        "federate": ".loop",
    },
)
