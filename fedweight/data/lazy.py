"""Partitions that are computed client by client, for as many clients as one likes.

What a client has is drawn from its own random stream when somebody asks for it, and is
not kept; of others only the size is known. So it depends neither on how many clients
there are nor on who was asked before, and clients share examples: a million of them
cannot have different ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, overload

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Gt

from ..core.errors import ConfigurationError, DataError
from ..core.options import validated
from ..core.rng import Purpose, generator, keys

Indices = npt.NDArray[np.int64]

# A client's two streams; this stands where other purposes have the round.
EXAMPLES, SIZE = 0, 1

# Sizes are drawn for so many clients at once, so that little memory is needed besides.
AT_ONCE = 1 << 16


class LazyParts(Sequence[Indices]):
    """A partition whose parts are computed when they are asked for.

    Parts may share examples with each other. A partition of your own may return this
    instead of a list.

    Parameters
    ----------
    sizes : ndarray
        Shape ``[K]``, integers: how many examples each client has.
    draw : Callable[[int], ndarray]
        Returns the examples of client k, from 0: ``sizes[k]`` different numbers from 0
        to ``len(rows) - 1``, in any order, the same at every call. It is called from
        several threads, and has to be pickled where clients train on Ray workers.
    rows : ndarray
        Shape ``[n]``, int64, ascending: the training examples that are drawn from.

    Examples
    --------
    >>> parts = LazyParts(
    ...     np.full(10**6, 2), lambda k: np.array([k % 3, 3]), np.arange(4)
    ... )
    >>> len(parts), parts[999_998].tolist()
    (1000000, [2, 3])
    """

    def __init__(
        self, sizes: npt.NDArray[Any], draw: Callable[[int], Indices], rows: Indices
    ) -> None:
        self.sizes = sizes
        self.draw = draw
        self.rows = rows

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> Indices: ...
    @overload
    def __getitem__(self, index: slice) -> list[Indices]: ...
    def __getitem__(self, index: int | slice) -> Indices | list[Indices]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        client = range(len(self))[index]
        drawn = np.sort(self.draw(client))
        n, size = len(self.rows), int(self.sizes[client])
        if len(drawn) != size:
            raise DataError(
                f"client {client} has {len(drawn)} examples, but its size is {size}. "
                "Make them equal."
            )
        if size and not (drawn[0] >= 0 and drawn[-1] < n):
            raise DataError(
                f"client {client} has example numbers from {drawn[0]} to {drawn[-1]}. "
                f"Give 0 to {n - 1}."
            )
        if (drawn[1:] == drawn[:-1]).any():
            raise DataError(
                f"client {client} has an example twice: it could be trained on and "
                "held out. Give it once."
            )
        part: Indices = self.rows[drawn]
        return part


@validated
def dirichlet_sampled(
    labels: Indices,
    num_clients: int,
    seed: int,
    *,
    alpha: Annotated[float, Gt(0)] = 0.3,
    examples_per_client: int = 50,
    size_sigma: Annotated[float, Ge(0)] = 0.0,
) -> LazyParts:
    """Label skew for any number of clients: each draws its own examples, lazily.

    Client k draws label shares ``p_k ~ Dirichlet(alpha * C * p)``, where ``p`` are the
    shares of the C classes in the data, so ``Dirichlet(alpha)`` where classes are
    equally large; then the class of each of its ``n_k`` examples by ``p_k``, and
    examples of these classes. It has none twice, but others may have the same. Where a
    class has fewer examples than drawn, the others of the client's classes fill in, by
    their shares, and where these end too, all others.

    All of it comes from client k's own stream: it is the same among a hundred clients
    and among a million, whoever else takes part. What a client holds out of its
    training others may train on, so only the test set is new to the global model.

    Parameters
    ----------
    labels : ndarray
        Shape ``[n]``, the class of each example.
    num_clients : int
        K, as many as one likes. Clients that take no part are never drawn; where sizes
        differ, all sizes are, and take sixteen bytes each in
        :class:`~fedweight.data.FederatedData`.
    seed : int
        Names the clients' streams.
    alpha : float
        Concentration, greater than 0. Where classes are equally large, about as skewed
        as ``dirichlet`` with the same.
        As alpha goes to infinity each client's examples are drawn from all (iid); as
        it goes to 0 each client has one class, drawn by ``p``. The paper's is C times
        as large.
    examples_per_client : int
        From 1 to n: how many examples clients have on average.
    size_sigma : float
        Size skew, 0 or more. With 0 all clients are equally large. Else ``n_k`` is
        log-normal: ``examples_per_client * exp(size_sigma * z - size_sigma^2 / 2)``
        with a standard normal ``z``, rounded, at least 1 and at most n. As it goes to
        infinity all clients have one example.

    Raises
    ------
    ConfigurationError
        If a parameter is out of range.

    References
    ----------
    T.-M. H. Hsu, H. Qi, M. Brown, "Measuring the Effects of Non-Identical Data
    Distribution for Federated Visual Classification", arXiv:1909.06335, 2019 (label
    shares by client; there clients do not share examples).

    Examples
    --------
    >>> labels = np.repeat([0, 1, 2], 100)
    >>> parts = dirichlet_sampled(labels, 10**6, 0, examples_per_client=20)
    >>> np.bincount(labels[parts[123_456]], minlength=3).tolist()
    [5, 15, 0]
    """
    n = len(labels)
    if not 1 <= examples_per_client <= n:
        raise ConfigurationError(
            f"examples_per_client must be from 1 to {n}, the examples there are to "
            f"draw from, got {examples_per_client}. Take another number, or more data."
        )
    _, available = np.unique(labels, return_counts=True)
    draw = _Draw(
        seed=seed,
        sizes=_sizes(num_clients, seed, examples_per_client, size_sigma, n),
        # Nearer to its limits alpha would leave the range of floating numbers.
        concentration=min(max(alpha, 1e-290), 1e290) * len(available) * (available / n),
        available=available,
        stops=np.cumsum(available),
        members=np.argsort(labels, kind="stable").astype(np.int64),
    )
    return LazyParts(draw.sizes, draw, np.arange(n))


def _sizes(
    num_clients: int, seed: int, mean: int, sigma: float, most: int
) -> npt.NDArray[np.int64]:
    """Return how many examples each client has, ``[K]``."""
    if sigma == 0:
        return np.broadcast_to(np.int64(mean), num_clients)
    sizes = np.empty(num_clients, np.int64)
    sigma = min(sigma, 30.0)  # From here on everybody has one example; no overflow.
    for begin in range(0, num_clients, AT_ONCE):
        some = range(begin, min(begin + AT_ONCE, num_clients))
        # One hash of the stream's name is two uniform numbers, hence a normal one
        # (G. E. P. Box, M. E. Muller, 1958).
        hashed = keys(seed, Purpose.PARTITION, SIZE, some)
        radius = ((hashed >> np.uint64(32)) + 0.5) * 2.0**-32
        angle = (hashed & np.uint64(0xFFFFFFFF)) * 2.0**-32
        z = np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)
        drawn = np.rint(mean * np.exp(sigma * (z - sigma / 2)))
        sizes[begin : some.stop] = np.clip(drawn, 1, most)
    return sizes


@dataclass(frozen=True)
class _Draw:
    """Draws the examples of one client; all clients share what it holds.

    ``members`` are the example numbers class by class; class c has ``available[c]``
    and ends before ``stops[c]``.
    """

    seed: int
    sizes: npt.NDArray[np.int64]
    concentration: npt.NDArray[np.float64]
    available: Indices
    stops: Indices
    members: Indices

    def __call__(self, client: int) -> Indices:
        rng = generator(self.seed, Purpose.PARTITION, EXAMPLES, client)
        counts = self._counts(int(self.sizes[client]), rng)
        # R. Floyd's way to draw k of m without replacement, for all classes at once:
        # for each j in m - k ... m - 1 draw one of 0 ... j, or j itself if that one is
        # taken.
        ends = np.repeat(
            [self.stops - counts.cumsum(), self.stops - self.available], counts, 1
        )
        first, last = ends[1], ends[0] + np.arange(ends.shape[1])
        drawn = rng.integers(first, last, endpoint=True)
        taken: set[int] = set()
        for one, instead in zip(drawn.tolist(), last.tolist(), strict=True):
            taken.add(instead if one in taken else one)
        places = np.fromiter(taken, np.int64, len(taken))  # LazyParts sorts them.
        return self.members[places]

    def _counts(self, size: int, rng: np.random.Generator) -> Indices:
        """Return how many examples of each class the client has, ``[C]``."""
        shares = self._shares(rng)
        counts = rng.multinomial(size, shares)
        # Each pass fills a class or is the last, and there is place for all.
        while (counts > self.available).any():
            left = int(np.maximum(counts - self.available, 0).sum())
            counts = np.minimum(counts, self.available)
            open_to = np.where(counts < self.available, shares, 0)
            if open_to.sum() < 1e-100:  # None of its classes: then of all that is left.
                open_to = (self.available - counts).astype(float)
            counts = counts + rng.multinomial(left, open_to / open_to.sum())
        return counts

    def _shares(self, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        """Return the client's label shares, ``[C]``."""
        shares: npt.NDArray[np.float64] = rng.dirichlet(self.concentration)
        if abs(shares.sum() - 1) < 1e-6:
            return shares
        # Beyond the range of floating numbers the draw is its own limit.
        everybody: npt.NDArray[np.float64] = self.available / self.available.sum()
        if self.concentration.max() > 1:
            return everybody
        return rng.multinomial(1, everybody).astype(float)
