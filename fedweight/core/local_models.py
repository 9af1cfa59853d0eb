"""The local models of a cohort, wherever they are.

A grid of ours need not hand the server every model. What the clients trained may be
held in memory, may stay with the workers that trained it, or may have been added up as
it came, where the strategy weighs clients by data size and needs no more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .device_updates import DeviceUpdates
from .errors import AggregationError
from .layout import FlatModel, Integers, as_tensor, is_finite
from .model_rows import Held, ModelRow, ModelRows
from .pytorch import torch
from .rows import TILE_ROWS
from .threads import one_thread
from .updates import Accumulate, StackedUpdates, Updates

if TYPE_CHECKING:
    from torch import Tensor


class LocalModels(ABC):
    """What the clients of a cohort trained, by node."""

    @abstractmethod
    def updates(
        self,
        nodes: Sequence[int],
        start: FlatModel,
        *,
        accumulate: Accumulate | None = None,
        threads: int | None = None,
    ) -> Updates:
        """Return the updates of some clients' parameters, in the order of the nodes.

        Parameters
        ----------
        nodes : Sequence[int]
            Clients whose models are here.
        start : FlatModel
            The global model that they started from.
        accumulate, threads : optional
            See :class:`~fedweight.core.updates.StackedUpdates`.
        """

    @abstractmethod
    def buffers(self, nodes: Sequence[int], start: FlatModel) -> Updates:
        """Return the updates of some clients' buffers, in the order of the nodes."""

    @abstractmethod
    def integers(self, nodes: Sequence[int]) -> list[Integers]:
        """Return the integer tensors of some clients' models, by name."""

    def bring(self) -> bool:
        """Bring the models that lie on a device to the CPU; tell whether some did."""
        return False


class HeldModels(LocalModels):
    """Models that this process holds, in its memory or on its device.

    Parameters
    ----------
    models : Mapping[int, FlatModel or ModelRow]
        By node.
    parts : Iterable[Sequence[int]], optional
        The nodes whose rows are added up first among themselves; see
        :class:`~fedweight.core.updates.StackedUpdates`.
    """

    def __init__(
        self,
        models: Mapping[int, Held],
        parts: Iterable[Sequence[int]] | None = None,
    ) -> None:
        self.models = models
        self.parts = None if parts is None else list(parts)

    def updates(  # noqa: D102
        self,
        nodes: Sequence[int],
        start: FlatModel,
        *,
        accumulate: Accumulate | None = None,
        threads: int | None = None,
    ) -> Updates:
        return updates_of(
            [self.models[node].parameters for node in nodes],
            start.parameters,
            start.layout.offsets,
            parts=None if self.parts is None else members(self.parts, nodes),
            accumulate=accumulate,
            threads=threads,
        )

    def buffers(self, nodes: Sequence[int], start: FlatModel) -> Updates:  # noqa: D102
        rows = [self.models[node].buffers for node in nodes]
        return updates_of(rows, start.buffers)

    def integers(self, nodes: Sequence[int]) -> list[Integers]:  # noqa: D102
        return [self.models[node].integers for node in nodes]

    def bring(self) -> bool:  # noqa: D102
        there = {n: m for n, m in self.models.items() if isinstance(m, ModelRow)}
        self.models = {**self.models, **{node: row() for node, row in there.items()}}
        return bool(there)


