"""The local updates of a cohort, as a matrix that a strategy never holds.

With K clients and P parameters, row k is the update ``w_k - w``: what client k's
training added to the global model w. A strategy touches the matrix only through
the few operations of :class:`Updates`, so the same rule runs on rows stacked in
memory and on rows that stay where they were trained.

The sums have a fixed order. The matrix is cut into tiles whose size depends on
nothing but its shape and dtype; each tile is reduced by one thread; the tiles'
results are added in the order of rows and columns, in float64. Threads only share
out tiles, so their number never changes a bit. Nor does where the rows lie: each is
read on its own, whether it is a vector of its own or a row of one matrix.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice, pairwise
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from .errors import check_choice

Accumulate = Literal["float64", "float32"]

# So many rows are added up before their sum goes on in float64.
TILE_ROWS = 32

# So much of a row is worked on at once. Smaller blocks would stay nearer to the core,
# but each costs some calls, which outweigh that; larger ones gain nothing more.
TILE_BYTES = 1 << 20

# Where a tile holds all rows, it has so many columns.
SHEET_COLUMNS = 8192

T = TypeVar("T")


class Updates(ABC):
    """Local updates as a matrix ``[K, P]``; row k is client k's ``w_k - w``.

    Rows stand in the order of the round's clients. Vectors over parameters are
    float64 or float32, scalars per client always float64. What an operation returns
    is the caller's, who may change it.
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

    def project_and_norms(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Return :meth:`project` and the Euclidean :meth:`norms`, cheaper together."""
        return self.project(vector), self.norms()

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
    accumulate : {"float64", "float32"}, optional
        What sums inside a tile are made in; by default what the models are in.
        Between tiles it is always float64.
    threads : int
        How many threads share out the tiles. It never changes the result.

    Notes
    -----
    In float32 an error is about as large as what rounding to float32 already did to
    the models. A coordinate of :meth:`combine` is off by a few units in the last
    place of the *models'* values there, not of the updates', as it is summed from the
    models; so is the point that :meth:`distances` measure from. Inner products,
    norms and distances are made of differences, never by expanding a square; their
    relative error from summing is about 1e-6. Ask for float64 where updates are
    smaller than a ten-thousandth of the model and matter nevertheless; it takes two
    to three times as long.

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
        accumulate: Accumulate | None = None,
        threads: int = 1,
    ) -> None:
        if accumulate is None:
            double = origin.dtype == torch.float64
            accumulate = "float64" if double else "float32"
        check_choice("accumulate", accumulate, ["float64", "float32"])
        self.models = list(models)
        self.origin = origin
        self.num_clients = len(self.models)
        self.num_parameters = origin.numel()
        self.offsets = tuple(offsets or (0, self.num_parameters))
        self.accumulate: Accumulate = accumulate
        self.dtype = torch.float64 if accumulate == "float64" else torch.float32
        self.threads = threads

    def combine(self, weights: Tensor) -> Tensor:  # noqa: D102
        weights = weights.to(self.dtype)
        by_tensor = weights[:, None] if weights.ndim == 1 else weights
        factors = by_tensor.T.tolist()
        sums = by_tensor.double().sum(0).tolist()
        total = _empty(self.num_parameters, self.dtype)

        def add(columns: slice, tensor: int) -> None:
            # sum_k w_k x_k - (sum_k w_k) x: the rows need no subtraction.
            tile = _scratch("tile", columns, self.dtype)
            tile.copy_(self.origin[columns]).mul_(-sums[tensor])
            weighted = zip(self.models, factors[tensor], strict=True)
            for model, w in islice(weighted, TILE_ROWS):
                tile.add_(model[columns], alpha=w)
            if self.num_clients > TILE_ROWS:
                whole = _scratch("whole", columns, torch.float64).copy_(tile)
                while rows := tuple(islice(weighted, TILE_ROWS)):
                    tile.zero_()
                    for model, w in rows:
                        tile.add_(model[columns], alpha=w)
                    whole.add_(tile)
                tile = whole
            total[columns] = tile

        self._for_blocks(add, per_tensor=weights.ndim == 2)
        return total

    def project(self, vector: Tensor) -> Tensor:  # noqa: D102
        return self._inner(vector, norms=False)[0]

    def project_and_norms(self, vector: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        inner, squares = self._inner(vector, norms=True)
        return inner, squares.sqrt()

    def distances(  # noqa: D102
        self,
        point: Tensor | None = None,
        *,
        order: Literal[1, 2] = 2,
        per_tensor: bool = False,
    ) -> Tensor:
        def measure(columns: slice, tensor: int) -> tuple[int, Tensor]:
            start = _scratch("start", columns, self.dtype).copy_(self.origin[columns])
            if point is not None:
                start.add_(point[columns])
            difference = _scratch("tile", columns, self.dtype)
            sizes = torch.empty(self.num_clients, dtype=self.dtype)
            for model, size in zip(self.models, sizes.unbind(), strict=True):
                torch.sub(model[columns], start, out=difference)
                if order == 1:
                    torch.sum(difference.abs_(), 0, out=size)
                else:
                    torch.dot(difference, difference, out=size)
            return tensor, sizes

        totals = np.zeros((self.num_tensors if per_tensor else 1, self.num_clients))
        for tensor, sizes in self._for_blocks(measure, per_tensor=per_tensor):
            totals[tensor] += sizes.double().numpy()
        result = torch.from_numpy(totals.T.copy())
        result = result.sqrt() if order == 2 else result
        return result if per_tensor else result[:, 0]

    def gram(self) -> Tensor:  # noqa: D102
        shape = (self.num_clients, self.num_clients)

        def products(columns: slice, _: int) -> Tensor:
            total = torch.zeros(shape, dtype=torch.float64)
            for part in _cut(columns.start, columns.stop, SHEET_COLUMNS):
                sheet = self._sheet(part)
                total += sheet @ sheet.T
            return total

        return _sum(self._for_blocks(products), shape)

    def column_blocks(self) -> Iterator[tuple[slice, Tensor]]:  # noqa: D102
        for columns in _cut(0, self.num_parameters, SHEET_COLUMNS):
            yield columns, self._sheet(columns)

    def select(self, rows: Sequence[int]) -> StackedUpdates:  # noqa: D102
        return StackedUpdates(
            [self.models[k] for k in rows],
            self.origin,
            self.offsets,
            accumulate=self.accumulate,
            threads=self.threads,
        )

    def _inner(self, vector: Tensor, *, norms: bool) -> Tensor:
        """Return the rows' products with a vector, and with themselves: ``[2, K]``."""

        def multiply(columns: slice, _: int) -> Tensor:
            start = _scratch("start", columns, self.dtype).copy_(self.origin[columns])
            # A copy, because a product's bits may depend on where its factors begin.
            v = _scratch("vector", columns, self.dtype).copy_(vector[columns])
            update = _scratch("tile", columns, self.dtype)
            products = torch.zeros(2, self.num_clients, dtype=self.dtype)
            inner, squares = (part.unbind() for part in products)
            for k, model in enumerate(self.models):
                torch.sub(model[columns], start, out=update)
                torch.dot(update, v, out=inner[k])
                if norms:
                    torch.dot(update, update, out=squares[k])
            return products

        return _sum(self._for_blocks(multiply), (2, self.num_clients))

    def _sheet(self, columns: slice) -> Tensor:
        """Return the updates in some columns, all rows."""
        start = self.origin[columns].to(self.dtype)
        sheet = torch.empty(self.num_clients, start.numel(), dtype=self.dtype)
        for model, row in zip(self.models, sheet.unbind(), strict=True):
            torch.sub(model[columns], start, out=row)
        return sheet

    def _for_blocks(
        self, work: Callable[[slice, int], T], *, per_tensor: bool = False
    ) -> list[T]:
        """Do the work on every block of columns; the results keep their order.

        Per tensor, no block crosses a tensor's border, and the work is told which
        tensor it is; else that is 0.
        """
        borders = self.offsets if per_tensor else (0, self.num_parameters)
        blocks = [
            (columns, tensor)
            for tensor, (start, stop) in enumerate(pairwise(borders))
            for columns in _cut(start, stop, TILE_BYTES // self.dtype.itemsize)
        ]
        intra_op = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            if self.threads == 1 or len(blocks) == 1:
                return [work(*block) for block in blocks]
            pool = _pool(self.threads, os.getpid())
            return list(pool.map(lambda block: work(*block), blocks))
        finally:
            torch.set_num_threads(intra_op)


def _empty(size: int, dtype: torch.dtype) -> Tensor:
    """Return a new vector of any content, where a cache line begins as PyTorch's do.

    NumPy's memory, because NumPy asks the system for huge pages: where the vector is
    large, it is there in a fraction of the time.
    """
    line = 64
    memory = torch.from_numpy(np.empty(size * dtype.itemsize + line, np.uint8))
    skip = -memory.data_ptr() % line
    return memory[skip : skip + size * dtype.itemsize].view(dtype)


_scratches = threading.local()


def _scratch(name: str, columns: slice, dtype: torch.dtype) -> Tensor:
    """Return this thread's own memory for a block of columns, of any content.

    Memory asked for anew would be cleared by the system at each block's first touch,
    at a tenth of the whole operation's cost and more.
    """
    size = columns.stop - columns.start
    kept: dict[str, Tensor] = vars(_scratches)
    key = f"{name} {dtype}"
    if key not in kept or kept[key].numel() < size:
        kept[key] = torch.empty(size, dtype=dtype)
    return kept[key][:size]


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return this process's pool of so many threads, each without threads of its own.

    PyTorch's number of threads is a thread's own; all start now, while the caller's
    is one.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="fedweight-updates")
    started = threading.Barrier(threads)

    def start(_: int) -> None:
        torch.set_num_threads(1)
        started.wait()

    list(pool.map(start, range(threads)))
    return pool


def _cut(start: int, stop: int, width: int) -> Iterator[slice]:
    """Cut a range of columns into slices of a width; the last may be narrower."""
    for place in range(start, stop, width):
        yield slice(place, min(place + width, stop))


def _sum(parts: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Add the blocks' results in their order, in float64."""
    total = np.zeros(shape)
    for part in parts:
        total += part.double().numpy()
    return torch.from_numpy(total)
