"""What is recorded of a round and of each client in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Status = Literal["ok", "rejected", "failed", "missing", "dropped", "evaluated"]

# No metrics, for everybody who has none; nobody changes it.
NOTHING: Mapping[str, float] = {}


@dataclass
class ClientRecord:
    """What is recorded of one client in one round.

    ``status`` is ``ok`` (aggregated), ``rejected`` (its reply was unfit),
    ``failed`` (it answered with an error), ``missing`` (it did not answer),
    ``dropped`` (it has nothing to count for, or the method leaves it out) or
    ``evaluated`` (it only evaluated). ``name`` is the client's, where it has one
    besides its number; ``own_metrics`` are those that the server does not know.
    Bytes are those of the models in the messages as a codec writes them, down also for
    evaluation, and 8 for each number that a strategy tells besides, or asks for.
    """

    client: int
    status: Status
    reason: str = ""
    weight: float = math.nan
    metrics: dict[str, float] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    name: str = ""
    own_metrics: Mapping[str, float] = field(default_factory=lambda: NOTHING)


class ByGroup(NamedTuple):
    """What clients added up by group: their numbers, and ``metrics.Sums`` of them."""

    clients: list[int]
    sums: Any


@dataclass
class RoundRecord:
    """What is recorded of one round.

    ``status`` is ``ok``, or ``failed`` where the global model was kept because of
    ``reason``. ``by_group`` is there where clients measured by group.
    """

    number: int
    status: Literal["ok", "failed"] = "ok"
    reason: str = ""
    clients: list[ClientRecord] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    by_group: ByGroup | None = None

    def count(self, status: Status) -> int:
        """Return how many clients have a status."""
        return sum(record.status == status for record in self.clients)
