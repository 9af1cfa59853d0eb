"""From what a method measured to weights that sum to one."""

from __future__ import annotations

import logging
import math

import numpy as np
import torch
from torch import Tensor

from ..core.errors import AggregationError

log = logging.getLogger("fedweight")


def size_weights(num_examples: Tensor) -> Tensor:
    """Return each client's share of the cohort's examples, ``p_k = n_k / sum_j n_j``.

    Parameters
    ----------
    num_examples : Tensor
        Shape ``[K]``, 0 or more. If all are 0 the weights are uniform.

    Examples
    --------
    >>> size_weights(torch.tensor([100.0, 50.0, 50.0])).tolist()
    [0.5, 0.25, 0.25]
    """
    n = num_examples.double()
    total = float(n.sum())
    if math.isinf(total):
        n = n / n.max()
        total = float(n.sum())
    return n / total if total > 0 else torch.full_like(n, 1 / max(len(n), 1))


def cap(weights: Tensor, most: float) -> Tensor:
    """Return weights of which none is more than a share of their sum.

    Parameters
    ----------
    weights : Tensor
        Shape ``[K]``, or ``[K, T]`` for weights per tensor; 0 or more.
    most : float
        In (0, 1]. What is cut goes to the others in proportion; with ``1 / K`` or less
        all weights become equal, and 1 changes nothing.

    Raises
    ------
    AggregationError
        If a weight is below 0.

    Examples
    --------
    >>> cap(torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64), 0.5).tolist()
    [0.5, 0.25, 0.25]
    >>> cap(torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64), 0.25).tolist()
    [0.3333333333333333, 0.3333333333333333, 0.3333333333333333]
    """
    if most >= 1:
        return weights
    if (weights < 0).any():
        raise AggregationError(
            f"max_share needs weights of 0 or more, got {float(weights.min()):.4g}"
        )
    k = len(weights)
    total = weights.sum(0)
    if most * k <= 1:
        return (total / k).expand_as(weights).clone()
    capped = torch.zeros_like(weights, dtype=torch.bool)
    result = weights
    for _ in range(k):
        over = (result > most * total) & ~capped
        if not over.any():
            break
        capped |= over
        left = total * (1 - most * capped.sum(0))
        free = torch.where(capped, 0.0, weights)
        share = free.sum(0)
        others = (~capped).sum(0)
        # In proportion; alike where nobody else has any.
        of_rest = free / torch.where(share > 0, share, 1.0)
        spread = left * torch.where(share > 0, of_rest, 1 / others)
        result = torch.where(capped, most * total, spread)
    return result


def effective_clients(weights: Tensor) -> float:
    """Return how many equally weighted clients would count as much.

    Leslie Kish, "Survey Sampling", 1965: ``(sum_k w_k)^2 / sum_k w_k^2``, from 1 to K
    for weights of 0 or more that are not all 0.

    Examples
    --------
    >>> effective_clients(torch.tensor([0.5, 0.5, 0.0]))
    2.0
    """
    values = weights.double().numpy()
    largest = float(np.abs(values).max())
    if largest == 0:
        return 0.0
    # By a power of 2, which changes no digit, so that no square is too large.
    scaled = values / 2.0 ** math.frexp(largest)[1]
    return float(scaled.sum()) ** 2 / float(np.square(scaled).sum())


def normalise(raw: Tensor, fallback: Tensor) -> Tensor:
    """Return weights that are 0 or more and sum to one.

    Parameters
    ----------
    raw : Tensor
        Shape ``[K]``; what the method measured. Negative values count as 0.
    fallback : Tensor
        Shape ``[K]``; returned, with a warning in the log, where no value is above 0.

    Raises
    ------
    AggregationError
        If a value is NaN or infinite.

    Examples
    --------
    >>> p = torch.tensor([0.5, 0.5])
    >>> normalise(torch.tensor([3.0, 1.0]), p).tolist()
    [0.75, 0.25]
    >>> normalise(torch.tensor([-1.0, 0.0]), p).tolist()
    [0.5, 0.5]
    """
    raw = raw.double()
    if not raw.isfinite().all():
        raise AggregationError(f"the raw weights are not finite: {raw.tolist()}.")
    if len(raw) == 1:
        return torch.ones_like(raw)
    positive = raw.clamp(min=0)
    total = positive.sum()
    if total <= 0:
        log.warning("no client has a positive weight: falling back to data size")
        return fallback.double()
    return positive / total
