"""The rows of the updates that are in one place: some clients' local models.

An operation on the updates is carried out where the models are: its arguments can be
sent there, and its answer back. :mod:`~fedweight.core.updates` adds up the answers of
all places.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .extras import is_installed
from .pytorch import torch
from .threads import map_in_order
from .vectors import empty, no_values, plain

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("fedweight")

# So many rows are added up before their sum goes on in float64.
TILE_ROWS = 32


@lru_cache(maxsize=1)
def kernels() -> ModuleType:
    """Import what sums over rows: compiled, or without Numba by PyTorch and NumPy."""
    if is_installed("numba"):
        from . import kernels as compiled

        return compiled
    from . import plain_kernels

    log.warning(
        "Numba is not installed: sums over clients take longer, and differ in their "
        "last bits from those with it. Install fedweight[server]."
    )
    return plain_kernels


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
        self.models = [plain(model, dtype) for model in models]
        self.num_rows = len(self.models)
        sizes = [self.num_rows] if parts is None else parts
        self.is_one_group = len(sizes) == 1 and sizes[0] <= TILE_ROWS
        # What the kernels know of the rows; the list above keeps them alive.
        self._matrix = (
            np.array([model.data_ptr() for model in self.models], np.uint64),
            np.array([*accumulate(sizes, initial=0)]),
            no_values(dtype),
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
        compute = kernels().combine
        first = blocks[0].start
        kind = dtype if self.is_one_group else torch.float64
        total = empty(blocks[-1].stop - first, kind)
        sums, factors = total.numpy(), plain(weights.T, dtype).numpy()

        def add(block: Block) -> None:
            start, stop, tensor = block
            here = sums[start - first : stop - first]
            compute(here, self._matrix, start, factors[tensor])

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
        sums = np.zeros((len(blocks), self.num_rows))
        return self._add_up(kernels().dot, sums, vector, origin, blocks, dtype, threads)

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
        sums = np.zeros((len(blocks), 3, self.num_rows))
        more = plain(own, dtype).numpy()
        return self._add_up(
            kernels().dot_rest, sums, vector, origin, blocks, dtype, threads, more
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
        sums = np.zeros((len(blocks), self.num_rows))
        return self._add_up(
            kernels().distances, sums, point, origin, blocks, dtype, threads, order
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
            o, v = origin[here].numpy(), plain(vector[here], dtype).numpy()
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


def _given(
    vector: Tensor | Sum | None, dtype: torch.dtype
) -> tuple[Tensor, npt.NDArray[Any], float]:
    """Return a vector as the kernels take it: its values, or the weights of a sum."""
    nothing = torch.from_numpy(no_values(dtype))
    if isinstance(vector, Sum):
        return nothing, plain(vector.weights, dtype).numpy(), vector.total_weight
    return nothing if vector is None else vector, no_values(dtype), 0.0


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
