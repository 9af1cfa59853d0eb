"""Means of products of two tensors, as factors again: for low-rank adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .layout import Entry, FlatModel
from .threads import one_thread
from .updates import Updates

# Names of two tensors, B and A, of which the product B A counts.
Factors = tuple[str, str]

# Singular values of up to so many roundings of the largest are nothing but rounding.
ROUNDINGS = 64


def put_products(
    parameters: Tensor,
    model: FlatModel,
    updates: Updates,
    weights: Tensor,
    factors: Sequence[Factors],
) -> None:
    """Put factors of aggregated products in the place of aggregated factors.

    Of each pair the product becomes ``B A + sum_k weights_k (B_k A_k - B A)``, cut to
    the rank that there is: the nearest of that rank (Eckart and Young, 1936).

    Parameters
    ----------
    parameters : Tensor
        ``[P]``: the next global model's; changed in place.
    model : FlatModel
        The global model.
    updates : Updates
        ``[K, P]``: what clients added to it.
    weights : Tensor
        ``[K]``; or ``[K, T]``, one for each named tensor: then a pair counts as its two
        tensors do on average.
    factors : Sequence[tuple[str, str]]
        The names of B, ``[out, r]``, and A, ``[r, in]``.
    """
    entries: Mapping[str, Entry] = {e.name: e for e in model.layout.parameters}
    numbers = {name: number for number, name in enumerate(entries)}
    noise = ROUNDINGS * torch.finfo(model.parameters.dtype).eps
    with one_thread():  # The last bits of a factorisation depend on it.
        for pair in factors:
            if not all(name in entries for name in pair):
                continue  # One of the two is frozen: then the mean is exact.
            shares = weights.double()
            if shares.ndim == 2:
                shares = shares[:, [numbers[name] for name in pair]].mean(1)
            places = [slice(entries[n].start, entries[n].stop) for n in pair]
            shapes = [entries[n].shape for n in pair]
            before = [
                model.parameters[place].double().view(shape)
                for place, shape in zip(places, shapes, strict=True)
            ]
            moved = [
                updates.columns(place.start, place.stop).double().view(-1, *shape)
                for place, shape in zip(places, shapes, strict=True)
            ]
            b, a = (own + more for own, more in zip(before, moved, strict=True))
            rest = before[0] * (1 - shares.sum())
            left = torch.cat([rest, *(shares[:, None, None] * b)], 1)
            right = torch.cat([before[1], *a])
            for place, factor in zip(
                places, refactored(left, right, before[1], noise), strict=True
            ):
                parameters[place] = factor.reshape(-1).to(parameters)


def refactored(
    left: Tensor, right: Tensor, like: Tensor, noise: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """Return B, ``[out, r]``, and A, ``[r, in]``, of which the product is nearest.

    Parameters
    ----------
    left, right : Tensor
        ``[out, m]`` and ``[m, in]``, of which the product is meant; float64.
    like : Tensor
        ``[r, in]``: the A of before. The rows of the new one are orthogonal, and as
        long as these are in the mean (root mean square), whatever the product is: where
        B has a column of 0, as at first, it can still be learned. Of rows for which the
        product has no direction those of before are taken, made orthogonal.
    noise : float
        Singular values of the product up to this share of the largest are 0: their
        directions are those of rounding, and would be others after another one.

    Examples
    --------
    >>> eye = torch.eye(2, dtype=torch.float64)
    >>> b, a = refactored(0.5 * eye, eye, torch.ones(2, 2, dtype=torch.float64))
    >>> torch.allclose(b @ a, 0.5 * eye)
    True
    """
    rank = len(like)
    if left.shape[1] < min(len(left), right.shape[1]):  # Thin: no [out, in] is made.
        first, rest = torch.linalg.qr(left)
        second, other = torch.linalg.qr(right.T)
        u, sizes, v = torch.linalg.svd(rest @ other.T, full_matrices=False)
        u, v = first @ u, v @ second.T
    else:
        u, sizes, v = torch.linalg.svd(left @ right, full_matrices=False)
    length = float(like.norm()) / math.sqrt(rank) or 1.0
    kept = min(rank, int((sizes > noise * sizes[:1]).sum()))
    u, sizes, v = u[:, :kept], sizes[:kept], v[:kept]
    # A direction and its opposite are one; which it is must not be by chance either.
    signs = v.gather(1, v.abs().argmax(1, keepdim=True)).sign()
    b, a = left.new_zeros(len(left), rank), like.clone()
    b[:, :kept] = u * (sizes / length) * signs.T
    rows = torch.cat([v * signs, like[kept:]])[: like.shape[1]]
    basis, upper = torch.linalg.qr(rows.T)
    a[: len(rows)] = (basis * torch.where(upper.diag() < 0, -length, length)).T
    return b, a
