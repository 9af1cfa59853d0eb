"""The arithmetic over the rows of the updates, compiled.

Each kernel works on the same columns of all rows of a part, so one call is long
enough to cost nothing, and it holds no lock: threads of ours run side by side. It
takes the rows by their addresses: so the same machine code sums them wherever they
lie, which is why a result's bits do not depend on that.

What memory holds is read once. Columns are taken ``STEP`` at a time, which stay in the
core's own caches while one row after another is read; fewer, and a row is left before
the memory has got into its stride. Sums over columns are made in ``STEP`` columns in
the vectors' dtype, in whatever order is fastest, and go on in float64.

Numba compiles a kernel at its first use, five seconds for all of them, and keeps the
machine code beside this file or in the user's cache folder; from then on a process
loads it in half a second. Where neither can be written to, each process compiles.
Only :mod:`fedweight.updates` imports this, at the first sum, as Numba takes a third of
a second to import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

STEP = 8192

# A sum may be made in any order. "nnan" and "ninf" are left out: NaN stays NaN.
ANY_ORDER = {"reassoc", "contract", "nsz", "arcp"}

# A product and a sum may be rounded together.
IN_ORDER = {"contract"}


def inlined(fastmath: set[str]) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function into the kernels that call it.

    Called instead, a process that compiles would run another copy of it than one that
    loads what was compiled, with other last bits.
    """
    decorate: Callable[[Callable[..., Any]], Any] = njit(
        nogil=True, fastmath=fastmath, forceinline=True
    )
    return decorate


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function at its first call, or load what another process compiled."""
    try:
        return njit(nogil=True, fastmath=IN_ORDER, cache=True)(function)
    except RuntimeError:  # No folder for the cache can be written to.
        return njit(nogil=True, fastmath=IN_ORDER)(function)


@intrinsic
def _pointer(context: Any, address: Any) -> Any:
    """Return an address, an unsigned integer, as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = context.get_value_type(signature.return_type)
        return builder.inttoptr(arguments[0], kind)

    return types.voidptr(address), generate


@inlined(IN_ORDER)
def _columns(row, start, size, like):  # type: ignore[no-untyped-def]
    """Return ``size`` columns of the row at an address; ``like`` has its dtype."""
    place = row + np.uint64(start * like.itemsize)
    return carray(_pointer(place), (size,), like.dtype)  # type: ignore[call-arg]


@inlined(IN_ORDER)
def _four(rows, k, start, size, like):  # type: ignore[no-untyped-def]
    """Return columns of four rows from the k-th on, the last one again where it ends.

    Memory is read a quarter faster than one row after another.
    """
    last = len(rows) - 1
    return (
        _columns(rows[k], start, size, like),
        _columns(rows[min(k + 1, last)], start, size, like),
        _columns(rows[min(k + 2, last)], start, size, like),
        _columns(rows[min(k + 3, last)], start, size, like),
    )


@inlined(IN_ORDER)
def _add_four(total, rows, wa, wb, wc, wd):  # type: ignore[no-untyped-def]
    a, b, c, d = rows
    for j in range(len(total)):
        total[j] = total[j] + wa * a[j] + wb * b[j] + wc * c[j] + wd * d[j]


@inlined(IN_ORDER)
def _add_one(total, a, wa):  # type: ignore[no-untyped-def]
    for j in range(len(total)):
        total[j] = total[j] + wa * a[j]


@kernel
def combine(total, rows, start, like, weights, together):  # type: ignore[no-untyped-def]
    """Set ``total`` to the weighted sum of rows.

    Rows are added from the first to the last, in the weights' dtype; the sums of so
    many ``together`` are added in ``total``'s.

    Parameters
    ----------
    total : ndarray
        Shape ``[n]``.
    rows : ndarray
        Shape ``[k]``, the addresses of the rows, uint64.
    start : int
        Which column ``total`` begins with.
    like : ndarray
        Any array of the rows' dtype.
    weights : ndarray
        Shape ``[k]``.
    together : int
        1 or more.
    """
    tile = np.empty(STEP, weights.dtype)
    for first in range(0, len(total), STEP):
        result = total[first : first + STEP]
        result[:] = 0
        part = tile[: len(result)]
        place, size = start + first, len(result)
        for group in range(0, len(rows), together):
            x, w = rows[group : group + together], weights[group : group + together]
            part[:] = 0
            k = 0
            while k + 4 <= len(x):
                four = _four(x, k, place, size, like)
                _add_four(part, four, w[k], w[k + 1], w[k + 2], w[k + 3])
                k += 4
            while k < len(x):
                _add_one(part, _columns(x[k], place, size, like), w[k])
                k += 1
            for j in range(size):
                result[j] += part[j]


