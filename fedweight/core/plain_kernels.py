"""The arithmetic over the rows of the updates without a compiler: PyTorch and NumPy.

What :mod:`fedweight.core.kernels` does, with the same names and arguments, where Numba
is not installed: slower. Sums of rows are made row by row as there, in the same order,
products and sums rounded together where PyTorch does that; sums over columns are made
by NumPy, whose order depends on how many there are and not on where they lie. So what
is made here has bits of its own, which for inner products and distances are not those
of the compiled kernels, and does not depend on workers or places either.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

STEP = 8192

Array = npt.NDArray[Any]


def _row(matrix: tuple[Any, ...], k: int, start: int, size: int) -> Array:
    """Return ``size`` columns of the k-th row from its address; it must stay alive."""
    rows, _, like, _ = matrix
    place = int(rows[k]) + start * like.itemsize
    raw = (ctypes.c_byte * (size * like.itemsize)).from_address(place)
    return np.frombuffer(raw, like.dtype)


def _sum(total: Array, matrix: tuple[Any, ...], start: int, weights: Array) -> None:
    """Set ``total``, some columns, to the weighted sum of the rows."""
    _, parts, _, together = matrix
    size, factors = len(total), weights.tolist()
    whole = torch.from_numpy(total).zero_()
    some = torch.empty(size, dtype=torch.from_numpy(weights[:0]).dtype)
    for first, stop in pairwise(parts.tolist()):
        several = stop - first > together
        into = torch.zeros_like(whole) if several else whole
        for group in range(first, stop, together):
            some.zero_()
            for k in range(group, min(group + together, stop)):
                row = torch.from_numpy(_row(matrix, k, start, size))
                some.add_(row, alpha=factors[k])
            into += some
        if several:
            whole += into


def combine(total: Array, matrix: Any, start: int, weights: Array) -> None:
    """Set ``total`` to the weighted sum of the rows."""
    for first in range(0, len(total), STEP):
        _sum(total[first : first + STEP], matrix, start + first, weights)


def _steps(
    matrix: Any,
    start: int,
    origin: Array,
    vector: Array,
    weights: Array,
    total_weight: float,
) -> Iterator[tuple[int, Array, Array, Array]]:
    """Yield rows' numbers, the rows, the origin and the vector, some columns each.

    Where there are weights, the vector is the updates' sum with them.
    """
    dtype = vector.dtype
    for first in range(0, len(origin), STEP):
        place, here = start + first, origin[first : first + STEP]
        o, v = here.astype(dtype), vector[first : first + STEP]
        if len(weights):
            total = np.empty(len(here))
            _sum(total, matrix, place, weights)
            v = _less(total, here, total_weight).astype(dtype)
        for k in range(len(matrix[0])):
            yield k, _row(matrix, k, place, len(o)), o, v


def _less(whole: Array, vector: Array, weight: float) -> Array:
    """Return ``whole - weight * vector`` in float64, alike wherever it is made."""
    exact = torch.from_numpy(whole).double()
    return exact.sub(torch.from_numpy(vector).double(), alpha=weight).numpy()


def _added(values: Array) -> float:
    return float(np.add.reduce(values))


def dot(
    products: Array,
    matrix: Any,
    start: int,
    origin: Array,
    vector: Array,
    weights: Array,
    total_weight: float,
) -> None:
    """Add the products of ``row - origin`` with a vector."""
    for k, row, o, v in _steps(matrix, start, origin, vector, weights, total_weight):
        products[k] += _added((row - o) * v)


def dot_rest(
    products: Array,
    matrix: Any,
    start: int,
    origin: Array,
    vector: Array,
    weights: Array,
    total_weight: float,
    own: Array,
) -> None:
    """Add products of the updates, and of a vector less a multiple of each."""
    for k, row, o, v in _steps(matrix, start, origin, vector, weights, total_weight):
        u = row - o
        rest = v - own[k] * u
        products[0, k] += _added(u * rest)
        products[1, k] += _added(u * u)
        products[2, k] += _added(rest * rest)


def distances(
    sizes: Array,
    matrix: Any,
    start: int,
    origin: Array,
    point: Array,
    weights: Array,
    total_weight: float,
    order: int,
) -> None:
    """Add the absolute values, or the squares, of ``row - origin - point``."""
    for k, row, o, p in _steps(matrix, start, origin, point, weights, total_weight):
        rest = row - (o + p if len(p) else o)
        sizes[k] += _added(np.abs(rest) if order == 1 else rest * rest)


def add(total: Array, vector: Array) -> None:
    """Add a vector of any dtype to ``total``."""
    total += vector


def subtract(total: Array, whole: Array, vector: Array, weight: float) -> None:
    """Set ``total`` to ``whole - weight * vector``, of any dtypes."""
    total[:] = _less(whole, vector, weight)
