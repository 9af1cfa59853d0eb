"""Whether a client's reply is fit to be aggregated.

Whatever bytes it is made of, it is aggregated or set aside with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..core.errors import AggregationError
from ..core.layout import FlatModel
from ..core.model_rows import Held
from ..core.records import Status
from ..core.texts import shown
from ..messages import keys
from ..messages.dispatch import Reply
from ..messages.records import check_side_data
from .reported import MOST_COUNTED, as_number


class Unfit(AggregationError):
    """A reply that is not aggregated; ``status`` is what the record says of it."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status: Status = status


def size_of(metrics: Mapping[str, Any], key: str) -> float:
    """Return how much data a client says that it has.

    Raises
    ------
    AggregationError
        If it is not a number of 0 or more, or a number of examples that nobody has.
    """
    size = as_number(metrics.get(key))
    if size is None or not 0 <= size < math.inf:
        raise AggregationError(
            f"its '{key}' must be a number of 0 or more, got {shown(metrics.get(key))}"
        )
    if key == keys.NUM_EXAMPLES and size > MOST_COUNTED:
        raise AggregationError(
            f"its '{key}' must be a number of 0 or more, at most {MOST_COUNTED:g}, got "
            f"{shown(metrics.get(key))}"
        )
    return size


def check_trained(size: float, known: Mapping[str, float]) -> None:
    """Raise :class:`Unfit` if a client has nothing to count for.

    One without examples never counts, whatever the method. One that made no step, as
    where the model cannot train on what it has, would hold the others back.

    Parameters
    ----------
    size : float
        How much data it has.
    known : Mapping[str, float]
        The metrics that the server knows by name.
    """
    examples = known.get(keys.NUM_EXAMPLES)
    if size == 0 or examples == 0:
        raise Unfit("dropped", keys.NO_EXAMPLES)
    if known.get(keys.NUM_STEPS) == 0:
        several = "s" * (examples != 1)
        has = "" if examples is None else f" on its {examples:g} example{several}"
        raise Unfit("dropped", f"the model could not train{has}")


def check_sender(asked: bool, answered: bool) -> None:
    """Raise :class:`AggregationError` unless a reply is the one that is waited for."""
    if not asked:
        raise AggregationError("it was not asked")
    if answered:
        raise AggregationError("it replied twice")


def check_model(reply: Reply, arrays_key: str) -> None:
    """Raise :class:`AggregationError` if a model could not be aggregated."""
    if reply.model is None and not reply.summed:
        raise AggregationError(f"its reply has no '{arrays_key}'")
    if not reply.is_finite():
        raise AggregationError(f"its model has {keys.NOT_FINITE}")
    if isinstance(reply.model, Held):
        for e in reply.model.negative_variances():
            raise AggregationError(f"its '{e.name}', a variance, has negative values")


def check_asked(reply: Reply, asks: tuple[str, ...]) -> None:
    """Raise :class:`AggregationError` if something is missing that was asked for."""
    for name in asks:
        if name not in reply.metrics and name not in reply.profile:
            raise AggregationError(f"it was asked for '{name}', which is missing")
        value = reply.metrics.get(name, 0.0)
        number = as_number(value)
        if number is None or not math.isfinite(number):
            raise AggregationError(f"its '{name}' is {shown(value)}, not a number")


def check_profile(reply: Reply) -> None:
    """Raise :class:`AggregationError` unless side data are lists of finite numbers."""
    for name, value in reply.profile.items():
        check_side_data(name, value)


def of_another_kind(
    replies: Mapping[int, Reply], asks: Mapping[int, tuple[str, ...]]
) -> dict[int, str]:
    """Return who reports a number where most give a list, or a list for a number.

    Parameters
    ----------
    replies : Mapping[int, Reply]
        By client; each has what it was asked for.
    asks : Mapping[int, tuple[str, ...]]
        By client, what it was asked for.

    Returns
    -------
    dict[int, str]
        Why each of them is rejected: all, where as many do the one as the other.
    """
    found: dict[int, str] = {}
    for name in dict.fromkeys(name for names in asks.values() for name in names):
        asked = [client for client, names in asks.items() if name in names]
        lists = {c for c in asked if name not in replies[c].metrics}
        numbers = set(asked) - lists
        if not lists or not numbers:
            continue
        for own, others, what in (
            (lists, numbers, "a list, where most clients give a number"),
            (numbers, lists, "a number, where most clients give a list"),
        ):
            if len(own) < len(others):
                found |= dict.fromkeys(own, f"its '{name}' is {what}")
            elif len(own) == len(others):
                why = f"as many clients give a list as a number for '{name}'"
                found |= dict.fromkeys(own, why)
    return found


def check_fraction(metrics: Mapping[str, Any], name: str) -> None:
    """Raise ``AggregationError`` unless a client reports a number in [0, 1]."""
    value = metrics.get(name)
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise AggregationError(f"its '{name}' must be in [0, 1], got {shown(value)}")


def check_not_negative(metrics: Mapping[str, Any], name: str) -> None:
    """Raise ``AggregationError`` unless a client reports a number of 0 or more."""
    value = metrics.get(name)
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise AggregationError(f"its '{name}' must be 0 or more, got {shown(value)}")


def update_norm(model: FlatModel, start: FlatModel) -> float:
    """Return the Euclidean length of a client's update."""
    norm = float(torch.dist(model.parameters, start.parameters))
    if math.isfinite(norm):
        return norm
    return float(torch.dist(model.parameters.double(), start.parameters.double()))


# An update that is so many times as long as the median is worth a line.
FAR_LONGER = 1000.0


def far_longer(lengths: Mapping[int, float]) -> dict[int, float]:
    """Return whose update is far longer than others', in multiples of the median.

    Examples
    --------
    >>> far_longer({0: 1.0, 1: 2.0, 2: 3.0, 3: 1e6})
    {3: 500000.0}
    """
    median = sorted(lengths.values())[(len(lengths) - 1) // 2] if lengths else 0.0
    if len(lengths) < 3 or not median > 0:
        return {}
    return {c: n / median for c, n in lengths.items() if n >= FAR_LONGER * median}