class JoinedModels(LocalModels):
    """Models that different clients have trained from different ones.

    Parameters
    ----------
    parts : Sequence[tuple[Collection[int], LocalModels]]
        Some nodes, and their models; every node in one part.
    """

    def __init__(self, parts: Sequence[tuple[Collection[int], LocalModels]]) -> None:
        self.parts = parts
        self._part = {node: k for k, (some, _) in enumerate(parts) for node in some}

    def updates(  # noqa: D102
        self,
        nodes: Sequence[int],
        start: FlatModel,
        *,
        accumulate: Accumulate | None = None,
        threads: int | None = None,
    ) -> Updates:
        options: dict[str, Any] = {"accumulate": accumulate, "threads": threads}
        parts = self._parts_of(nodes)
        if len(parts) == 1:
            return parts[0][1].updates(nodes, start, **options)
        # Counted from 0 they are the models themselves, without a rounding.
        zero = start.with_parameters(torch.zeros_like(start.parameters))
        rows = {
            n: row for some, models in parts for n, row in _rows(models, some, zero)
        }
        own = [rows[node] for node in nodes]
        return updates_of(own, start.parameters, start.layout.offsets, **options)

    def buffers(self, nodes: Sequence[int], start: FlatModel) -> Updates:  # noqa: D102
        zero = replace(start, buffers=torch.zeros_like(start.buffers))
        rows = {
            node: row
            for some, models in self._parts_of(nodes)
            for node, row in zip(some, _matrix(models.buffers(some, zero)), strict=True)
        }
        return updates_of([rows[node] for node in nodes], start.buffers)

    def integers(self, nodes: Sequence[int]) -> list[Integers]:  # noqa: D102
        found = {
            node: values
            for some, models in self._parts_of(nodes)
            for node, values in zip(some, models.integers(some), strict=True)
        }
        return [found[node] for node in nodes]

    def bring(self) -> bool:  # noqa: D102
        found = [models.bring() for _, models in self.parts]
        return any(found)

    def _parts_of(self, nodes: Sequence[int]) -> list[tuple[list[int], LocalModels]]:
        """Return some nodes part by part."""
        alike: dict[int, list[int]] = {}
        for node in nodes:
            alike.setdefault(self._part[node], []).append(node)
        return [(some, self.parts[k][1]) for k, some in alike.items()]


def _rows(
    models: LocalModels, nodes: Sequence[int], zero: FlatModel
) -> Iterable[tuple[int, Tensor]]:
    return zip(nodes, _matrix(models.updates(nodes, zero)), strict=True)


def updates_of(
    rows: Sequence[Tensor],
    origin: Tensor,
    offsets: Sequence[int] | None = None,
    *,
    parts: Sequence[Sequence[int]] | None = None,
    accumulate: Accumulate | None = None,
    threads: int | None = None,
) -> Updates:
    """Return updates that are worked on where the rows lie, if that is one place.

    The parameters are those of :class:`~fedweight.core.updates.StackedUpdates`; where
    the rows lie on a device there are neither parts nor threads.
    """
    if rows and not all(row.is_cpu for row in rows):
        if len({row.device for row in rows}) == 1:
            return DeviceUpdates(rows, origin, offsets, accumulate)
        rows = _on_cpu(rows)
    how: dict[str, Any] = {"accumulate": accumulate, "threads": threads}
    return StackedUpdates(rows, origin, offsets, parts=parts, **how)


def _on_cpu(rows: Sequence[Tensor]) -> list[Tensor]:
    """Return rows in this process's memory; those of a device are brought at once."""
    found = list(rows)
    for device in {row.device for row in rows}:
        places = [k for k, row in enumerate(rows) if row.device == device]
        if not rows[places[0]].is_cpu:
            brought = torch.stack([rows[k] for k in places]).cpu()
            for k, row in zip(places, brought.unbind(), strict=True):
                found[k] = row
    return found


def _matrix(updates: Updates) -> Tensor:
    """Return all rows, ``[K, P]``, where they lie."""
    sheets = [sheet for _, sheet in updates.sheets()]
    empty = torch.empty(updates.num_clients, 0, dtype=updates.dtype)
    return torch.cat(sheets, 1) if sheets else empty


