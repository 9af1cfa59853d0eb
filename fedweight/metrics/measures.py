"""The measures that are made of sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .sums import Array, Sums


def _mean(name: str) -> Callable[[Sums], Array]:
    return lambda sums: np.asarray(sums[name] / sums["examples"])


def _f1_by_class(sums: Sums) -> Array:
    """Return 2 both / (true + decided) by class; NaN for one that does not occur."""
    counts = sums["labels"].astype(np.float64)
    return np.asarray(2 * counts[:, 2] / (counts[:, 0] + counts[:, 1]))


def _mean_of_known(values: Array) -> Array:
    """Return the mean of each row over what is no NaN; NaN where all is."""
    known = ~np.isnan(values)
    return np.asarray(np.where(known, values, 0).sum(1) / known.sum(1))


def _r2(sums: Sums) -> Array:
    n, total = sums["examples"], sums["targets"]
    squares = sums["squared-targets"]
    spread = squares - total**2 / n
    # What is left of the squares by rounding is no spread. A client's are added up
    # pairwise and those of all exactly, so little is lost, however many there are.
    known = spread > 1e-14 * np.abs(squares)
    return np.where(known, 1 - sums["squared-error"] / spread, np.nan)


def _auc(sums: Sums) -> Array:
    return _mean_of_known(_auc_by_class(sums)[0])


def _auc_error(sums: Sums) -> Array:
    return _mean_of_known(_auc_by_class(sums)[1])


def _auc_by_class(sums: Sums) -> tuple[Array, Array]:
    """Return the areas, and by how much each may be wrong, ``[C, K]``."""
    others, own = sums["scores"][:, :, 0], sums["scores"][:, :, 1]
    p = own / own.sum(-1, keepdims=True)
    q = others / others.sum(-1, keepdims=True)
    alike = (p * q).sum(-1) / 2
    below = np.cumsum(q, -1) - q
    return (p * below).sum(-1) + alike, alike


@dataclass(frozen=True)
class Measure:
    """What is made of sums.

    Attributes
    ----------
    parts : tuple of str
        Of what.
    result : Callable[[Sums], ndarray]
        One value a client, ``[C]``.
    sign : int
        1 where more is better, -1 where less is, 0 where it says nothing of that.
    low, high : float
        Between which values it lies.
    """

    parts: tuple[str, ...]
    result: Callable[[Sums], Array]
    sign: int = 1
    low: float = 0.0
    high: float = 1.0


MEASURES: Mapping[str, Measure] = {
    "loss": Measure(("loss",), _mean("loss"), -1, -np.inf, np.inf),
    "accuracy": Measure(("hits",), _mean("hits")),
    "macro-f1": Measure(("labels",), lambda sums: _mean_of_known(_f1_by_class(sums))),
    "dice": Measure(
        ("labels",), lambda sums: _mean_of_known(_f1_by_class(sums)[:, 1:])
    ),
    "auc": Measure(("scores",), _auc),
    "auc-error": Measure(("scores",), _auc_error, 0, 0.0, 0.5),
    "perplexity": Measure(
        ("loss",), lambda sums: np.exp(sums["loss"] / sums["examples"]), -1, 0.0, np.inf
    ),
    "rmse": Measure(
        ("squared-error",),
        lambda sums: np.sqrt(sums["squared-error"] / sums["examples"]),
        -1,
        0.0,
        np.inf,
    ),
    "r2": Measure(
        ("squared-error", "targets", "squared-targets"), _r2, 1, -np.inf, 1.0
    ),
    "confusion": Measure(
        ("confusion",), lambda sums: sums["confusion"], 0, 0.0, np.inf
    ),
}
