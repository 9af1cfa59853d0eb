"""The local updates of a cohort, as a matrix that a strategy never holds.

With K clients and P parameters, row k is the update ``w_k - w``: what client k's
training added to the global model w. A strategy touches the matrix only through
the few operations of :class:`Updates`, so the same rule runs on rows stacked in
memory and on rows that stay where they were trained.

The sums have a fixed order. The matrix is cut into tiles whose size depends on
nothing but its shape; each tile is reduced by one thread; the tiles' results are
added in the order of rows and columns, in float64. Threads only share out tiles, so
their number never changes a bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from .errors import check_choice

Accumulate = Literal["float64", "float32"]

# A tile is at most 32 x 8,192 values: about the share of a second-level cache that
# one core has, in float64 and together with its source in float32.
TILE_ROWS = 32
TILE_COLUMNS = 8192

T = TypeVar("T")


class Updates(ABC):
    """Local updates as a matrix ``[K, P]``; row k is client k's ``w_k - w``.

    Rows stand in the order of the round's clients. Vectors over parameters are
    float64 or float32 as ``accumulate`` says, scalars per client always float64.
    """

    num_clients: int
    num_parameters: int
    offsets: tuple[int, ...]

    @property
    def num_tensors(self) -> int:
        """T, the number of named tensors that the P parameters fall into."""
        return len(self.offsets) - 1

    @abstractmethod
    def combine(self, weights: Tensor) -> Tensor:
        """Return the weighted sum of the rows, ``sum_k weights[k] * row_k``.

        Parameters
        ----------
        weights : Tensor
            Shape ``[K]``; or ``[K, T]`` for a weight of its own for each tensor.

        Returns
        -------
        Tensor
            Shape ``[P]``.
        """

    @abstractmethod
    def project(self, vector: Tensor) -> Tensor:
        """Return the inner product of each row with a vector ``[P]``: ``[K]``."""

    @abstractmethod
    def distances(
        self,
        point: Tensor | None = None,
        *,
        order: Literal[1, 2] = 2,
        per_tensor: bool = False,
    ) -> Tensor:
        """Return the distance of each row from a point.

        Parameters
        ----------
        point : Tensor, optional
            Shape ``[P]``; the origin by default, which gives the rows' norms.
        order : {1, 2}
            1 is the sum of absolute differences, 2 the Euclidean distance.
        per_tensor : bool
            Measure in each named tensor on its own.

        Returns
        -------
        Tensor
            Shape ``[K]``, or ``[K, T]`` per tensor. Never negative.
        """

    def norms(self, *, order: Literal[1, 2] = 2, per_tensor: bool = False) -> Tensor:
        """Return the norm of each row: the distance from the origin."""
        return self.distances(order=order, per_tensor=per_tensor)

    @abstractmethod
    def gram(self) -> Tensor:
        """Return the inner products of all pairs of rows: ``[K, K]``."""

    @abstractmethod
    def column_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the matrix some columns at a time, as ``(columns, [K, block])``.

        For rules that sort or trim coordinate by coordinate.
        """

    @abstractmethod
    def select(self, rows: Sequence[int]) -> Updates:
        """Return the updates of some clients only, in the order given."""