def moved(
    parts: Sequence[Updates],
    places: Sequence[Sequence[int]],
    model: FlatModel,
    **options: Any,
) -> Updates:
    """Return updates that were made to several models as updates of one.

    Row k is what client k's training added to the model that it began with.

    Parameters
    ----------
    parts : Sequence[Updates]
        The updates of the clients that began with one model each.
    places : Sequence[Sequence[int]]
        Which rows those are.
    model : FlatModel
        What they are added to.
    options
        See :class:`~fedweight.core.updates.StackedUpdates`.
    """
    rows: dict[int, Tensor] = {}
    for updates, some in zip(parts, places, strict=True):
        matrix = _matrix(updates)
        rows |= zip(some, matrix + model.parameters.to(matrix.device), strict=True)
    own = [rows[k] for k in range(len(rows))]
    return updates_of(own, model.parameters, model.layout.offsets, **options)


@dataclass
class ModelSum:
    """Models added up as they come: ``sum_k c_k w_k``, and no model kept.

    Models that are there together are added in their own precision; sums that are
    joined, in float64 and in the order in which they are joined.

    Attributes
    ----------
    coefficients : dict[int, float]
        ``c_k`` by node, 0 or more.
    parameters, buffers : Tensor, optional
        The sums, ``[P]`` and ``[B]``; ``None`` as long as there is nothing in them.
    integers : dict[int, dict[str, ndarray]]
        Each model's integer tensors, by node.
    changed : ndarray, optional
        Which named tensors of the parameters any model changed, ``[T]``, bool; as far
        as somebody has looked.
    """

    coefficients: dict[int, float] = field(default_factory=dict)
    parameters: Tensor | None = None
    buffers: Tensor | None = None
    integers: dict[int, Integers] = field(default_factory=dict)
    changed: npt.NDArray[np.bool_] | None = None

    @classmethod
    def of(
        cls,
        models: Mapping[int, tuple[FlatModel, float]],
        dtype: torch.dtype | None = None,
    ) -> ModelSum:
        """Add up some models, given by node with what each counts.

        In their own precision, unless they are many or another is given.
        """
        total = cls()
        if models:
            own, coefficients = zip(*models.values(), strict=True)
            total.parameters = _sum([m.parameters for m in own], coefficients, dtype)
            total.buffers = _sum([m.buffers for m in own], coefficients, dtype)
            total.coefficients = dict(zip(models, coefficients, strict=True))
            total.integers = {n: m.integers for n, (m, _) in models.items()}
        return total

    @classmethod
    def of_rows(
        cls,
        rows: ModelRows,
        places: Sequence[int],
        coefficients: Mapping[int, float],
        dtype: torch.dtype | None = None,
    ) -> ModelSum:
        """Add up some rows, by their places, as :meth:`of` adds up models.

        They are added up where they lie, and only the sum is brought to the CPU.
        ``coefficients`` has what each counts, by node, in the order of the places.
        """
        total = cls()
        if places:
            counts = [*coefficients.values()]
            parts = rows.parameters, rows.buffers
            sums = [_sum_of_rows(part, places, counts, dtype).cpu() for part in parts]
            total.parameters, total.buffers = sums
            total.coefficients = dict(coefficients)
            if rows.integers:
                pairs = zip(coefficients, places, strict=True)
                total.integers = {node: rows.integers_of(k) for node, k in pairs}
        return total

    def is_finite(self) -> bool:
        """Tell whether the sums are; if not, some model is not, or they overflowed."""
        vectors = (self.parameters, self.buffers)
        return all(is_finite(vector) for vector in vectors if vector is not None)

    def join(self, other: ModelSum) -> None:
        """Add what was added up elsewhere, of other clients."""
        if other.parameters is None or other.buffers is None:
            return
        if other.changed is not None:
            before = self.changed
            self.changed = other.changed if before is None else before | other.changed
        if self.parameters is None or self.buffers is None:
            # A copy: what came from another process may be read-only.
            self.parameters = other.parameters.to(torch.float64, copy=True)
            self.buffers = other.buffers.to(torch.float64, copy=True)
        else:
            self.parameters.add_(other.parameters)
            self.buffers.add_(other.buffers)
        self.integers |= other.integers
        self.coefficients |= other.coefficients

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as NumPy arrays, which Ray shares between processes."""
        vectors = [self.parameters, self.buffers]
        arrays = [None if v is None else v.detach().cpu().numpy() for v in vectors]
        return _model_sum, (self.coefficients, self.integers, self.changed, *arrays)


def _model_sum(
    coefficients: dict[int, float],
    integers: dict[int, Integers],
    changed: npt.NDArray[np.bool_] | None,
    *arrays: npt.NDArray[Any] | None,
) -> ModelSum:
    parameters, buffers = (
        None if array is None else as_tensor(array) for array in arrays
    )
    return ModelSum(coefficients, parameters, buffers, integers, changed)


def _sum(
    rows: Sequence[Tensor], coefficients: Sequence[float], dtype: torch.dtype | None
) -> Tensor:
    """Return ``sum_k c_k row_k``."""
    if dtype is not None:
        return _sum_of_few(rows, coefficients, dtype)
    parts = [
        _sum_of_few(rows[k : k + TILE_ROWS], coefficients[k : k + TILE_ROWS])
        for k in range(0, len(rows), TILE_ROWS)
    ]
    return parts[0] if len(parts) == 1 else _sum(parts, [1] * len(parts), torch.float64)


def _sum_of_few(
    rows: Sequence[Tensor],
    coefficients: Sequence[float],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return ``sum_k c_k row_k``; in the rows' own precision by default."""
    if not rows[0].numel():
        return torch.zeros_like(rows[0], dtype=dtype)
    matrix = _together(rows) if dtype is None else None
    if matrix is not None:  # One product instead of a sum over rows.
        return torch.mv(matrix.T, matrix.new_tensor(coefficients))
    total = torch.zeros_like(rows[0], dtype=dtype)
    for row, coefficient in zip(rows, coefficients, strict=True):
        total.add_(row, alpha=coefficient)
    return total


