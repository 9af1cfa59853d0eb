"""Sums over examples, client by client, and what they add up to."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Sums:
    """What was added up for C clients, part by part.

    Attributes
    ----------
    parts : Mapping[str, ndarray]
        ``[C, ...]`` each: int64 where something was counted, else float64.
    """

    parts: Mapping[str, Array]

    def __len__(self) -> int:
        """Return C."""
        return len(self.parts["examples"])

    def __getitem__(self, name: str) -> Array:
        """Return a part, ``[C, ...]``."""
        return self.parts[name]

    def __add__(self, other: Sums) -> Sums:
        """Add those of other examples of the same clients."""
        return Sums({name: part + other[name] for name, part in self.parts.items()})

    @classmethod
    def joined(cls, several: Sequence[Sums]) -> Sums:
        """Return those of several clients, one after another."""
        names = several[0].parts
        return cls({n: np.concatenate([one[n] for one in several]) for n in names})

    def without(self, places: Collection[int]) -> Sums:
        """Return the same with nothing added up for some of the clients."""
        kept = np.ones(len(self), bool)
        kept[list(places)] = False
        parts = self.parts.items()
        return Sums({n: p * kept.reshape(-1, *[1] * (p.ndim - 1)) for n, p in parts})

    def total(self) -> Sums:
        """Return what all clients have together, C = 1.

        The same bits in whatever order the clients stand: counts are whole, and other
        sums are rounded once (J. R. Shewchuk, "Adaptive Precision Floating-Point
        Arithmetic and Fast Robust Geometric Predicates", 1997; ``math.fsum``).
        """
        return Sums({name: _total(part)[None] for name, part in self.parts.items()})


def _total(part: Array) -> Array:
    if part.dtype == np.int64:
        rounded = part.sum(0, dtype=np.float64)
        # What goes beyond int64 would wrap around.
        large = bool((np.abs(rounded) >= 2.0**62).any())
        return np.asarray(rounded if large else part.sum(0))
    columns = part.reshape(len(part), math.prod(part.shape[1:])).T.tolist()
    return np.array([_exact(column) for column in columns]).reshape(part.shape[1:])


def _exact(values: Sequence[float]) -> float:
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # Beyond a float, or infinity less infinity.
        return math.nan


def segment_sums(
    values: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return the sum of each client's values, which follow one another.

    A client's is what ``numpy.sum`` of its values alone is, to the bit.

    Parameters
    ----------
    values : ndarray
        ``[m, n]``: m values of each of n examples.
    sizes : ndarray
        ``[C]``: how many of the examples each client has.

    Returns
    -------
    ndarray
        ``[m, C]``.

    Examples
    --------
    >>> segment_sums(np.array([[1.0, 2.0, 3.0]]), np.array([2, 0, 1]))
    array([[3., 0., 3.]])
    """
    sums = np.zeros((len(values), len(sizes)))
    starts = np.cumsum(sizes) - sizes
    for size in np.unique(sizes).tolist():
        alike = np.flatnonzero(sizes == size)
        rows = starts[alike, None] + np.arange(size)
        for own, found in zip(values, sums, strict=True):
            found[alike] = own[rows].sum(1)  # Row by row, as they lie in memory.
    return sums
