"""The server between the messages and a method: which replies are used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.lazy import lazy_exports

if TYPE_CHECKING:
    from .loop import ServerState, federate
    from .phase import Given, Population, Question
    from .schedules import Buffered, Deadline, Schedule
    from .timetable import Arrival, Moment, Timetable

__all__ = [
    "Arrival",
    "Buffered",
    "Deadline",
    "Given",
    "Moment",
    "Population",
    "Question",
    "Schedule",
    "ServerState",
    "Timetable",
    "federate",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Arrival": ".timetable",
        "Buffered": ".schedules",
        "Deadline": ".schedules",
        "Given": ".phase",
        "Moment": ".timetable",
        "Population": ".phase",
        "Question": ".phase",
        "Schedule": ".schedules",
        "ServerState": ".loop",
        "Timetable": ".timetable",
        "federate": ".loop",
    },
)