def _sum_of_rows(
    matrix: Tensor,
    places: Sequence[int],
    coefficients: Sequence[float],
    dtype: torch.dtype | None,
) -> Tensor:
    """Return what :func:`_sum` does of some rows of a matrix ``[C, n]``, to the bit."""
    if not matrix.numel():
        return torch.zeros_like(matrix[0], dtype=dtype)
    whole = len(places) == len(matrix) and matrix.is_contiguous()
    if dtype is not None or not whole:
        return _sum([matrix[k] for k in places], coefficients, dtype)
    counts = matrix.new_tensor(coefficients)
    tiles = [slice(k, k + TILE_ROWS) for k in range(0, len(matrix), TILE_ROWS)]
    parts = [torch.mv(matrix[tile].T, counts[tile]) for tile in tiles]
    return parts[0] if len(parts) == 1 else _sum(parts, [1] * len(parts), torch.float64)


def _together(rows: Sequence[Tensor]) -> Tensor | None:
    """Return rows that follow one another in memory as the matrix that they are."""
    first, size = rows[0], rows[0].numel()
    begin, step = first.data_ptr(), size * first.element_size()
    places = range(begin, begin + len(rows) * step, step)
    if [row.data_ptr() for row in rows] != list(places):
        return None
    place = first.storage_offset() * first.element_size()
    if first.untyped_storage().nbytes() < place + len(rows) * step:
        return None
    return first.as_strided((len(rows), size), (size, 1))


