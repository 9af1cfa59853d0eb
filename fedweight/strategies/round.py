"""One round: what a method sees of it, and what is recorded of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ..parameters import FlatModel
from ..updates import Updates
from .weights import size_weights

Status = Literal["ok", "rejected", "failed", "missing", "dropped", "evaluated"]


@dataclass(frozen=True)
class Round:
    """What a method sees of one round: K clients whose updates arrived.

    Attributes
    ----------
    number : int
        The round, from 1.
    clients : tuple[int, ...]
        The clients' numbers, ascending; everything ``[K]`` stands in this order.
    model : FlatModel
        The global model that the clients started from.
    updates : Updates
        Their local updates, ``[K, P]``.
    num_examples : Tensor
        ``[K]``, float64.
    metrics : tuple[Mapping[str, Any], ...]
        What each client's reply reported.
    profiles : tuple[Mapping[str, Any], ...]
        The side data that the strategy asked for; empty mappings where it did not.
    """

    number: int
    clients: tuple[int, ...]
    model: FlatModel
    updates: Updates
    num_examples: Tensor
    metrics: tuple[Mapping[str, Any], ...]
    profiles: tuple[Mapping[str, Any], ...]
    logged: dict[str, float] = field(default_factory=dict)
    logged_clients: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_clients(self) -> int:
        """K."""
        return len(self.clients)

    @cached_property
    def size_weights(self) -> Tensor:
        """``[K]``; each client's share of the cohort's examples (FedAvg's weights)."""
        return size_weights(self.num_examples)

    def metric(self, name: str) -> Tensor:
        """Return one reported scalar of every client, ``[K]``, float64."""
        return torch.tensor([float(m[name]) for m in self.metrics], dtype=torch.float64)

    def profile(self, name: str) -> Tensor:
        """Return one vector of side data of every client, ``[K, n]``, float64."""
        return torch.tensor([p[name] for p in self.profiles], dtype=torch.float64)

    def log(self, name: str, value: float | Tensor) -> None:
        """Put a number, or a number for each client ``[K]``, in the round's record.

        The name ``weight`` is special: it is the clients' weights in the weight log.
        """
        if isinstance(value, Tensor) and value.ndim == 1:
            self.logged_clients[name] = value.detach().double()
        else:
            self.logged[name] = float(value)


@dataclass
class ClientRecord:
    """What is recorded of one client in one round.

    ``status`` is ``ok`` (aggregated), ``rejected`` (its reply was unfit),
    ``failed`` (it answered with an error), ``missing`` (it did not answer),
    ``dropped`` (the method leaves it out) or ``evaluated`` (it only evaluated).
    ``name`` is what the client is called; empty where that is its number.
    """

    client: int
    status: Status
    reason: str = ""
    weight: float = math.nan
    metrics: dict[str, float] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    name: str = ""


@dataclass
class RoundRecord:
    """What is recorded of one round.

    ``status`` is ``ok``, or ``failed`` where the global model was kept because of
    ``reason``.
    """

    number: int
    status: Literal["ok", "failed"] = "ok"
    reason: str = ""
    clients: list[ClientRecord] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    def count(self, status: Status) -> int:
        """Return how many clients have a status."""
        return sum(record.status == status for record in self.clients)