class StackedUpdates(Updates):
    """Updates whose rows are in memory, as the local models ``w_k``.

    Parameters
    ----------
    models : Sequence[Tensor]
        K vectors ``[P]``, floating; they are read, never changed.
    origin : Tensor
        The global model w, ``[P]``.
    offsets : Sequence[int], optional
        ``T + 1`` places where the named tensors begin and end; one tensor by default.
    accumulate : {"float64", "float32"}
        What sums inside a tile are made in. Between tiles it is always float64.
    threads : int
        How many threads share out the tiles. It never changes the result.

    Examples
    --------
    >>> models = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])]
    >>> updates = StackedUpdates(models, origin=torch.tensor([1.0, 0.0]))
    >>> updates.combine(torch.tensor([0.5, 0.5])).tolist()
    [1.0, 1.0]
    >>> updates.norms().tolist()
    [2.0, 2.0]
    """

    def __init__(
        self,
        models: Sequence[Tensor],
        origin: Tensor,
        offsets: Sequence[int] | None = None,
        *,
        accumulate: Accumulate = "float64",
        threads: int = 1,
    ) -> None:
        check_choice("accumulate", accumulate, ["float64", "float32"])
        self.models = list(models)
        self.origin = origin
        self.num_clients = len(self.models)
        self.num_parameters = origin.numel()
        self.offsets = tuple(offsets or (0, self.num_parameters))
        self.accumulate = accumulate
        self.dtype = torch.float64 if accumulate == "float64" else torch.float32
        self.threads = threads

    def combine(self, weights: Tensor) -> Tensor:  # noqa: D102
        weights = weights.to(self.dtype)
        total = torch.empty(self.num_parameters, dtype=self.dtype)

        def add(columns: slice, tensor: int) -> None:
            w = weights if weights.ndim == 1 else weights[:, tensor]
            block = torch.zeros(columns.stop - columns.start, dtype=torch.float64)
            for rows, tile in self._tiles(columns):
                block += tile.T @ w[rows]
            total[columns] = block.to(self.dtype)

        self._for_columns(add)
        return total

    def project(self, vector: Tensor) -> Tensor:  # noqa: D102
        vector = vector.to(self.dtype)

        def inner(columns: slice, _: int) -> Tensor:
            v = vector[columns]
            return torch.cat([tile @ v for _, tile in self._tiles(columns)])

        return _sum(self._for_columns(inner), (self.num_clients,))

    def distances(  # noqa: D102
        self,
        point: Tensor | None = None,
        *,
        order: Literal[1, 2] = 2,
        per_tensor: bool = False,
    ) -> Tensor:
        if point is not None:
            point = point.to(self.dtype)

        def measure(columns: slice, tensor: int) -> tuple[int, Tensor]:
            sums = []
            for _, tile in self._tiles(columns):
                if point is not None:
                    tile = tile.sub_(point[columns])
                size = tile.abs_() if order == 1 else tile.square_()
                sums.append(size.sum(1))
            return tensor, torch.cat(sums)

        totals = np.zeros((self.num_tensors, self.num_clients))
        for tensor, sums in self._for_columns(measure):
            totals[tensor] += sums.double().numpy()
        if not per_tensor:
            totals = totals.sum(axis=0, keepdims=True)
        result = torch.from_numpy(totals.T.copy())
        result = result.sqrt() if order == 2 else result
        return result if per_tensor else result[:, 0]

    def gram(self) -> Tensor:  # noqa: D102
        def products(columns: slice, _: int) -> Tensor:
            block = torch.cat([tile for _, tile in self._tiles(columns)])
            return block @ block.T

        shape = (self.num_clients, self.num_clients)
        return _sum(self._for_columns(products), shape)

    def column_blocks(self) -> Iterator[tuple[slice, Tensor]]:  # noqa: D102
        for columns, _ in self._columns():
            yield columns, torch.cat([tile for _, tile in self._tiles(columns)])

    def select(self, rows: Sequence[int]) -> StackedUpdates:  # noqa: D102
        return StackedUpdates(
            [self.models[k] for k in rows],
            self.origin,
            self.offsets,
            accumulate=self.accumulate,
            threads=self.threads,
        )

    def _tiles(self, columns: slice) -> Iterator[tuple[slice, Tensor]]:
        """Yield the updates in some columns, a few rows at a time."""
        origin = self.origin[columns].to(self.dtype)
        for start in range(0, self.num_clients, TILE_ROWS):
            stop = min(start + TILE_ROWS, self.num_clients)
            tile = torch.empty(stop - start, origin.numel(), dtype=self.dtype)
            for k in range(start, stop):
                torch.sub(self.models[k][columns], origin, out=tile[k - start])
            yield slice(start, stop), tile

    def _columns(self) -> Iterator[tuple[slice, int]]:
        """Yield the columns in blocks that do not cross a tensor's border."""
        for tensor in range(self.num_tensors):
            end = self.offsets[tensor + 1]
            for start in range(self.offsets[tensor], end, TILE_COLUMNS):
                yield slice(start, min(start + TILE_COLUMNS, end)), tensor

    def _for_columns(self, work: Callable[[slice, int], T]) -> list[T]:
        """Do the work on every block of columns; the results keep their order."""
        blocks = list(self._columns())
        intra_op = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            if self.threads == 1 or len(blocks) == 1:
                return [work(*block) for block in blocks]
            with ThreadPoolExecutor(self.threads) as pool:
                return list(pool.map(lambda block: work(*block), blocks))
        finally:
            torch.set_num_threads(intra_op)


def _sum(parts: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Add the blocks' results in their order, in float64."""
    total = np.zeros(shape)
    for part in parts:
        total += part.double().numpy()
    return torch.from_numpy(total)
