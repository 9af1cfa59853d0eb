"""Schedules: when the server makes the next model, and of whose updates.

Time is virtual: a client's speed is constant and part of the run's seed, so who arrives
when is known before anybody trains, and is the same on every engine.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from ..core.errors import ConfigurationError
from ..core.options import GIVEN, checked_fields
from ..core.registry import Registry
from ..core.rng import Purpose, generator
from .timetable import (
    Arrival,
    Moment,
    Sizes,
    Timetable,
    checked_answer,
    checked_late,
    checked_seconds,
)

SCHEDULES = Registry(
    "schedule",
    {
        "synchronous": f"{__name__}:Synchronous",
        "deadline": f"{__name__}:Deadline",
        "buffered": f"{__name__}:Buffered",
    },
)


# With a spread of more, a client's seconds are beyond what a float holds.
MOST_SPREAD = 50.0


@dataclass(frozen=True)
class Speeds:
    """How long clients train: by their examples, each at a constant speed of its own.

    Parameters
    ----------
    seed : int
        0 or more.
    spread : float
        0 to 50: the standard deviation of the logarithm of the speed. At 0 all are
        alike; at 0.5 one in six is 1.6 times slower than the median, or more.
    sizes_of : Callable
        Returns how many examples some clients have, or ``None`` where nobody knows:
        then each counts as one.
    """

    seed: int
    spread: float
    sizes_of: Sizes

    def seconds(self, client: int) -> float:
        """Return how long a pass over a client's data takes, in virtual seconds.

        A client of median speed sees a thousand examples in a second.
        """
        sizes = self.sizes_of([client])
        drawn = generator(self.seed, Purpose.SPEED, client=client).standard_normal()
        slower = float(np.exp(self.spread * drawn))
        return 1e-3 * (1 if sizes is None else int(sizes[0])) * slower


class Schedule(ABC):
    """When the server makes the next model, and of whose updates."""

    @property
    def chooses(self) -> bool:
        """Whether it says whose updates are aggregated, and not the strategy."""
        return False

    @property
    def discounts(self) -> bool:
        """Whether updates of older models may count less."""
        return False

    @abstractmethod
    def next(self, moment: Moment, state: Any) -> tuple[Timetable, Any]:
        """Return what is to happen in a round, and the schedule's next state.

        Parameters
        ----------
        moment : Moment
            What the round begins with.
        state : Any
            What was returned last; ``None`` at first.
        """


@dataclass
class Clock:
    """A schedule, and what it carries from round to round.

    Attributes
    ----------
    schedule : Schedule
        The schedule.
    state : Any
        Its state, of the last round or, once it was asked, of this one.
    timetable : Timetable, optional
        What it says of the round that goes on.
    """

    schedule: Schedule
    state: Any = None
    timetable: Timetable | None = None

    def next(self, moment: Moment) -> Timetable:
        """Let the schedule say what happens in a round.

        Raises
        ------
        ConfigurationError
            If what it says cannot be; the message names its class.
        """
        self.timetable, self.state = checked_answer(
            self.name,
            self.schedule.next(moment, self.state),
            moment,
            chooses=self.schedule.chooses,
            discounts=self.schedule.discounts,
        )
        return self.timetable

    @property
    def name(self) -> str:
        """What an error calls the schedule."""
        return type(self.schedule).__name__

    def late(self, passes: Mapping[int, int]) -> dict[int, str]:
        """Return why some of the round's clients come too late."""
        assert self.timetable is not None
        return checked_late(self.name, self.timetable.late(passes), passes)

    def seconds(self, passes: Mapping[int, int]) -> float:
        """Return how long the round takes, in virtual seconds."""
        assert self.timetable is not None
        return checked_seconds(self.name, self.timetable.seconds(passes))


class Synchronous:
    """Every round waits for all clients that were drawn; nothing is timed."""