@inlined(IN_ORDER)
def _add_up(totals, k, sums):  # type: ignore[no-untyped-def]
    """Add what four rows from the k-th on summed up to."""
    for i in range(min(4, len(totals) - k)):
        totals[k + i] += sums[i]


@inlined(ANY_ORDER)
def _products(rows, origin, vector):  # type: ignore[no-untyped-def]
    a, b, c, d = rows
    sa = sb = sc = sd = origin.dtype.type(0)
    for j in range(len(origin)):
        o, v = origin[j], vector[j]
        sa += (a[j] - o) * v
        sb += (b[j] - o) * v
        sc += (c[j] - o) * v
        sd += (d[j] - o) * v
    return sa, sb, sc, sd


@inlined(ANY_ORDER)
def _squares(rows, origin):  # type: ignore[no-untyped-def]
    a, b, c, d = rows
    sa = sb = sc = sd = origin.dtype.type(0)
    for j in range(len(origin)):
        o = origin[j]
        sa += (a[j] - o) * (a[j] - o)
        sb += (b[j] - o) * (b[j] - o)
        sc += (c[j] - o) * (c[j] - o)
        sd += (d[j] - o) * (d[j] - o)
    return sa, sb, sc, sd


@inlined(ANY_ORDER)
def _absolutes(rows, origin):  # type: ignore[no-untyped-def]
    a, b, c, d = rows
    sa = sb = sc = sd = origin.dtype.type(0)
    for j in range(len(origin)):
        o = origin[j]
        sa += abs(a[j] - o)
        sb += abs(b[j] - o)
        sc += abs(c[j] - o)
        sd += abs(d[j] - o)
    return sa, sb, sc, sd


@kernel
def project(products, rows, start, like, origin, vector, norms):  # type: ignore[no-untyped-def]
    """Add the products of ``row - origin`` with a vector, and with itself.

    Parameters
    ----------
    products : ndarray
        Shape ``[2, k]``, float64.
    rows, start, like
        As for :func:`combine`.
    origin, vector : ndarray
        Shape ``[n]``.
    norms : bool
        Whether the second product is asked for.
    """
    for first in range(0, len(origin), STEP):
        o, v = origin[first : first + STEP], vector[first : first + STEP]
        for k in range(0, len(rows), 4):
            four = _four(rows, k, start + first, len(o), like)
            _add_up(products[0], k, _products(four, o, v))
            if norms:
                _add_up(products[1], k, _squares(four, o))


@kernel
def distances(sizes, rows, start, like, origin, point, order):  # type: ignore[no-untyped-def]
    """Add the absolute values, or the squares, of ``row - origin - point``.

    Parameters
    ----------
    sizes : ndarray
        Shape ``[k]``, float64.
    rows, start, like
        As for :func:`combine`.
    origin, point : ndarray
        Shape ``[n]``; an empty point is 0.
    order : int
        1 for absolute values, 2 for squares.
    """
    tile = np.empty(STEP, origin.dtype)
    for first in range(0, len(origin), STEP):
        o, p = origin[first : first + STEP], point[first : first + STEP]
        base = tile[: len(o)]
        base[:] = o
        for j in range(len(p)):
            base[j] += p[j]
        for k in range(0, len(rows), 4):
            four = _four(rows, k, start + first, len(o), like)
            if order == 1:
                _add_up(sizes, k, _absolutes(four, base))
            else:
                _add_up(sizes, k, _squares(four, base))


@kernel
def add(total, vector):  # type: ignore[no-untyped-def]
    """Add a vector of any dtype to ``total``."""
    for j in range(len(total)):
        total[j] += vector[j]


@kernel
def subtract(total, whole, vector, weight):  # type: ignore[no-untyped-def]
    """Set ``total`` to ``whole - weight * vector``, of any dtypes."""
    for j in range(len(total)):
        total[j] = whole[j] - weight * vector[j]
