"""The arithmetic over the rows of the updates, compiled.

Each kernel works on the same columns of all rows of a place, so that there are few
calls, and it holds no lock: threads of ours run side by side. It takes the rows by
their addresses: so the same machine code sums them wherever they lie, which is why a
result's bits do not depend on that.

What memory holds is read once. Columns are taken ``LONG_STEP`` at a time, which stay
in the core's own caches while one row after another is read; fewer, and a row is left
before the memory has got into its stride. Where the rows are summed first and then held
against that sum, ``STEP`` columns are taken: those of all rows stay in a cache between.
Sums over columns are made in ``STEP`` columns in the vectors' dtype, in whatever order
is fastest, and go on in float64.

Numba compiles a kernel at its first use, which takes long, and keeps the machine code
beside this file or in the user's cache folder; from then on a process loads it. Where
neither can be written to, each process compiles. Only
:func:`fedweight.core.rows.kernels` imports this, at the first sum, as Numba takes long
to import; without Numba it takes :mod:`fedweight.core.plain_kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

STEP = 8192
LONG_STEP = 4 * STEP

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
def _four(rows, k, last, start, size, like):  # type: ignore[no-untyped-def]
    """Return columns of four rows from the k-th on, the last one again where it ends.

    Memory is read faster so than one row after another.
    """
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


@inlined(IN_ORDER)
def _sum(total, tiles, matrix, start, w):  # type: ignore[no-untyped-def]
    """Set ``total``, some columns, to the weighted sum of the rows."""
    rows, parts, like, together = matrix
    size = len(total)
    some, of_part = tiles[0][:size], tiles[1][:size]
    total[:] = 0
    for part in range(len(parts) - 1):
        stop = parts[part + 1]
        several = stop - parts[part] > together
        of_part[:] = 0
        into = of_part if several else total
        for group in range(parts[part], stop, together):
            some[:] = 0
            k, end = group, min(group + together, stop)
            while k + 4 <= end:
                four = _four(rows, k, end - 1, start, size, like)
                _add_four(some, four, w[k], w[k + 1], w[k + 2], w[k + 3])
                k += 4
            while k < end:
                _add_one(some, _columns(rows[k], start, size, like), w[k])
                k += 1
            for j in range(size):
                into[j] += some[j]
        if several:
            for j in range(size):
                total[j] += of_part[j]


@kernel
def combine(total, matrix, start, weights):  # type: ignore[no-untyped-def]
    """Set ``total`` to the weighted sum of the rows.

    A group of rows is summed from the first to the last in the weights' dtype; groups
    and parts are added up in ``total``'s.

    Parameters
    ----------
    total : ndarray
        Shape ``[n]``.
    matrix : tuple
        The addresses of the rows, uint64 ``[k]``; where their parts begin, and the
        last one ends, int64; any array of the rows' dtype; and how many rows of a part
        make a group.
    start : int
        Which column ``total`` begins with.
    weights : ndarray
        Shape ``[k]``.
    """
    size = min(LONG_STEP, len(total))
    tiles = np.empty(size, weights.dtype), np.empty(size, total.dtype)
    for first in range(0, len(total), LONG_STEP):
        _sum(total[first : first + LONG_STEP], tiles, matrix, start + first, weights)


@inlined(IN_ORDER)
def _add_up(totals, k, stop, sums):  # type: ignore[no-untyped-def]
    """Add what four rows from the k-th on summed up to, those before ``stop``."""
    for i in range(min(4, stop - k)):
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
def _products_of_rest(rows, origin, vector, wa, wb, wc, wd):  # type: ignore[no-untyped-def]
    a, b, c, d = rows
    ia = ib = ic = id = qa = qb = qc = qd = ra = rb = rc = rd = origin.dtype.type(0)
    for j in range(len(origin)):
        o, v = origin[j], vector[j]
        ua, ub, uc, ud = a[j] - o, b[j] - o, c[j] - o, d[j] - o
        la, lb, lc, ld = v - wa * ua, v - wb * ub, v - wc * uc, v - wd * ud
        ia += ua * la
        ib += ub * lb
        ic += uc * lc
        id += ud * ld
        qa += ua * ua
        qb += ub * ub
        qc += uc * uc
        qd += ud * ud
        ra += la * la
        rb += lb * lb
        rc += lc * lc
        rd += ld * ld
    return (ia, ib, ic, id), (qa, qb, qc, qd), (ra, rb, rc, rd)


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


@inlined(IN_ORDER)
def _make_point(vector, tiles, matrix, start, origin, weights, total_weight):  # type: ignore[no-untyped-def]
    """Set ``vector``, some columns, to the weighted sum of the rows less the origin."""
    total = tiles[1][: len(vector)]
    _sum(total, (tiles[0], tiles[2]), matrix, start, weights)
    for j in range(len(vector)):
        vector[j] = total[j] - total_weight * origin[j]


@kernel
def dot(products, matrix, start, origin, vector, weights, total_weight):  # type: ignore[no-untyped-def]
    """Add the products of ``row - origin`` with a vector.

    Parameters
    ----------
    products : ndarray
        Shape ``[k]``, float64.
    matrix, start
        As for :func:`combine`.
    origin : ndarray
        Shape ``[n]``.
    vector : ndarray
        Shape ``[n]``; or, if it is empty, the updates' sum with ``weights``. Sums are
        made in its dtype.
    weights : ndarray
        Shape ``[k]``, or empty.
    total_weight : float
        The sum of the weights.
    """
    rows, parts, like, _ = matrix
    at_once = STEP if len(weights) else LONG_STEP
    tile, made = np.empty(at_once, vector.dtype), np.empty(STEP, vector.dtype)
    tiles = np.empty(STEP, weights.dtype), np.empty(STEP), np.empty(STEP)
    for first in range(0, len(origin), at_once):
        here, place = origin[first : first + at_once], start + first
        o, v = tile[: len(here)], vector[first : first + at_once]
        o[:] = here
        if len(weights):
            v = made[: len(here)]
            _make_point(v, tiles, matrix, place, here, weights, total_weight)
        for part in range(len(parts) - 1):
            stop = parts[part + 1]
            for k in range(parts[part], stop, 4):
                for i in range(0, len(o), STEP):
                    oi, vi = o[i : i + STEP], v[i : i + STEP]
                    four = _four(rows, k, stop - 1, place + i, len(oi), like)
                    _add_up(products, k, stop, _products(four, oi, vi))


@kernel
def dot_rest(products, matrix, start, origin, vector, weights, total_weight, own):  # type: ignore[no-untyped-def]
    """Add products of the updates, and of a vector less a multiple of each.

    Parameters
    ----------
    products : ndarray
        Shape ``[3, k]``, float64. With the update ``u = row - origin`` and the rest
        ``r = vector - own * u``: ``u r``, ``u u`` and ``r r``.
    matrix, start, origin, vector, weights, total_weight
        As for :func:`dot`.
    own : ndarray
        Shape ``[k]``.
    """
    rows, parts, like, _ = matrix
    at_once = STEP if len(weights) else LONG_STEP
    tile, made = np.empty(at_once, vector.dtype), np.empty(STEP, vector.dtype)
    tiles = np.empty(STEP, weights.dtype), np.empty(STEP), np.empty(STEP)
    for first in range(0, len(origin), at_once):
        here, place = origin[first : first + at_once], start + first
        o, v = tile[: len(here)], vector[first : first + at_once]
        o[:] = here
        if len(weights):
            v = made[: len(here)]
            _make_point(v, tiles, matrix, place, here, weights, total_weight)
        for part in range(len(parts) - 1):
            last = parts[part + 1] - 1
            for k in range(parts[part], last + 1, 4):
                wa, wb = own[k], own[min(k + 1, last)]
                wc, wd = own[min(k + 2, last)], own[min(k + 3, last)]
                for i in range(0, len(o), STEP):
                    oi, vi = o[i : i + STEP], v[i : i + STEP]
                    four = _four(rows, k, last, place + i, len(oi), like)
                    inner, square, rest = _products_of_rest(
                        four, oi, vi, wa, wb, wc, wd
                    )
                    _add_up(products[0], k, last + 1, inner)
                    _add_up(products[1], k, last + 1, square)
                    _add_up(products[2], k, last + 1, rest)


@kernel
def distances(sizes, matrix, start, origin, point, weights, total_weight, order):  # type: ignore[no-untyped-def]
    """Add the absolute values, or the squares, of ``row - origin - point``.

    Parameters
    ----------
    sizes : ndarray
        Shape ``[k]``, float64.
    matrix, start, origin
        As for :func:`dot`.
    point, weights, total_weight
        As ``vector`` and so on for :func:`dot`; empty without weights, it is 0.
    order : int
        1 for absolute values, 2 for squares.
    """
    rows, parts, like, _ = matrix
    at_once = STEP if len(weights) else LONG_STEP
    tile, made = np.empty(at_once, point.dtype), np.empty(STEP, point.dtype)
    tiles = np.empty(STEP, weights.dtype), np.empty(STEP), np.empty(STEP)
    for first in range(0, len(origin), at_once):
        here, place = origin[first : first + at_once], start + first
        o, p = tile[: len(here)], point[first : first + at_once]
        o[:] = here
        if len(weights):
            p = made[: len(here)]
            _make_point(p, tiles, matrix, place, here, weights, total_weight)
        for j in range(len(p)):
            o[j] += p[j]
        for part in range(len(parts) - 1):
            stop = parts[part + 1]
            for k in range(parts[part], stop, 4):
                for i in range(0, len(o), STEP):
                    oi = o[i : i + STEP]
                    four = _four(rows, k, stop - 1, place + i, len(oi), like)
                    if order == 1:
                        _add_up(sizes, k, stop, _absolutes(four, oi))
                    else:
                        _add_up(sizes, k, stop, _squares(four, oi))


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
