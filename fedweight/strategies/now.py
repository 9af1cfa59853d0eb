"""What changes while a strategy runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ..core.layout import FlatModel, Integers
from ..core.records import ClientRecord, RoundRecord, Status
from ..core.texts import own_name
from ..messages.dispatch import Cohort
from ..server.known_errors import KnownErrors
from ..server.reported import OwnMetrics
from ..server.schedules import Clock
from ..server.timetable import Arrival


class Asked(NamedTuple):
    """A client that was asked.

    Attributes
    ----------
    client : int
        Its number.
    straggler : bool
        Whether it has time for only a part of its epochs.
    asks : tuple[str, ...]
        What it was asked for.
    which : int
        Which global model it trains, where the method keeps several.
    arrival : Arrival, optional
        What the schedule says of its update.
    bytes_told : int
        What it is told that others are not, or are told otherwise.
    """

    client: int
    straggler: bool
    asks: tuple[str, ...]
    which: int = 0
    arrival: Arrival | None = None
    bytes_told: int = 0


class GlobalModel(NamedTuple):
    """One of several global models, as it is carried from round to round.

    Attributes
    ----------
    parameters, buffers : Tensor
        ``[P]`` and ``[B]``.
    integers : dict[str, ndarray]
        Integer tensors by name.
    examples : float
        How many examples the clients had that trained it last.
    """

    parameters: Tensor
    buffers: Tensor
    integers: Integers
    examples: float


@dataclass
class Now:
    """What changes while a strategy runs.

    Attributes
    ----------
    method : Any
        What the method carries from round to round.
    optimizers : dict[int, Any]
        What the server's optimiser carries, by global model; the only one is 0.
    models : list[GlobalModel]
        The global models, where the method keeps several.
    first : GlobalModel, optional
        The first global model, with which each of them begins.
    prepared : bool
        Whether what comes before the first round is done.
    class_totals : list[int]
        How many examples of each class all clients have, where clients are told.
    pooled : dict[str, list[float]]
        By probe, the sums over clients that these are told.
    history : list[RoundRecord]
        The weight log.
    model : FlatModel, optional
        The global model of the round that goes on.
    asked : dict[int, Asked]
        By node, who was asked and has not answered.
    sent : dict[int, Asked]
        By client, who was asked in the round that goes on, where not all of them began
        with the same model.
    not_asked : dict[int, str]
        The clients that were drawn but not asked, and why.
    without_examples : set[int]
        The clients that said so, or are known to.
    population : int
        How many clients there were when the last ones were drawn, without these.
    cohort : Cohort, optional
        The messages of the phase that goes on.
    bytes_down, bytes_up : int
        What every client is sent in the phase that goes on, and the model that it sends
        back.
    clock : Clock, optional
        The loop's schedule.
    outermost : bool
        Whether no wrapper runs the rounds, which may look into the replies.
    forgets : bool
        Whether the log holds the last round only.
    no_room : bool
        Whether a device had no room to work on the models that clients left there.
    """

    method: Any
    optimizers: dict[int, Any] = field(default_factory=dict)
    models: list[GlobalModel] = field(default_factory=list)
    first: GlobalModel | None = None
    prepared: bool = False
    class_totals: list[int] = field(default_factory=list)
    pooled: dict[str, list[float]] = field(default_factory=dict)
    history: list[RoundRecord] = field(default_factory=list)
    model: FlatModel | None = None
    asked: dict[int, Asked] = field(default_factory=dict)
    sent: dict[int, Asked] = field(default_factory=dict)
    not_asked: dict[int, str] = field(default_factory=dict)
    without_examples: set[int] = field(default_factory=set)
    population: int = 0
    errors: KnownErrors = field(default_factory=KnownErrors)
    own_metrics: OwnMetrics = field(default_factory=OwnMetrics)
    name_of: Callable[[int], str] = str
    cohort: Cohort | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    clock: Clock | None = None
    outermost: bool = False
    forgets: bool = False
    no_room: bool = False

    def unpooled(self, pools: Mapping[str, int] | None, round: int) -> list[str]:
        """Return what clients are asked for in a round, to be added up over them."""
        since = (pools or {}).items()
        return [
            name for name, begin in since if round >= begin and name not in self.pooled
        ]

    @property
    def arrivals(self) -> tuple[Arrival, ...] | None:
        """Whose updates the schedule has aggregated; ``None`` where it leaves it."""
        timetable = self.clock.timetable if self.clock else None
        return None if timetable is None else timetable.arrivals

    def leave_out(self, empty: Set[int]) -> None:
        """Remember that these clients, drawn in this round, have no examples."""
        self.population -= len(empty - self.without_examples)
        self.without_examples |= empty

    def global_model(self, which: int) -> FlatModel:
        """Return one of the global models of the round that goes on."""
        assert self.model is not None
        if not self.models:
            return self.model
        own = self.models[which]
        return FlatModel(
            self.model.layout,
            own.parameters,
            own.buffers,
            own.integers,
            self.model.frozen,
        )

    def start_of(self, sent: Asked) -> FlatModel:
        """Return the model that a client began with."""
        return sent.arrival.start if sent.arrival else self.global_model(sent.which)

    def entry(self, client: int, status: Status, reason: str = "") -> ClientRecord:
        """Return a line of the round's record."""
        if self.name_of is str:
            return ClientRecord(client, status, reason)
        name = own_name(client, self.name_of(client))
        return ClientRecord(client, status, reason, name=name)
