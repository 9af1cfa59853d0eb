"""Updates whose rows lie on a device, such as a GPU, and are worked on there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from .pytorch import torch
from .updates import SHEET_COLUMNS, Accumulate, Updates
from .vectors import check_shape

if TYPE_CHECKING:
    from torch import Tensor

# So many values of the matrix are worked on in one call.
PIECE_VALUES = 1 << 26

# A matrix of so many values is kept as differences, beside the models; they are made
# anew for every operation where it is larger.
KEPT_VALUES = 1 << 30

# So many columns are added up in the rows' precision; the sums go on in float64.
SUMMED_COLUMNS = 1 << 18


def changed_tensors_of(differ: Tensor, offsets: Sequence[int]) -> Tensor:
    """Return in which named tensors any value differs, ``[T]``, on the CPU.

    Parameters
    ----------
    differ : Tensor
        ``[P]``, bool: which values do.
    offsets : Sequence[int]
        ``T + 1`` places where the named tensors begin and end.
    """
    found = [differ[start:stop].any() for start, stop in pairwise(offsets)]
    return torch.stack(found).cpu()


class DeviceUpdates(Updates):
    """Updates whose rows are on a device, as the local models ``w_k``.

    Differences from the global model are formed first. Nothing is brought to the CPU
    but results, and those only where they are wanted there: what is given on the rows'
    device is answered on it, and nobody waits for it.

    Parameters
    ----------
    models : Sequence[Tensor]
        K vectors ``[P]`` on one device, floating; read, never changed.
    origin, offsets, accumulate
        As for :class:`~fedweight.core.updates.Updates`.

    Notes
    -----
    Sums are made by PyTorch: of 2**18 columns, or of all rows of a piece, in the
    precision of ``accumulate``, as the others in float64. Their last bits are those of
    the device, and the same every time there.
    """

    def __init__(
        self,
        models: Sequence[Tensor],
        origin: Tensor,
        offsets: Sequence[int] | None = None,
        accumulate: Accumulate | None = None,
    ) -> None:
        super().__init__([range(len(models))], origin, offsets, accumulate)
        for model in models:
            check_shape("a model", model, self.num_parameters, "parameter")
        self.models = list(models)
        self.device = self.models[0].device
        self._start = self.origin.to(self.device, self.dtype)
        self._kept: list[tuple[slice, Tensor]] = []

    def _ask(
        self, method: str, arguments: Sequence[tuple[Any, ...]]
    ) -> Iterable[Tensor]:
        assert method == "changed", "all else is made below"
        anywhere = torch.zeros(
            self.num_parameters, dtype=torch.bool, device=self.device
        )
        for _, piece in self._pieces():
            anywhere |= (piece != 0).any(0)
        yield changed_tensors_of(anywhere, self.offsets)

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield some rows at a time, as differences: ``[k, P]``."""
        if self._kept:
            yield from self._kept
            return
        whole = self.num_clients * self.num_parameters <= KEPT_VALUES
        step = max(1, PIECE_VALUES // max(1, self.num_parameters))
        for first in range(0, self.num_clients, step):
            rows = slice(first, min(first + step, self.num_clients))
            models = torch.stack(self.models[rows])
            piece = models.to(self.dtype).sub_(self._start)
            if whole:
                self._kept.append((rows, piece))
            yield rows, piece

    def _spans_of(self, *, per_tensor: bool = False) -> list[tuple[slice, int]]:
        """Return places of columns that are summed together, and whose they are."""
        borders = self.offsets if per_tensor else (0, self.num_parameters)
        return [
            (slice(place, min(place + SUMMED_COLUMNS, stop)), tensor)
            for tensor, (start, stop) in enumerate(pairwise(borders))
            for place in range(start, stop, SUMMED_COLUMNS)
        ]

    def combine(self, weights: Tensor) -> Tensor:  # noqa: D102
        return self._combined(weights).to(weights.device)

    def _combined(self, weights: Tensor) -> Tensor:
        own = weights.to(self.device, self.dtype)
        total = self._zeros(self.num_parameters)
        places = [slice(*place) for place in pairwise(self.offsets)]
        for rows, piece in self._pieces():
            if own.ndim == 1:
                total += torch.mv(piece.T, own[rows])
                continue
            for tensor, here in enumerate(places):
                total[here] += torch.mv(piece[:, here].T, own[rows, tensor])
        return total.to(self.dtype)

    def dot(  # noqa: D102
        self, vector: Tensor | None = None, *, weights: Tensor | None = None
    ) -> Tensor:
        point, wanted = self._there(vector, weights)
        total = self._zeros(self.num_clients)
        for rows, piece in self._pieces():
            for here, _ in self._spans_of():
                total[rows] += torch.mv(piece[:, here], point[here])
        return total.to(wanted)

    def dot_rest(  # noqa: D102
        self,
        vector: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        own: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_shape("own", own, self.num_clients, "row")
        point, wanted = self._there(vector, weights)
        shares = own.to(self.device, self.dtype)
        sums = self._zeros(3, self.num_clients)
        for rows, piece in self._pieces():
            for here, _ in self._spans_of():
                update = piece[:, here]
                rest = point[here] - shares[rows, None] * update
                for which, product in enumerate(
                    (update * rest, update.square(), rest.square())
                ):
                    sums[which, rows] += product.sum(1)
        inner, squares, rest = sums.to(wanted)
        return inner, squares.sqrt(), rest.sqrt()

    def distances(  # noqa: D102
        self,
        point: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        order: Literal[1, 2] = 2,
        per_tensor: bool = False,
    ) -> Tensor:
        wanted, given = torch.device("cpu"), None
        if point is not None or weights is not None:
            given, wanted = self._there(point, weights)
        sums = self._zeros(self.num_clients, self.num_tensors if per_tensor else 1)
        for rows, piece in self._pieces():
            for here, tensor in self._spans_of(per_tensor=per_tensor):
                apart = (
                    piece[:, here] if given is None else piece[:, here] - given[here]
                )
                sizes = apart.abs() if order == 1 else apart.square()
                sums[rows, tensor] += sizes.sum(1)
        sums = sums.to(wanted)
        sums = sums.sqrt() if order == 2 else sums
        return sums if per_tensor else sums[:, 0]

    def sheets(self) -> Iterator[tuple[slice, Tensor]]:  # noqa: D102
        for start in range(0, self.num_parameters, SHEET_COLUMNS):
            stop = min(start + SHEET_COLUMNS, self.num_parameters)
            yield slice(start, stop), self._columns(start, stop)

    def columns(self, start: int, stop: int) -> Tensor:  # noqa: D102
        return self._columns(start, stop).cpu()

    def _columns(self, start: int, stop: int) -> Tensor:
        models = torch.stack([model[start:stop] for model in self.models])
        return models.to(self.dtype).sub_(self._start[start:stop])

    def _there(
        self, vector: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, torch.device]:
        """Return a point on the rows' device, and where the answer is wanted."""
        if (vector is None) == (weights is None):
            raise ValueError("give either a vector of parameters or weights")
        if vector is not None:
            check_shape("the vector", vector, self.num_parameters, "parameter")
            return vector.to(self.device, self.dtype), vector.device
        assert weights is not None
        check_shape("weights", weights, self.num_clients, "row")
        return self._combined(weights), weights.device

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)
