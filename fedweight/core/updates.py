"""The local updates of a cohort, as a matrix that a strategy never holds.

With K clients and P parameters, row k is the update ``w_k - w``: what client k's
training added to the global model w. A strategy touches the matrix only through
the few operations of :class:`Updates`, so the same rule runs on rows stacked in
memory and on rows that stay where they were trained.

The rows fall into *parts*, each in one place, and the columns into *blocks*. A
:class:`~fedweight.core.rows.Rows` answers for the parts in one place, block by block,
and adds up what the parts gave; :class:`Updates` adds up the answers of places and
blocks. Both do so in a fixed order, in float64. So a sum's order depends on the shape
of the matrix and on which rows form a part, and on nothing else: not on the number of
threads, not on where the rows lie.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, reduce
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
import numpy.typing as npt

from .errors import check_choice
from .pytorch import torch
from .rows import TILE_ROWS, Block, Rows, Sum, kernels
from .threads import map_in_order, num_cores, one_thread
from .vectors import check_shape, empty, plain

if TYPE_CHECKING:
    from torch import Tensor

Accumulate = Literal["float64", "float32"]

# So much of a row is worked on in one call, which a thread does alone.
TILE_BYTES = 1 << 20

# A thread that is alone takes so many of them in one go.
BLOCKS_ALONE = 4

# Where all rows are needed at once, so many columns are.
SHEET_COLUMNS = 8192

# With more values than this in the rows, all cores share the work by default.
WORTH_THREADS = 1 << 22

T = TypeVar("T")


class Updates(ABC):
    """Local updates as a matrix ``[K, P]``; row k is client k's ``w_k - w``.

    Rows stand in the order of the round's clients. Vectors over parameters are
    float64 or float32, scalars per client always float64. What an operation returns
    is the caller's, who may change it.

    Parameters
    ----------
    members : Sequence[Sequence[int]]
        Which rows are asked for together: those in one place, or a part of them;
        every row once.
    origin : Tensor
        The global model w, ``[P]``.
    offsets : Sequence[int], optional
        ``T + 1`` places where the named tensors begin and end; one tensor by default.
    accumulate : {"float64", "float32"}, optional
        What sums inside a part and block are made in; by default what the origin is
        in. Between parts and blocks it is always float64.

    Notes
    -----
    In float32 an error is about as large as what rounding to float32 already did to
    the models. A coordinate of :meth:`combine` is off by a few units in the last
    place of the *models'* values there, not of the updates', as it is summed from the
    models; so is the point that :meth:`distances` measure from. Inner products,
    norms and distances are made of differences, never by expanding a square; their
    relative error from summing is about 1e-6. Ask for float64, which takes longer,
    where updates are smaller than a ten-thousandth of the model and matter
    nevertheless.
    """

    columns_at_once: int | None = None
    """So many columns are asked for at once, a multiple of a block's; all by
    default."""

    def __init__(
        self,
        members: Sequence[Sequence[int]],
        origin: Tensor,
        offsets: Sequence[int] | None = None,
        accumulate: Accumulate | None = None,
    ) -> None:
        if accumulate is None:
            accumulate = "float64" if origin.dtype == torch.float64 else "float32"
        check_choice("accumulate", accumulate, ["float64", "float32"])
        self.members = [torch.from_numpy(np.array(rows, np.int64)) for rows in members]
        self.num_clients = sum(map(len, members))
        if sorted(k for rows in members for k in rows) != [*range(self.num_clients)]:
            raise ValueError("every row must be in one part")
        double = origin.dtype == torch.float64
        self.origin = plain(origin, torch.float64 if double else torch.float32)
        self.num_parameters = origin.numel()
        self.offsets = tuple(offsets or (0, self.num_parameters))
        self.accumulate: Accumulate = accumulate
        self.dtype = torch.float64 if accumulate == "float64" else torch.float32

    @property
    def num_tensors(self) -> int:
        """T, the number of named tensors that the P parameters fall into."""
        return len(self.offsets) - 1

    @abstractmethod
    def _ask(
        self, method: str, arguments: Sequence[tuple[Any, ...]]
    ) -> Iterable[Tensor]:
        """Call a method of every place's ``Rows``; yield the answers in order."""

    def _map(
        self, work: Callable[[Sequence[Block]], T], spans: Sequence[Sequence[Block]]
    ) -> list[T]:
        """Ask for every span; with threads, where that helps."""
        return map_in_order(work, spans)

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
        compute = kernels()
        wanted, weights = weights.device, weights.to("cpu", self.dtype)
        by_tensor = weights[:, None] if weights.ndim == 1 else weights
        sums = by_tensor.double().sum(0).tolist()
        shares = [by_tensor[rows] for rows in self.members]
        total = empty(self.num_parameters, self.dtype)
        result, origin = total.numpy(), self.origin.numpy()

        def add(span: Sequence[Block]) -> None:
            arguments = [(share, span, self.dtype) for share in shares]
            first, last = span[0].start, span[-1].stop
            answers = (answer.numpy() for answer in self._ask("combine", arguments))
            if len(shares) == 1:
                [whole] = answers
            else:
                whole = empty(last - first, torch.float64).zero_().numpy()
                for answer in answers:
                    compute.add(whole, answer)
            # sum_k w_k x_k - (sum_k w_k) x: the rows need no subtraction.
            for start, stop, tensor in span:
                models, here = whole[start - first : stop - first], slice(start, stop)
                compute.subtract(result[here], models, origin[here], sums[tensor])

        self._map(add, self._spans(per_tensor=weights.ndim == 2))
        return total.to(wanted)

    def dot(
        self, vector: Tensor | None = None, *, weights: Tensor | None = None
    ) -> Tensor:
        """Return the inner product of each row with a vector: ``[K]``.

        Parameters
        ----------
        vector : Tensor
            Shape ``[P]``.
        weights : Tensor
            Shape ``[K]``, instead of a vector: what :meth:`combine` makes of them is
            the vector. Where the rows are in one place, it is made on the way: they
            are read once.
        """
        given = vector if weights is None else weights
        found = self._products("dot", self._point(vector, weights), ())
        return found if given is None else found.to(given.device)

    def dot_rest(
        self,
        vector: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        own: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hold each row against what a vector has besides a multiple of the row.

        With ``r_k = vector - own[k] * row_k``, which is formed before it is measured.

        Parameters
        ----------
        vector, weights : Tensor
            As for :meth:`dot`.
        own : Tensor
            Shape ``[K]``.

        Returns
        -------
        tuple of Tensor
            ``<row_k, r_k>``, ``|row_k|`` and ``|r_k|``, each ``[K]``.
        """
        check_shape("own", own, self.num_clients, "row")
        shares = [own[rows] for rows in self.members]
        point = self._point(vector, weights)
        inner, squares, rest = self._products("dot_rest", point, (3,), shares)
        return inner, squares.sqrt(), rest.sqrt()

    def distances(
        self,
        point: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        order: Literal[1, 2] = 2,
        per_tensor: bool = False,
    ) -> Tensor:
        """Return the distance of each row from a point.

        Parameters
        ----------
        point : Tensor, optional
            Shape ``[P]``; the origin by default, which gives the rows' norms.
        weights : Tensor, optional
            Shape ``[K]``, instead of a point; as for :meth:`dot`.
        order : {1, 2}
            1 is the sum of absolute differences, 2 the Euclidean distance.
        per_tensor : bool
            Measure in each named tensor on its own.

        Returns
        -------
        Tensor
            Shape ``[K]``, or ``[K, T]`` per tensor. Never negative.
        """
        given = None
        if point is not None or weights is not None:
            given = self._point(point, weights)
        spans = self._spans(per_tensor=per_tensor)

        def measure(span: Sequence[Block]) -> npt.NDArray[np.float64]:
            here = slice(span[0].start, span[-1].stop)
            near = given[here] if isinstance(given, torch.Tensor) else given
            one = (near, self.origin[here], order, span, self.dtype)
            arguments = [one] * len(self.members)
            return self._gather("distances", arguments, (len(span),))

        totals = np.zeros((self.num_tensors if per_tensor else 1, self.num_clients))
        for span, sizes in zip(spans, self._map(measure, spans), strict=True):
            for block, size in zip(span, sizes, strict=True):
                totals[block.tensor] += size
        result = torch.from_numpy(totals.T.copy())
        result = result.sqrt() if order == 2 else result
        return result if per_tensor else result[:, 0]

    def norms(self, *, order: Literal[1, 2] = 2, per_tensor: bool = False) -> Tensor:
        """Return the norm of each row: the distance from the origin."""
        return self.distances(order=order, per_tensor=per_tensor)

    @cached_property
    def changed(self) -> Tensor:
        """Which named tensors any row changes: ``[T]``, bool."""
        arguments = [(self.origin, self.offsets)] * len(self.members)
        return reduce(torch.logical_or, self._ask("changed", arguments))

    def gram(self) -> Tensor:
        """Return the inner products of all pairs of rows: ``[K, K]``."""
        total = torch.zeros(self.num_clients, self.num_clients, dtype=torch.float64)
        with one_thread():
            for _, sheet in self.sheets():
                total = total.to(sheet.device)
                total += sheet @ sheet.T
        return total.cpu()

    def pairwise_distances(self) -> Tensor:
        """Return the Euclidean distances between all pairs of rows: ``[K, K]``.

        Of differences, so that near rows are told apart however long they are.
        """
        total = torch.zeros(self.num_clients, self.num_clients, dtype=torch.float64)
        with one_thread():
            for _, sheet in self.sheets():
                between = torch.cdist(
                    sheet, sheet, compute_mode="donot_use_mm_for_euclid_dist"
                )
                total = total.to(sheet.device)
                total += between.double().square()
        return total.sqrt().cpu()

    def sheets(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield what :meth:`column_blocks` does, where the rows lie."""
        return self.column_blocks()

    def column_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the matrix some columns at a time, as ``(columns, [K, block])``.

        For rules that sort or trim coordinate by coordinate.
        """
        for start in range(0, self.num_parameters, SHEET_COLUMNS):
            stop = min(start + SHEET_COLUMNS, self.num_parameters)
            yield slice(start, stop), self.columns(start, stop)

    def columns(self, start: int, stop: int) -> Tensor:
        """Return some columns of the matrix, ``[K, stop - start]``."""
        models = torch.empty(self.num_clients, stop - start, dtype=self.dtype)
        answers = self._ask("columns", [(start, stop)] * len(self.members))
        for rows, answer in zip(self.members, answers, strict=True):
            models[rows] = answer.to(self.dtype)
        return models.sub_(self.origin[start:stop])

    def _point(self, point: Tensor | None, weights: Tensor | None) -> Tensor | Sum:
        """Return a point that is given, or the sum of the rows with weights."""
        if (point is None) == (weights is None):
            raise ValueError("give either a vector of parameters or weights")
        if weights is None:
            point = cast("Tensor", point).cpu()
            check_shape("the vector", point, self.num_parameters, "parameter")
            return point
        check_shape("weights", weights, self.num_clients, "row")
        if len(self.members) > 1:
            return self.combine(weights)
        weights = weights.to(self.dtype)
        [total] = weights[:, None].double().sum(0).tolist()  # As combine adds them up.
        return Sum(weights[self.members[0]], total)

    def _products(
        self,
        method: str,
        vector: Tensor | Sum,
        shape: tuple[int, ...],
        shares: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Return sums over all columns, ``[*shape, K]``, of products with a vector.

        ``shares`` are one more argument, of each part's own.
        """

        def multiply(span: Sequence[Block]) -> npt.NDArray[np.float64]:
            here = slice(span[0].start, span[-1].stop)
            near = vector[here] if isinstance(vector, torch.Tensor) else vector
            rest = (span, self.dtype)
            arguments = [
                (near, self.origin[here], *own, *rest)
                for own in ([()] * len(self.members) if shares is None else zip(shares))
            ]
            return self._gather(method, arguments, (len(span), *shape))

        total = np.zeros((*shape, self.num_clients))
        for answer in self._map(multiply, self._spans()):
            for block in answer:
                total += block
        return torch.from_numpy(total)

    def _gather(
        self, method: str, arguments: Sequence[tuple[Any, ...]], shape: tuple[int, ...]
    ) -> npt.NDArray[np.float64]:
        """Ask every part; return the answers by row: ``[*shape, K]``."""
        found = np.empty((*shape, self.num_clients))
        answers = self._ask(method, arguments)
        for rows, answer in zip(self.members, answers, strict=True):
            found[..., rows.numpy()] = answer.numpy()
        return found

    def _spans(self, *, per_tensor: bool = False) -> list[list[Block]]:
        """Return the blocks of columns, by what is asked for at once.

        Per tensor, no block crosses a tensor's border.
        """
        width = TILE_BYTES // self.dtype.itemsize
        borders = self.offsets if per_tensor else (0, self.num_parameters)
        blocks = [
            Block(place, min(place + width, stop), tensor)
            for tensor, (start, stop) in enumerate(pairwise(borders))
            for place in range(start, stop, width)
        ]
        at_once = self.columns_at_once
        if at_once is None:
            return [blocks] if blocks else []
        spans: list[list[Block]] = []
        for block in blocks:
            if not spans or block.stop - spans[-1][0].start > at_once:
                spans.append([])
            spans[-1].append(block)
        return spans


class StackedUpdates(Updates):
    """Updates whose rows are in memory, as the local models ``w_k``.

    Parameters
    ----------
    models : Sequence[Tensor] or Tensor
        K vectors ``[P]``, or a matrix ``[K, P]``, floating; read, never changed.
    origin, offsets, accumulate
        As for :class:`Updates`.
    threads : int, optional
        How many threads share out the work; by default as many as there are cores
        where it is worth it. It never changes the result.
    parts : Sequence[Sequence[int]], optional
        Which rows form a part; by default consecutive ones, ``TILE_ROWS`` in each.

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
        models: Sequence[Tensor] | Tensor,
        origin: Tensor,
        offsets: Sequence[int] | None = None,
        *,
        accumulate: Accumulate | None = None,
        threads: int | None = None,
        parts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if parts is None:
            every = range(len(models))
            parts = [every[k : k + TILE_ROWS] for k in every[::TILE_ROWS]]
        in_order = [k for rows in parts for k in rows]
        super().__init__([in_order], origin, offsets, accumulate)
        self.models = list(models)
        if len(self.models) != self.num_clients:
            raise ValueError("every row must be in one part")
        for model in self.models:
            check_shape("a model", model, self.num_parameters, "parameter")
        self.parts = parts
        self.rows = Rows([self.models[k] for k in in_order], [*map(len, parts)])
        if threads is None:
            values = self.num_clients * self.num_parameters
            threads = num_cores() if values > WORTH_THREADS else 1
        self.threads = threads
        blocks = 1 if threads > 1 else BLOCKS_ALONE
        self.columns_at_once = blocks * TILE_BYTES // self.dtype.itemsize

    def _ask(
        self, method: str, arguments: Sequence[tuple[Any, ...]]
    ) -> Iterable[Tensor]:
        [own] = arguments
        yield getattr(self.rows, method)(*own)

    def _map(
        self, work: Callable[[Sequence[Block]], T], spans: Sequence[Sequence[Block]]
    ) -> list[T]:
        return map_in_order(work, spans, self.threads)
