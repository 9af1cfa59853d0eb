"""What clients report: their metrics, one by one and as the round's.

They are numbers of a client, not of the server. Those that the server knows by name
have ranges; all others are kept apart as the client's own, and there are not many.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from flwr.app import MetricRecord

from ..core.records import NOTHING, ByGroup, ClientRecord
from ..core.texts import NAME_LENGTH, listed, plain
from ..messages import keys
from ..messages.dispatch import Reply

if TYPE_CHECKING:
    from ..metrics import Statistics

# A client that claims to have more examples, or to have made more steps, is not
# believed. What is recorded as a whole number fits into 64 bits.
MOST_COUNTED = 1e18

# The metrics that the server knows by name, and between which values they lie.
RANGES: dict[str, tuple[float, float]] = {
    keys.NUM_EXAMPLES: (0, MOST_COUNTED),
    keys.NUM_STEPS: (0, MOST_COUNTED),
    keys.TRAIN_LOSS: (-math.inf, math.inf),
    keys.TRAIN_ACCURACY: (0, 1),
    keys.LOSS: (-math.inf, math.inf),
    keys.ACCURACY: (0, 1),
    keys.PERSONAL_LOSS: (-math.inf, math.inf),
    keys.PERSONAL_ACCURACY: (0, 1),
    keys.LOSS_BEFORE: (-math.inf, math.inf),
    keys.LOSS_AFTER: (-math.inf, math.inf),
    keys.ACCURACY_BEFORE: (0, 1),
    keys.ACCURACY_AFTER: (0, 1),
    keys.HELD_OUT_LOSS_BEFORE: (-math.inf, math.inf),
    keys.HELD_OUT_LOSS_AFTER: (-math.inf, math.inf),
    keys.HELD_OUT_ACCURACY_BEFORE: (0, 1),
    keys.HELD_OUT_ACCURACY_AFTER: (0, 1),
    keys.MINUS_ERROR: (0, 1),
    keys.NORMALISER: (0, math.inf),
}

# Sizes beyond this are scaled before they are added up.
LARGE = 1e300

log = logging.getLogger("fedweight")

# So many metrics of their own may clients report in a run, each client in a reply.
OWN_METRICS = 32


def is_count(value: Any, most: float = MOST_COUNTED) -> bool:
    """Tell whether what a client counts is a whole number that it may be.

    Examples
    --------
    >>> is_count(3), is_count(-1), is_count(2.0), is_count(3, most=2)
    (True, False, False, False)
    """
    return isinstance(value, int) and 0 <= value <= most


class AcceptedReply(NamedTuple):
    """A reply that is fit to be used; ``known`` and ``own`` are its metrics, sorted."""

    client: int
    reply: Reply
    num_examples: float
    known: dict[str, float]
    own: Mapping[str, float]


def as_number(value: Any) -> float | None:
    """Return a metric as a float; ``None`` if it is no number.

    Examples
    --------
    >>> as_number(3), as_number(10**400), as_number([3.0])
    (3.0, inf, None)
    """
    if not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def sort_metrics(
    metrics: Mapping[str, Any],
) -> tuple[dict[str, float], Mapping[str, float]]:
    """Return the metrics that the server knows by name, and the client's own.

    A known one whose value is out of its range is among the client's own. Lists are
    left out, and so are names beyond the first :data:`OWN_METRICS`, by the alphabet.

    Examples
    --------
    >>> sort_metrics({"train-loss": 2.0, "train-accuracy": 87.5, "f1": 0.5})
    ({'train-loss': 2.0}, {'f1': 0.5, 'train-accuracy': 87.5})
    """
    known: dict[str, float] = {}
    own: dict[str, float] | None = None
    for name, value in metrics.items():
        number = value if type(value) is float else as_number(value)
        if number is None:
            continue
        limits = RANGES.get(name)
        # What differs from itself is NaN.
        if limits and (limits[0] <= number <= limits[1] or number != number):
            known[name] = number
        elif own is None:
            own = {name: number}
        else:
            own[name] = number
    if own is None:
        return known, NOTHING
    names = heapq.nsmallest(OWN_METRICS, own)
    return known, {plain(name, NAME_LENGTH): own[name] for name in names}


class OwnMetrics:
    """The clients' own metrics that are recorded: :data:`OWN_METRICS` in a run.

    Those come first that more clients of a round report, then those that the alphabet
    has first; what is recorded once is recorded in all later rounds.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._told = False

    @property
    def names(self) -> list[str]:
        """The names that are recorded."""
        return sorted(self._names)

    def restore(self, names: Iterable[str]) -> None:
        """Go on with the names of another run."""
        self._names = set(names)

    def limit(self, reported: Iterable[ClientRecord]) -> set[str]:
        """Leave those in clients' records, and return the names of all of a run.

        The records are those of a round, with what has been reported since the last.
        """
        some = [entry for entry in reported if entry.own_metrics]
        if not some:
            return self._names
        counts = Counter(name for entry in some for name in entry.own_metrics)
        new = [name for name in counts if name not in self._names]
        new.sort(key=lambda name: (-counts[name], name))
        left = OWN_METRICS - len(self._names)
        self._names.update(new[:left])
        if new[left:] and not self._told:
            self._told = True
            log.warning(
                "clients report more than %d metrics of their own; %s and whatever "
                "else is new is not recorded",
                OWN_METRICS,
                listed(new[left:], most=2),
            )
        for entry in some:
            own = entry.own_metrics
            entry.own_metrics = {name: own[name] for name in own if name in self._names}
        return self._names


