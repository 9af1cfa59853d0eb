"""The local updates of a cohort, as a matrix that a strategy never holds.

With K clients and P parameters, row k is the update ``w_k - w``: what client k's
training added to the global model w. A strategy touches the matrix only through
the few operations of :class:`Updates`, so the same rule runs on rows stacked in
memory and on rows that stay where they were trained.

The rows fall into *parts*, each in one place, and the columns into *blocks*. A
:class:`Rows` answers for the parts in one place, block by block, and adds up what the
parts gave; :class:`Updates` adds up the answers of places and blocks. Both do so in a
fixed order, in float64. So a sum's order depends on the shape of the matrix and on
which rows form a part, and on nothing else: not on the number of threads, not on where
the rows lie.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache, reduce
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import check_choice
from .threads import map_in_order, num_cores, one_thread

Accumulate = Literal["float64", "float32"]

# So many rows are added up before their sum goes on in float64.
TILE_ROWS = 32

# So much of a row is worked on in one call, which a thread does alone.
TILE_BYTES = 1 << 20

# A thread that is alone takes so many of them in one go.
BLOCKS_ALONE = 4

# Where all rows are needed at once, so many columns are.
SHEET_COLUMNS = 8192

# The memory of vectors of at least so many bytes is used again: in each thread one of
# each of so many sizes.
LARGE_BYTES = 1 << 20
KEPT_SIZES = 4

# With more values than this in the rows, all cores share the work by default.
WORTH_THREADS = 1 << 22


# What the kernels are given where there is no vector.
NO_VALUES: dict[torch.dtype, npt.NDArray[Any]] = {
    torch.float32: np.empty(0, np.float32),
    torch.float64: np.empty(0, np.float64),
}

T = TypeVar("T")


class Block(NamedTuple):
    """Some columns, and which named tensor they belong to (0 where it is all one)."""

    start: int
    stop: int
    tensor: int


class Sum(NamedTuple):
    """A weighted sum of the updates that is made where it is needed.

    Attributes
    ----------
    weights : Tensor
        Shape ``[k]``.
    total_weight : float
        The sum of the weights.
    """

    weights: Tensor
    total_weight: float


class Rows:
    """Parts of the updates that are in one place: some clients' models.

    Answers for its own rows only, from arguments that can be sent to another process.

    Parameters
    ----------
    models : Sequence[Tensor] or Tensor
        k vectors ``[P]``, or a matrix ``[k, P]``, floating; read, never changed.
    parts : Sequence[int], optional
        How many rows each part has, where there are several; one part by default.
    """

    def __init__(
        self, models: Sequence[Tensor] | Tensor, parts: Sequence[int] | None = None
    ) -> None:
        double = any(model.dtype == torch.float64 for model in models)
        dtype = torch.float64 if double else torch.float32
        self.models = [_plain(model, dtype) for model in models]
        self.num_rows = len(self.models)
        sizes = [self.num_rows] if parts is None else parts
        self.is_one_group = len(sizes) == 1 and sizes[0] <= TILE_ROWS
        # What the kernels know of the rows; the list above keeps them alive.
        self._matrix = (
            np.array([model.data_ptr() for model in self.models], np.uint64),
            np.array([*accumulate(sizes, initial=0)]),
            NO_VALUES[dtype],
            TILE_ROWS,
        )

    def combine(
        self,
        weights: Tensor,
        blocks: Sequence[Block],
        dtype: torch.dtype,
        threads: int = 1,
    ) -> Tensor:
        """Return the weighted sum of the models, not of the updates.

        Parameters
        ----------
        weights : Tensor
            Shape ``[k, T]``; the block's tensor picks the column.
        blocks : Sequence[Block]
            Which columns, one block after another without a gap.
        dtype : torch.dtype
            What up to ``TILE_ROWS`` rows are summed in; more go on in float64.
        threads : int
            How many threads share out the blocks.

        Returns
        -------
        Tensor
            One value a column; float64 where the rows are several parts, or more than
            ``TILE_ROWS``.
        """
        from . import kernels

        first = blocks[0].start
        kind = dtype if self.is_one_group else torch.float64
        total = empty(blocks[-1].stop - first, kind)
        sums, factors = total.numpy(), _plain(weights.T, dtype).numpy()

        def add(block: Block) -> None:
            start, stop, tensor = block
            here = sums[start - first : stop - first]
            kernels.combine(here, self._matrix, start, factors[tensor])

        map_in_order(add, blocks, threads)
        return total

    def dot(
        self,
        vector: Tensor | Sum,
        origin: Tensor,
        blocks: Sequence[Block],
        dtype: torch.dtype,
        threads: int = 1,
    ) -> Tensor:
        """Return the updates' products with a vector.

        Parameters
        ----------
        vector : Tensor or Sum
            The values in the blocks' columns only; or the sum of the updates that it
            is, if all of them are here.
        origin : Tensor
            The global model in the blocks' columns.
        blocks, dtype, threads
            As for :meth:`combine`.

        Returns
        -------
        Tensor
            Shape ``[blocks, k]``, a block's own sums, float64.
        """
        from .kernels import dot

        sums = np.zeros((len(blocks), self.num_rows))
        return self._add_up(dot, sums, vector, origin, blocks, dtype, threads)

    def dot_rest(
        self,
        vector: Tensor | Sum,
        origin: Tensor,
        own: Tensor,
        blocks: Sequence[Block],
        dtype: torch.dtype,
        threads: int = 1,
    ) -> Tensor:
        """Return products of the updates, and of a vector less a multiple of each.

        Parameters
        ----------
        vector, origin, blocks, dtype, threads
            As for :meth:`dot`.
        own : Tensor
            Shape ``[k]``: the multiples.

        Returns
        -------
        Tensor
            Shape ``[blocks, 3, k]``: with the update u and the rest ``r = vector - own
            u`` the sums of ``u r``, ``u u`` and ``r r``; a block's own, float64.
        """
        from .kernels import dot_rest

        sums = np.zeros((len(blocks), 3, self.num_rows))
        more = _plain(own, dtype).numpy()
        return self._add_up(
            dot_rest, sums, vector, origin, blocks, dtype, threads, more
        )

    def distances(
        self,
        point: Tensor | Sum | None,
        origin: Tensor,
        order: Literal[1, 2],
        blocks: Sequence[Block],
        dtype: torch.dtype,
        threads: int = 1,
    ) -> Tensor:
        """Return the updates' distances from a point, before the root.

        Parameters
        ----------
        point : Tensor or Sum, optional
            As ``vector`` for :meth:`dot`; 0 by default. Like an update, it is
            counted from the global model.
        origin : Tensor
            The global model in the blocks' columns.
        order : {1, 2}
            Sums of absolute values, or of squares.
        blocks, dtype, threads
            As for :meth:`combine`.

        Returns
        -------
        Tensor
            Shape ``[blocks, k]``, a block's own sums, float64.
        """
        from .kernels import distances

        sums = np.zeros((len(blocks), self.num_rows))
        return self._add_up(
            distances, sums, point, origin, blocks, dtype, threads, order
        )

    def _add_up(
        self,
        kernel: Callable[..., None],
        sums: npt.NDArray[np.float64],
        vector: Tensor | Sum | None,
        origin: Tensor,
        blocks: Sequence[Block],
        dtype: torch.dtype,
        threads: int,
        *more: Any,
    ) -> Tensor:
        """Let a kernel add to each block's sums, ``[blocks, ...]``; return them."""
        first = blocks[0].start
        vector, *given = _given(vector, dtype)

        def add(item: tuple[Block, npt.NDArray[np.float64]]) -> None:
            (start, stop, _), own = item
            here = slice(start - first, stop - first)
            o, v = origin[here].numpy(), _plain(vector[here], dtype).numpy()
            kernel(own, self._matrix, start, o, v, *given, *more)

        map_in_order(add, zip(blocks, sums, strict=True), threads)
        return torch.from_numpy(sums)

    def columns(self, start: int, stop: int) -> Tensor:
        """Return some columns of the models, ``[k, stop - start]``."""
        if not self.models:
            return torch.empty(0, stop - start)
        return torch.stack([model[start:stop] for model in self.models])

    def changed(self, origin: Tensor, offsets: Sequence[int]) -> Tensor:
        """Return which named tensors differ from the origin in any model, ``[T]``."""
        return torch.from_numpy(changed_tensors(self.models, origin, offsets))


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
        self.origin = _plain(origin, torch.float64 if double else torch.float32)
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
        """Call a method of every place's :class:`Rows`; yield the answers in order."""

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
        from . import kernels

        weights = weights.to(self.dtype)
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
                    kernels.add(whole, answer)
            # sum_k w_k x_k - (sum_k w_k) x: the rows need no subtraction.
            for start, stop, tensor in span:
                models, here = whole[start - first : stop - first], slice(start, stop)
                kernels.subtract(result[here], models, origin[here], sums[tensor])

        self._map(add, self._spans(per_tensor=weights.ndim == 2))
        return total

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
        return self._products("dot", self._point(vector, weights), ())

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
        _check_shape("own", own, self.num_clients, "row")
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
            near = given[here] if isinstance(given, Tensor) else given
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
            for _, sheet in self.column_blocks():
                total += sheet @ sheet.T
        return total

    def pairwise_distances(self) -> Tensor:
        """Return the Euclidean distances between all pairs of rows: ``[K, K]``.

        Of differences, so that near rows are told apart however long they are.
        """
        total = torch.zeros(self.num_clients, self.num_clients, dtype=torch.float64)
        with one_thread():
            for _, sheet in self.column_blocks():
                between = torch.cdist(
                    sheet, sheet, compute_mode="donot_use_mm_for_euclid_dist"
                )
                total += between.double().square()
        return total.sqrt()

    def column_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the matrix some columns at a time, as ``(columns, [K, block])``.

        For rules that sort or trim coordinate by coordinate.
        """
        for start in range(0, self.num_parameters, SHEET_COLUMNS):
            stop = min(start + SHEET_COLUMNS, self.num_parameters)
            models = torch.empty(self.num_clients, stop - start, dtype=self.dtype)
            answers = self._ask("columns", [(start, stop)] * len(self.members))
            for rows, answer in zip(self.members, answers, strict=True):
                models[rows] = answer.to(self.dtype)
            yield slice(start, stop), models.sub_(self.origin[start:stop])

    def _point(self, point: Tensor | None, weights: Tensor | None) -> Tensor | Sum:
        """Return a point that is given, or the sum of the rows with weights."""
        if (point is None) == (weights is None):
            raise ValueError("give either a vector of parameters or weights")
        if weights is None:
            point = cast(Tensor, point)
            _check_shape("the vector", point, self.num_parameters, "parameter")
            return point
        _check_shape("weights", weights, self.num_clients, "row")
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
            near = vector[here] if isinstance(vector, Tensor) else vector
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
            _check_shape("a model", model, self.num_parameters, "parameter")
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


def _given(
    vector: Tensor | Sum | None, dtype: torch.dtype
) -> tuple[Tensor, npt.NDArray[Any], float]:
    """Return a vector as the kernels take it: its values, or the weights of a sum."""
    nothing = torch.from_numpy(NO_VALUES[dtype])
    if isinstance(vector, Sum):
        return nothing, _plain(vector.weights, dtype).numpy(), vector.total_weight
    return nothing if vector is None else vector, NO_VALUES[dtype], 0.0


def changed_tensors(
    models: Sequence[Tensor], origin: Tensor, offsets: Sequence[int]
) -> npt.NDArray[np.bool_]:
    """Return which named tensors differ from the origin in any model.

    Parameters
    ----------
    models : Sequence[Tensor]
        k vectors ``[P]``, in this process's memory.
    origin : Tensor
        ``[P]``.
    offsets : Sequence[int]
        ``T + 1`` places where the named tensors begin and end.

    Returns
    -------
    ndarray
        Shape ``[T]``; False for a tensor without values.

    Examples
    --------
    >>> origin = torch.tensor([1.0, 2.0, 3.0])
    >>> changed_tensors([torch.tensor([1.0, 5.0, 3.0])], origin, [0, 2, 3]).tolist()
    [True, False]
    """
    found = np.zeros(len(offsets) - 1, np.bool_)
    if not models:
        return found
    full, middles = _middles(tuple(offsets))
    # One value of a tensor tells, nearly always, that a model has changed it.
    differ = models[0].detach().numpy().take(middles) != origin.numpy().take(middles)
    if len(differ) == len(found) and differ.all():
        return differ  # type: ignore[no-any-return]
    found[full] = differ
    for tensor in full[~differ].tolist():
        here = slice(offsets[tensor], offsets[tensor + 1])
        found[tensor] = not all(
            torch.equal(model[here], origin[here]) for model in models
        )
    return found


@lru_cache(maxsize=16)
def _middles(
    offsets: tuple[int, ...],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return which tensors have values, and the place in the middle of each."""
    pairs = list(pairwise(offsets))
    full = [tensor for tensor, (start, stop) in enumerate(pairs) if stop > start]
    middles = [sum(pairs[tensor]) // 2 for tensor in full]
    return np.array(full, np.int64), np.array(middles, np.int64)


def _check_shape(name: str, given: Tensor, size: int, what: str) -> None:
    """Check that a vector has so many values: the kernels would read on."""
    if given.shape != (size,):
        raise ValueError(
            f"{name} must have shape [{size}], a value a {what}, got "
            f"{list(given.shape)}"
        )


def _plain(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values as the kernels take them; without a copy, if they are so."""
    # Asking is quicker than three calls that have nothing to do.
    if values.dtype == dtype and values.is_cpu and values.is_contiguous():
        return values.detach() if values.requires_grad else values
    return values.detach().to("cpu", dtype).contiguous()


def empty(size: int, dtype: torch.dtype) -> Tensor:
    """Return a new vector of any content, where a cache line begins as PyTorch's do.

    A large one is NumPy's memory, because NumPy asks the system for huge pages; and
    that of the last one that was let go, if it fits, because the system would have to
    find and to clear other memory first.
    """
    line, nbytes = 64, size * dtype.itemsize
    if nbytes < LARGE_BYTES:
        return torch.empty(size, dtype=dtype)
    memory = _let_go().pop(nbytes, None)
    if memory is None:
        memory = np.empty(nbytes + line, np.uint8)
    lent = memory[-memory.ctypes.data % line :][:nbytes]
    weakref.finalize(lent, _keep, memory, nbytes).atexit = False
    return torch.from_numpy(lent).view(dtype)


_local = threading.local()


def _let_go() -> dict[Any, npt.NDArray[np.uint8]]:
    """Return the memory that this thread let go of last, by size."""
    kept: dict[Any, npt.NDArray[np.uint8]] = vars(_local)
    return kept


def _keep(memory: npt.NDArray[np.uint8], nbytes: int) -> None:
    kept = _let_go()
    kept[nbytes] = memory
    if len(kept) > KEPT_SIZES:
        del kept[next(iter(kept))]