@checked_fields
@dataclass(frozen=True, kw_only=True)
class Deadline(Schedule):
    """Every round ends after so many seconds; who is not done by then is dropped.

    Parameters
    ----------
    seconds : float
        Above 0; virtual seconds, in which a client of median speed sees a thousand
        examples each.
    speed_spread : float
        0 to 50: the standard deviation of the logarithm of the clients' speeds.
    """

    seconds: Annotated[float, Field(gt=0)] = 1.0
    speed_spread: Annotated[float, Field(ge=0, le=MOST_SPREAD)] = 0.5
    seed: Annotated[int, Field(ge=0), GIVEN] = 0

    def next(self, moment: Moment, state: Any) -> tuple[Timetable, Any]:
        """Let the strategy draw; name who is late."""
        speeds = Speeds(self.seed, self.speed_spread, moment.sizes_of)

        def needed(passes: Mapping[int, int]) -> dict[int, float]:
            return {c: passes[c] * speeds.seconds(c) for c in passes}

        def late(passes: Mapping[int, int]) -> dict[int, str]:
            return {
                client: f"it needs {own:.4g} s, the deadline is {self.seconds:g} s"
                for client, own in needed(passes).items()
                if own > self.seconds
            }

        def seconds(passes: Mapping[int, int]) -> float:
            return min(self.seconds, max(needed(passes).values(), default=0.0))

        return Timetable(None, late, seconds), None


@checked_fields
@dataclass(frozen=True, kw_only=True)
class Buffered(Schedule):
    """A new model as soon as so many updates have arrived; nobody waits for the others.

    John Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation",
    AISTATS 2022. So many clients train at a time. When one is done, another takes its
    place and begins with the newest model; the update waits in the buffer. When the
    buffer is full it is aggregated, which is a round, and emptied. An update whose
    client began ``tau`` rounds ago counts ``s(tau)`` times what the strategy says; a
    round that failed is one of them.

    Parameters
    ----------
    buffer_size : int
        1 or more updates in the buffer; 1 makes a model of every arrival, as FedAsync.
    concurrency : int
        1 or more clients train at a time. Where it is ``buffer_size`` and the number of
        clients, and their speeds do not differ, rounds are synchronous.
    speed_spread : float
        0 to 50: the standard deviation of the logarithm of the clients' speeds.
    discount : {"polynomial", "hinge", "constant"}
        ``s(tau)``: ``(1 + tau)^-exponent``; 1 up to ``threshold`` and ``1 / (exponent
        (tau - threshold) + 1)`` beyond; 1.
    exponent : float
        Above 0; FedBuff's 0.5 by default.
    threshold : float
        0 or more, for ``hinge``.

    Notes
    -----
    Who begins is drawn uniformly of those who do not train, have no update in the
    buffer and have not had the newest model; so a client is in a buffer once at most.
    That is this library's choice: a client that began twice with one model would train
    the same twice. Ties of time are broken by the client's number.
    """

    buffer_size: Annotated[int, Field(ge=1)] = 10
    concurrency: Annotated[int, Field(ge=1)] = 20
    speed_spread: Annotated[float, Field(ge=0, le=MOST_SPREAD)] = 0.5
    discount: Literal["polynomial", "hinge", "constant"] = "polynomial"
    exponent: Annotated[float, Field(gt=0)] = 0.5
    threshold: Annotated[float, Field(ge=0)] = 4.0
    seed: Annotated[int, Field(ge=0), GIVEN] = 0

    @property
    def chooses(self) -> bool:
        """Whether it says whose updates are aggregated: yes."""
        return True

    @property
    def discounts(self) -> bool:
        """Whether updates of older models count less."""
        return self.discount != "constant"

    def staleness_discount(self, staleness: int) -> float:
        """Return ``s(tau)``, in (0, 1].

        Examples
        --------
        >>> Buffered(exponent=0.5).staleness_discount(3)
        0.5
        """
        if self.discount == "polynomial":
            return float((1 + staleness) ** -self.exponent)
        if self.discount == "hinge" and staleness > self.threshold:
            return 1 / (self.exponent * (staleness - self.threshold) + 1)
        return 1.0

    def next(self, moment: Moment, state: Any) -> tuple[Timetable, Any]:
        """Let the clients train until the buffer is full.

        The state is the time; who trains, since which round and until when; the models
        that they began with; and how many were drawn so far.
        """
        round, model, epochs, population, sizes_of = moment
        speeds = Speeds(self.seed, self.speed_spread, sizes_of)
        began = time = 0.0 if state is None else state["seconds"]
        training = {} if state is None else dict(state["training"])
        models = {} if state is None else dict(state["models"])
        draws = 0 if state is None else state["draws"]
        starts = {since: replace(model, **own) for since, own in models.items()}
        starts[round] = model
        models[round] = {
            "parameters": model.parameters,
            "buffers": model.buffers,
            "integers": model.integers,
        }
        ends = [(end, client) for client, (_, end) in training.items()]
        heapq.heapify(ends)
        idle = Idle(self.seed, population, sizes_of, training)
        arrived: list[tuple[int, int]] = []
        while len(arrived) < self.buffer_size:
            while len(training) < self.concurrency:
                client = idle.draw(draws)
                if client is None:
                    break
                draws += 1
                end = time + epochs * speeds.seconds(client)
                training[client] = [round, end]
                heapq.heappush(ends, (end, client))
            if not training:
                break  # Nobody is left who could begin.
            time, client = heapq.heappop(ends)
            since, _ = training.pop(client)
            arrived.append((client, since))
        if not arrived:
            raise ConfigurationError(
                "schedule 'buffered': no client has examples to train on."
            )
        arrivals = tuple(
            Arrival(
                client, since, starts[since], self.staleness_discount(round - since)
            )
            for client, since in sorted(arrived)
        )
        needed = {since for since, _ in training.values()}
        took = time - began
        return Timetable(arrivals, lambda passes: {}, lambda passes: took), {
            "seconds": time,
            "training": training,
            "models": {since: models[since] for since in sorted(needed)},
            "draws": draws,
        }


