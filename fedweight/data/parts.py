"""What several clients have, as rows of the same arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from .examples import Examples


class Parts(Sequence[Examples]):
    """Examples of several clients, each client's one after another in common arrays.

    As a sequence they are each client's examples, made when somebody asks.

    Parameters
    ----------
    whole : Examples
        Everybody's.
    first, sizes : ndarray
        ``[C]``, int64: where a client's begin, and how many they are.

    Examples
    --------
    >>> whole = Examples(np.zeros((5, 2), np.float32), np.arange(5))
    >>> parts = Parts(whole, np.array([3, 0]), np.array([2, 3]))
    >>> parts[0].y.tolist(), len(parts.take([1])[0])
    ([3, 4], 3)
    """

    def __init__(
        self,
        whole: Examples,
        first: npt.NDArray[np.int64],
        sizes: npt.NDArray[np.int64],
    ) -> None:
        self.whole = whole
        self.first = first
        self.sizes = sizes

    def __len__(self) -> int:
        """Return how many clients these are."""
        return len(self.first)

    @overload
    def __getitem__(self, k: int) -> Examples: ...
    @overload
    def __getitem__(self, k: slice) -> Parts: ...
    def __getitem__(self, k: int | slice) -> Examples | Parts:
        if isinstance(k, slice):
            return Parts(self.whole, self.first[k], self.sizes[k])
        first = int(self.first[k])
        return self.whole.take(slice(first, first + int(self.sizes[k])))

    def take(self, clients: Sequence[int] | npt.NDArray[np.int64]) -> Parts:
        """Return those of some of the clients, by their places here."""
        places = np.asarray(clients, np.int64)
        return Parts(self.whole, self.first[places], self.sizes[places])
