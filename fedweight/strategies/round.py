"""One round: what a method sees of it, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..clients.probes import REPORTED
from ..clients.registries import PROBES
from ..core.errors import AggregationError, ConfigurationError, closest
from ..core.layout import FlatModel
from ..core.texts import clients_called, listed, shown
from ..core.updates import Updates
from ..metrics.measures import MEASURES
from .weights import size_weights

# What every reply reports, and what a strategy may request besides.
REQUESTED = tuple(PROBES.entries)

# Recorded of a client whose update is far longer than others': how many times as long.
TIMES_MEDIAN = "update-times-median"

# Names in the record that are not a method's to log; nor is what begins like these.
TAKEN = frozenset(
    {
        *("round", "client", "name", "status", "reason", "bytes-down", "bytes-up"),
        *("asked", "ok", "rejected", "failed", "missing", "dropped", "evaluated"),
        *("examples", "steps", "held-out-examples", "loss", "accuracy"),
        *MEASURES,
        *("staleness", "round-seconds"),
        *("model", "effective-clients", TIMES_MEDIAN, *REPORTED, *REQUESTED),
    }
)
TAKEN_PREFIXES = ("evaluate-", "test-", "client-accuracy-", "own-")


class OddReplies(AggregationError):
    """Some replies are not as the others are; the round goes on without them.

    Attributes
    ----------
    reasons : dict[int, str]
        By client, why its reply is rejected.
    """

    def __init__(self, message: str, reasons: Mapping[int, str]) -> None:
        super().__init__(message)
        self.reasons = dict(reasons)


class Selection(NamedTuple):
    """Who is about to be asked.

    Attributes
    ----------
    number : int
        The round, from 1.
    clients : tuple[int, ...]
        The clients' numbers, ascending.
    state : Any
        What the method carries.
    population : int
        N: how many clients there are in all, those that were not drawn included.
    """

    number: int
    clients: tuple[int, ...]
    state: Any
    population: int = 0


class Vector(NamedTuple):
    """Several numbers that a strategy tells, the same ones to every client.

    Attributes
    ----------
    values : Sequence[float]
        One or more, finite; also an array or a tensor of one dimension.
    """

    values: Any


class PerParameter(NamedTuple):
    """A value of every trained parameter that a strategy tells, the same to all.

    Attributes
    ----------
    values : Tensor
        ``[P]``: floating, sent in the model's dtype; or bool, a bit each.
    """

    values: Tensor


class Report(NamedTuple):
    """What one client reported: its number, metrics, and the side data asked for."""

    client: int
    metrics: Mapping[str, Any]
    profile: Mapping[str, Any]


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
        The global model that the clients started from; under a schedule that lets some
        start from older ones, the newest.
    updates : Updates
        Their local updates, ``[K, P]``: what training added to the model that each
        began with.
    num_examples : Tensor
        ``[K]``, float64.
    metrics : tuple[Mapping[str, Any], ...]
        What each client's reply reported.
    profiles : tuple[Mapping[str, Any], ...]
        The side data that the strategy asked for; empty mappings where it did not.
    state : Any
        What the method returned as its next state when the last round ended.
    population : int
        N: how many clients there are in all, those that were not drawn or did not
        answer included; not those known to have no examples. At least K.
    discounts : Tensor
        ``[K]``; what a schedule lets updates count that began with older models, times
        what they would otherwise. 1 where there are none.
    since_now : Callable, optional
        What makes the :attr:`differences`, where the schedule says whose updates come.
    """

    number: int
    clients: tuple[int, ...]
    model: FlatModel
    updates: Updates
    num_examples: Tensor
    metrics: tuple[Mapping[str, Any], ...]
    profiles: tuple[Mapping[str, Any], ...]
    state: Any = None
    logged: dict[str, float] = field(default_factory=dict)
    logged_clients: dict[str, Tensor] = field(default_factory=dict)
    population: int = 0
    discounts: Tensor = field(default_factory=lambda: torch.ones(0))
    since_now: Callable[[], Updates] | None = None

    def __post_init__(self) -> None:
        """Count at least those that are there."""
        most = max(self.population, len(self.clients))
        object.__setattr__(self, "population", most)
        if len(self.discounts) != len(self.clients):
            ones = torch.ones(len(self.clients), dtype=torch.float64)
            object.__setattr__(self, "discounts", ones)

    @property
    def in_time(self) -> bool:
        """Whether all updates were made to the global model of now."""
        return self.since_now is None

    @cached_property
    def differences(self) -> Updates:
        """``w_k - w``, row by row, with the global model of now.

        They are the :attr:`updates`, unless a schedule lets clients begin with older
        models.
        """
        return self.updates if self.since_now is None else self.since_now()

    @property
    def num_clients(self) -> int:
        """K."""
        return len(self.clients)

    @cached_property
    def size_weights(self) -> Tensor:
        """``[K]``; each client's share of the cohort's examples (FedAvg's weights)."""
        return size_weights(self.num_examples)

    @cached_property
    def still(self) -> list[slice]:
        """Places of the tensors that no client changed; they keep their bits."""
        changed = self.updates.changed.tolist()
        places = zip(self.updates.offsets, self.updates.offsets[1:], strict=False)
        return [
            slice(*place) for place, c in zip(places, changed, strict=True) if not c
        ]

    def keep_still(self, parameters: Tensor) -> None:
        """Put back, in ``[P]``, the tensors that no client changed."""
        for place in self.still:
            parameters[place] = self.model.parameters[place]

    def metric(self, name: str) -> Tensor:
        """Return one reported scalar of every client, ``[K]``, float64.

        Raises
        ------
        ConfigurationError
            If no client reports it.
        AggregationError
            If some do not. A strategy that has the name in its ``request`` gets only
            clients that do.
        """
        values = [m.get(name) for m in self.metrics]
        without = [
            client
            for client, value in zip(self.clients, values, strict=True)
            if not isinstance(value, int | float)
        ]
        if len(without) == self.num_clients:
            reported = sorted({key for m in self.metrics for key in m})
            near = closest(name, (*reported, *REPORTED, *REQUESTED))
            raise ConfigurationError(
                f"round.metric('{name}'): no client reports it.{near} They report "
                f"{listed(reported, most=20) or 'nothing'}; a strategy's `request` may "
                f"name {', '.join(REQUESTED)}, or what your own ClientApp knows."
            )
        if without:
            raise AggregationError(
                f"round.metric('{name}'): {len(without)} of {self.num_clients} clients "
                f"do not report it, such as client {without[0]}. Name it in the "
                "strategy's `request`: then their replies are rejected."
            )
        return torch.tensor([float(v) for v in values], dtype=torch.float64)  # type: ignore[arg-type]

    def profile(self, name: str) -> Tensor:
        """Return one vector of side data of every client, ``[K, n]``, float64.

        Raises
        ------
        AggregationError
            If some clients do not give one, or one of another length than most. Where
            ``weights`` or ``aggregate`` lets it pass, those are rejected and the round
            is made of the others; it fails where as many give one length as another.
        """
        given = [p.get(name) for p in self.profiles]
        lengths = [len(v) if isinstance(v, list) else -1 for v in given]
        if max(lengths) < 0:
            raise AggregationError(
                f"round.profile('{name}'): no client gives it. Name it in the "
                "strategy's `request`."
            )
        known = [n for n in lengths if n >= 0]
        usual = max(sorted(set(known)), key=known.count)
        odd = [c for c, n in zip(self.clients, lengths, strict=True) if n != usual]
        if odd:
            said = (
                f"round.profile('{name}'): {clients_called(odd)} did not give a list "
                f"of {usual} numbers, as most others did. Name it in the "
                "strategy's `request`, and check it in `admit` or `screen`."
            )
            most = lengths.count(usual)
            if any(lengths.count(n) == most for n in {*lengths} - {usual}):
                raise AggregationError(said)
            why = f"its '{name}' is not a list of {usual} numbers, as most others' are"
            raise OddReplies(said, dict.fromkeys(odd, why))
        return torch.tensor(given, dtype=torch.float64)

    def log(self, name: str, value: float | Tensor) -> None:
        """Put a number, or a number for each client ``[K]``, in the round's record.

        The name ``weight`` is special: it is the clients' weights in the weight log.

        Raises
        ------
        ConfigurationError
            If the record uses the name for something else, or the value is no number
            and not one for each client.
        """
        if not isinstance(name, str):
            raise ConfigurationError(
                f"round.log: the name must be a text, got {shown(name)}."
            )
        if name.replace("_", "-") in TAKEN or name.startswith(TAKEN_PREFIXES):
            raise ConfigurationError(
                f"round.log: the record uses the name '{name}' itself. Choose another."
            )
        if isinstance(value, Tensor) and value.ndim == 1:
            if len(value) != self.num_clients and name != "weight":
                raise ConfigurationError(
                    f"round.log('{name}'): {len(value)} values for {self.num_clients} "
                    "clients. Give one each, or one number."
                )
            self.logged_clients[name] = value.detach().double()
            return
        try:
            self.logged[name] = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ConfigurationError(
                f"round.log('{name}'): the value must be a number, or a tensor of one "
                f"for each of the {self.num_clients} clients, got {shown(value)}."
            ) from error