class Idle:
    """Clients that may begin with the newest model, from which one is drawn at a time.

    Those that do not train, have no update in the buffer, have not had that model, and
    have examples. Where more than half of all clients may, they are not listed.

    Parameters
    ----------
    seed : int
        0 or more.
    population : int
        N.
    sizes_of : Callable
        As for :class:`Speeds`.
    busy : Iterable[int]
        Who trains.
    """

    def __init__(
        self, seed: int, population: int, sizes_of: Sizes, busy: Iterable[int]
    ) -> None:
        self.seed = seed
        self.population = population
        self.sizes_of = sizes_of
        self._out = set(busy)  # Or without examples.
        self._listed: list[int] | None = None

    def draw(self, number: int) -> int | None:
        """Return one of them, drawn uniformly; ``None`` if there is none.

        ``number`` says which draw of the run it is.
        """
        stream = generator(self.seed, Purpose.ARRIVALS, number)
        while self._listed is None and 2 * len(self._out) < self.population:
            client = int(stream.integers(self.population))
            if client in self._out:
                continue
            self._out.add(client)
            if self._has_examples(client):
                return client
        if self._listed is None:
            some = [c for c in range(self.population) if c not in self._out]
            sizes = self.sizes_of(some)
            if sizes is not None:
                some = [c for c, size in zip(some, sizes, strict=True) if size]
            self._listed = some
        if not self._listed:
            return None
        place = int(stream.integers(len(self._listed)))
        client, last = self._listed[place], self._listed.pop()
        if place < len(self._listed):
            self._listed[place] = last
        self._out.add(client)
        return client

    def _has_examples(self, client: int) -> bool:
        sizes = self.sizes_of([client])
        return sizes is None or sizes[0] > 0


def make_schedule(name: str, **options: Any) -> Schedule | None:
    """Make a schedule by name; ``None`` for the synchronous one.

    Raises
    ------
    ConfigurationError
        If there is none of this name, or an option is out of its range.

    Examples
    --------
    >>> make_schedule("buffered", buffer_size=2).concurrency
    20
    """
    made = SCHEDULES.resolve(name)(**options)
    if isinstance(made, Synchronous):
        return None
    if not isinstance(made, Schedule):
        raise ConfigurationError(
            f"schedule '{name}' is not derived from "
            "fedweight.server.schedules.Schedule."
        )
    return made