def mean_metrics(
    accepted: Sequence[AcceptedReply], key: str, chosen: Collection[str] = ()
) -> MetricRecord:
    """Average each metric by data size over the clients that report a finite number.

    Parameters
    ----------
    accepted : Sequence[AcceptedReply]
        The clients.
    key : str
        The metric that says how much data a client has, which is left out.
    chosen : Collection[str]
        Which of the clients' own are averaged, too. One that has a name that the
        server knows, but a value out of its range, never is.
    """
    names = dict(accepted[0].known)
    own: set[str] = set()
    for one in accepted:
        if one.known.keys() != names.keys():
            names |= one.known
        own.update(one.own)
    names.pop(key, None)
    others = sorted(own.intersection(chosen) - RANGES.keys() - {key})
    columns = [[one.known.get(name, math.nan) for one in accepted] for name in names]
    columns += [[one.own.get(name, math.nan) for one in accepted] for name in others]
    values = np.array(columns).reshape(len(columns), len(accepted))
    sizes = np.array([one.num_examples for one in accepted])
    largest = float(sizes.max())
    if largest > LARGE:
        sizes /= largest
    with np.errstate(all="ignore"):
        means = (values * sizes).sum(1) / sizes.sum()
        if not np.isfinite(means).all():
            means = _means_of_known(values, sizes)
    pairs = zip([*names, *others], means.tolist(), strict=True)
    return MetricRecord({name: mean for name, mean in pairs if not math.isnan(mean)})


def _means_of_known(
    values: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the rows' means by size over what is finite; NaN where nothing is."""
    known = np.isfinite(values)
    values = np.where(known, values, 0)
    p = known * sizes
    p = np.where(p.any(1, keepdims=True), p, known)  # Alike, if none of them has data.
    totals = p.sum(1)
    means: npt.NDArray[np.float64] = (values * p).sum(1) / totals
    large = ~np.isfinite(means)
    # What is too large to be added up is weighed first.
    means[large] = (values[large] * (p[large] / totals[large, None])).sum(1)
    return means


class Measured(NamedTuple):
    """What clients' sums say.

    Attributes
    ----------
    whole : dict[str, float]
        What is measured of all of them together, without what is not finite.
    each : dict[int, dict[str, float]]
        What is measured of each client whose sums can be.
    odd : dict[int, str]
        By client, why the sums of the others cannot. They have no share in the rest.
    by_group : ByGroup or None
        What was added up by group, where that is asked for.
    """

    whole: dict[str, float]
    each: dict[int, dict[str, float]]
    odd: dict[int, str]
    by_group: ByGroup | None


def measured(
    statistics: Statistics, reported: Mapping[int, Mapping[str, Any]]
) -> Measured:
    """Return what clients' sums say: of all of them together, and of each.

    Parameters
    ----------
    statistics : Statistics
        What they added up.
    reported : Mapping[int, Mapping[str, Any]]
        The metrics of each client's reply, by client.
    """
    clients = [*reported]
    sums, odd = statistics.read([m.get(keys.STATISTICS) for m in reported.values()])
    for place, metrics in enumerate(reported.values()):
        size = as_number(metrics.get(keys.NUM_EXAMPLES))
        if place not in odd and sums["examples"][place] != size:
            odd[place] = "its statistics are not of as many examples as it says"
    sums = sums.without(odd)
    of_all, of_each = statistics.result(sums.total()), statistics.result(sums)
    known = {name: float(of_all[name][0]) for name in statistics.besides}
    columns = [of_each[name].tolist() for name in statistics.besides]
    return Measured(
        {name: value for name, value in known.items() if math.isfinite(value)},
        {
            client: dict(zip(statistics.besides, row, strict=True))
            for place, (client, *row) in enumerate(zip(clients, *columns, strict=True))
            if place not in odd
        },
        {clients[place]: why for place, why in odd.items()},
        None if statistics.groups is None else ByGroup(clients, sums),
    )


def recorded_metrics(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return a round's metrics by the names of the record: others' begin with "own".

    Examples
    --------
    >>> recorded_metrics({"loss": 2.0, "f1": 0.5}, "evaluate-")
    {'evaluate-loss': 2.0, 'own-evaluate-f1': 0.5}
    """
    numbers = {name: as_number(value) for name, value in metrics.items()}
    return {
        f"{'' if name in RANGES else 'own-'}{prefix}{name}": number
        for name, number in numbers.items()
        if number is not None
    }