class SummedModels(LocalModels):
    """Models of which only the weighted sum is left.

    Parameters
    ----------
    total : ModelSum
        The sum, and what each client counts in it.
    """

    def __init__(self, total: ModelSum) -> None:
        self.total = total

    def updates(  # noqa: D102
        self,
        nodes: Sequence[int],
        start: FlatModel,
        *,
        accumulate: Accumulate | None = None,
        threads: int | None = None,
    ) -> Updates:
        assert self.total.parameters is not None
        updates = self._updates(
            nodes, start.parameters, self.total.parameters, start.layout.offsets
        )
        if self.total.changed is not None:
            updates.changed = as_tensor(self.total.changed)
        return updates

    def buffers(self, nodes: Sequence[int], start: FlatModel) -> Updates:  # noqa: D102
        assert self.total.buffers is not None
        return self._updates(nodes, start.buffers, self.total.buffers)

    def integers(self, nodes: Sequence[int]) -> list[Integers]:  # noqa: D102
        return [self.total.integers[node] for node in nodes]

    def _updates(
        self,
        nodes: Sequence[int],
        origin: Tensor,
        total: Tensor,
        offsets: Sequence[int] | None = None,
    ) -> SummedUpdates:
        if set(nodes) != set(self.total.coefficients):
            raise AggregationError(
                "the clients' models were added up as they came, but the clients to "
                "aggregate are not those in the sum"
            )
        coefficients = [self.total.coefficients[node] for node in nodes]
        return SummedUpdates(total, coefficients, origin, offsets)


class SummedUpdates(Updates):
    """Updates whose rows were added up; one weighted sum of them is known.

    Parameters
    ----------
    total : Tensor
        ``sum_k c_k w_k``, ``[P]``.
    coefficients : Sequence[float]
        ``c_k``, K of them.
    origin : Tensor
        The global model w, ``[P]``.
    offsets : Sequence[int], optional
        See :class:`~fedweight.core.updates.StackedUpdates`.
    """

    def __init__(
        self,
        total: Tensor,
        coefficients: Sequence[float],
        origin: Tensor,
        offsets: Sequence[int] | None = None,
    ) -> None:
        super().__init__([range(len(coefficients))], origin, offsets)
        self.total = total
        self.coefficients = torch.tensor(coefficients, dtype=torch.float64)

    def combine(self, weights: Tensor) -> Tensor:
        """Return the weighted sum of the rows, for the weights that were summed.

        Raises
        ------
        AggregationError
            If the weights are not proportional to the coefficients.
        """
        weights = weights.to(torch.float64)
        whole, known = weights.sum().item(), self.coefficients.sum().item()
        if weights.shape != self.coefficients.shape or not _close(
            weights.detach().numpy() * known, self.coefficients.numpy() * whole
        ):
            raise self._not_kept("weights other than those that they were summed with")
        if not known:
            return torch.zeros_like(self.origin)
        with one_thread():
            models = self.total * (whole / known)
            return models.sub_(self.origin, alpha=whole).to(self.origin.dtype)

    def _ask(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> Iterable[Any]:
        raise self._not_kept(f"'{method}'")

    def _not_kept(self, what: str) -> AggregationError:
        return AggregationError(
            f"the clients' models were added up as they came, by data size, which does "
            f"not allow {what}"
        )


def _close(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> bool:
    """Tell whether values are the same but for their last digits."""
    return bool((np.abs(one - other) <= 1e-9 * np.abs(other)).all())


def middle(several: Sequence[Integers]) -> Integers:
    """Return the integer tensors in the middle of some clients', element by element.

    Integers are never averaged. Of an even number of values it is the lower one of the
    two in the middle: from three clients on, a single one does not decide.

    Examples
    --------
    >>> middle([{"n": np.array(k)} for k in (7, 8, 900)])
    {'n': array(8)}
    """
    found = {}
    for name in several[0]:
        ordered = np.sort(np.stack([one[name] for one in several]), axis=0)
        found[name] = np.asarray(ordered[(len(several) - 1) // 2])
    return found


def members(parts: Iterable[Sequence[int]], nodes: Sequence[int]) -> list[list[int]]:
    """Return which places of ``nodes`` lie in which part.

    Nodes that are in no part make one of their own; parts without any are left out.

    Examples
    --------
    >>> members([[7, 5], [6], [4]], [5, 6, 7])
    [[0, 2], [1]]
    """
    place = {node: k for k, node in enumerate(nodes)}
    found = [sorted(place.pop(n) for n in part if n in place) for part in parts]
    return [part for part in [*found, list(place.values())] if part]
