"""How examples are cut into batches: by the clients, and by a server with a proxy set.

A model with BatchNorm cannot train on one example alone, which has no variance. For
such a model a last batch of one example joins the batch before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import numpy as np
import numpy.typing as npt


@overload
def num_batches(n: int, size: int, least: int = 1) -> int: ...
@overload
def num_batches(
    n: npt.NDArray[np.int64], size: int, least: int = 1
) -> npt.NDArray[np.int64]: ...
def num_batches(
    n: int | npt.NDArray[np.int64], size: int, least: int = 1
) -> int | npt.NDArray[np.int64]:
    """Return into how many batches some examples are cut, for a number or an array.

    Parameters
    ----------
    n : int or ndarray
        How many examples, 0 or more.
    size : int
        Examples in a batch, 1 or more; the last one takes what is left.
    least : int
        1 or 2: a last batch of fewer joins the one before it, if there is one.

    Examples
    --------
    >>> num_batches(9, 4), num_batches(9, 4, least=2), num_batches(1, 4, least=2)
    (3, 2, 1)
    """
    left = n % size
    joins = (n > size) & (left > 0) & (left < least)
    return -(-n // size) - joins


def batches(n: int, size: int, least: int = 1) -> list[slice]:
    """Return the places of each batch; see :func:`num_batches`.

    Examples
    --------
    >>> batches(5, 4), batches(5, 4, least=2)
    ([slice(0, 4, None), slice(4, 5, None)], [slice(0, 5, None)])
    """
    count = num_batches(n, size, least)
    ends = [*range(size, count * size, size), n]
    return [
        slice(first, last)
        for first, last in zip([0, *ends], ends[:count], strict=False)
    ]


def least_examples(can_train: Callable[[int], bool]) -> int:
    """Return how many examples a model needs in a batch: 1, or 2.

    Parameters
    ----------
    can_train : Callable[[int], bool]
        Tries whether the model can train on so many examples.
    """
    return 2 if not can_train(1) and can_train(2) else 1
