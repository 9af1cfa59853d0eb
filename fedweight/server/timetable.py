"""What a schedule is asked at the beginning of a round, and what it may answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..core.annotations import plain_value
from ..core.errors import ConfigurationError
from ..core.layout import FlatModel
from ..core.texts import shown

Sizes = Callable[[Sequence[int]], "Sequence[int] | None"]


class Moment(NamedTuple):
    """What a round begins with.

    Attributes
    ----------
    round : int
        From 1.
    model : FlatModel
        The global model.
    epochs : int
        How many passes clients make.
    population : int
        N; the clients are 0 to N - 1.
    sizes_of : Callable
        Returns how many examples some clients have, or ``None`` where nobody knows.
    """

    round: int
    model: FlatModel
    epochs: int
    population: int
    sizes_of: Sizes


class Arrival(NamedTuple):
    """An update that arrives.

    Attributes
    ----------
    client : int
        Whose, from 0 to N - 1.
    round : int
        In which the client began, from 1; this one at most.
    start : FlatModel
        The global model that it began with.
    discount : float
        0 or more; what its weight is multiplied by.
    """

    client: int
    round: int
    start: FlatModel
    discount: float


@dataclass(frozen=True)
class Timetable:
    """What a schedule says of one round.

    Attributes
    ----------
    arrivals : tuple[Arrival, ...], optional
        Whose updates are aggregated, one or more, each client once; ``None``: the
        strategy draws who trains.
    late : Callable
        Takes how many passes each client makes that was drawn, and returns why some of
        them come too late.
    seconds : Callable
        Takes the same, and returns how long the round takes: 0 or more.
    """

    arrivals: tuple[Arrival, ...] | None
    late: Callable[[Mapping[int, int]], Mapping[int, str]]
    seconds: Callable[[Mapping[int, int]], float]


def checked_answer(
    name: str, given: Any, moment: Moment, *, chooses: bool, discounts: bool
) -> tuple[Timetable, Any]:
    """Return what a schedule's ``next`` gave, if it is a timetable and a state.

    Parameters
    ----------
    name : str
        The schedule's class.
    given : Any
        What it gave.
    moment : Moment
        What it was asked.
    chooses, discounts : bool
        What the schedule says of itself.

    Raises
    ------
    ConfigurationError
        With what is wrong, on one line.
    """
    pair = isinstance(given, tuple) and len(given) == 2
    if not pair or not isinstance(given[0], Timetable):
        raise ConfigurationError(
            f"{name}.next must return a Timetable and the schedule's next state, got "
            f"{shown(given)}."
        )
    timetable, state = given
    if (timetable.arrivals is not None) != chooses:
        gave = "no arrivals" if chooses else "arrivals"
        raise ConfigurationError(
            f"{name}.next gave {gave}, but {name}.chooses is {chooses}. It is True "
            "where the schedule says whose updates are aggregated, and False where it "
            "leaves that to the strategy."
        )
    if not chooses:
        return timetable, state
    if not isinstance(timetable.arrivals, tuple | list) or not timetable.arrivals:
        raise ConfigurationError(
            f"{name}.next must give one arrival or more, got "
            f"{shown(timetable.arrivals)}."
        )
    arrivals = tuple(
        _checked_arrival(name, one, moment, discounts) for one in timetable.arrivals
    )
    clients = [one.client for one in arrivals]
    if len(set(clients)) < len(clients):
        twice = next(client for client in clients if clients.count(client) > 1)
        raise ConfigurationError(
            f"{name}.next gave client {twice} twice. A client arrives once in a round."
        )
    return Timetable(arrivals, timetable.late, timetable.seconds), state


def _checked_arrival(name: str, given: Any, moment: Moment, discounts: bool) -> Arrival:
    if not isinstance(given, Arrival):
        raise ConfigurationError(
            f"{name}.next must give arrivals as Arrival(client, round, start, discount)"
            f", got {shown(given)}."
        )
    client, round, discount = map(
        plain_value, (given.client, given.round, given.discount)
    )
    last = moment.population - 1
    if not _is_whole(client) or not 0 <= client <= last:
        why = f"client must be a whole number from 0 to {last}, got {shown(client)}"
    elif not _is_whole(round) or not 1 <= round <= moment.round:
        why = f"round must be one from 1 to {moment.round}, got {shown(round)}"
    elif not _fits(given.start, moment.model):
        why = f"start must be the moment.model of a round, got {shown(given.start)}"
    elif not _is_time(discount):
        why = f"discount must be a finite number of 0 or more, got {shown(discount)}"
    elif discount != 1 and not discounts:
        why = f"discount is {discount:g}, but {name}.discounts is False; it must be 1"
    else:
        return Arrival(client, round, given.start, float(discount))
    raise ConfigurationError(f"{name}.next gave an arrival that cannot be: {why}.")


def checked_late(name: str, given: Any, passes: Mapping[int, int]) -> dict[int, str]:
    """Return what a timetable's ``late`` gave, if it says why some come too late."""
    if not isinstance(given, Mapping) or not all(
        client in passes and isinstance(why, str) for client, why in given.items()
    ):
        raise ConfigurationError(
            f"{name}: late(passes) must return a reason, a text, by the number of each "
            f"client that is late, of those in passes; got {shown(given)}."
        )
    return {int(client): why for client, why in given.items()}


def checked_seconds(name: str, given: Any) -> float:
    """Return what a timetable's ``seconds`` gave, if a round can take so long."""
    seconds = plain_value(given)
    if not _is_time(seconds):
        raise ConfigurationError(
            f"{name}: seconds(passes) must return a finite number of 0 or more, got "
            f"{shown(given)}."
        )
    return float(seconds)


def _fits(start: Any, model: FlatModel) -> bool:
    return isinstance(start, FlatModel) and start.layout == model.layout


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_time(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value < math.inf
