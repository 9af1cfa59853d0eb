"""The models of several clients as rows of a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from .device_updates import changed_tensors_of
from .layout import Entry, FlatModel, Integers, Layout, is_finite
from .memory import device_memory
from .pytorch import torch

if TYPE_CHECKING:
    from torch import Tensor

# The rows of a cohort stay on a device where they, and their differences from the
# global model, take at most this share of its memory: the rest is to train with.
STAYING_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class ModelRows(Sequence[FlatModel]):
    """Models of one layout, a row each; a model is made when it is asked for.

    Rows may lie on a device, such as a GPU; a model has them on the CPU, where all are
    brought when the first one is asked for. :meth:`there` has them where they lie.

    Attributes
    ----------
    layout : Layout
        The models'.
    parameters, buffers : Tensor
        ``[C, P]`` and ``[C, B]``, where they were trained.
    integers : dict[str, ndarray]
        Integer tensors by name, ``[C, ...]``.
    frozen : Tensor
        ``[F]``: what all of them share.
    """

    layout: Layout
    parameters: Tensor
    buffers: Tensor
    integers: dict[str, npt.NDArray[Any]]
    frozen: Tensor
    _brought: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def is_cpu(self) -> bool:
        """Whether the rows are in this process's memory."""
        return self.parameters.is_cpu

    @property
    def _on_cpu(self) -> tuple[Tensor, Tensor]:
        if not self._brought:
            self._brought[:] = self.parameters.cpu(), self.buffers.cpu()
        parameters, buffers = self._brought
        return parameters, buffers

    @cached_property
    def vectors(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Each model's parameters and buffers, where they lie."""
        return self.parameters.unbind(), self.buffers.unbind()

    @cached_property
    def _looked_at(self) -> npt.NDArray[np.bool_]:
        """What is wrong with the models, ``[1 + V, C]``, brought at once.

        First which are not finite, then which have negative values in a variance.
        """
        vectors = (v for v in (self.parameters, self.buffers) if v.shape[1])
        # The least and the largest value are NaN where any is; and nothing is copied.
        ends = [end for vector in vectors for end in torch.aminmax(vector, dim=1)]
        finite = torch.stack(ends).isfinite().all(0)
        places = [slice(e.start, e.stop) for e in self.layout.variances]
        negative = [self.buffers[:, place].amin(1) < 0 for place in places]
        found: npt.NDArray[np.bool_] = torch.stack([~finite, *negative]).cpu().numpy()
        return found

    def is_finite(self, k: int) -> bool:
        """Tell whether a model is; on a device all are looked at together."""
        if not self.is_cpu:
            return not self._looked_at[0, k]
        return is_finite(self.parameters[k]) and is_finite(self.buffers[k])

    def changed(
        self, places: Sequence[int], start: Tensor, offsets: Sequence[int]
    ) -> npt.NDArray[np.bool_]:
        """Return which named tensors some models change, ``[T]``; look where they lie.

        Parameters
        ----------
        places : Sequence[int]
            Of those models; one or more.
        start : Tensor
            ``[P]``: what they began with.
        offsets : Sequence[int]
            ``T + 1`` places where the named tensors begin and end.
        """
        begun = start.to(self.parameters.device)
        first = self.parameters[places[0]] != begun  # Nearly always one tells.
        found: npt.NDArray[np.bool_] = changed_tensors_of(first, offsets).numpy()
        if found.all():
            return found
        some = self.parameters
        if len(places) < len(self):
            some = some[torch.tensor(places).to(some.device)]
        low, high = torch.aminmax(some, dim=0)
        differ = (low != begun) | (high != begun)
        found = changed_tensors_of(differ, offsets).numpy()
        return found

    def __len__(self) -> int:
        """Return C."""
        return len(self.parameters)

    @overload
    def __getitem__(self, k: int) -> FlatModel: ...
    @overload
    def __getitem__(self, k: slice) -> list[FlatModel]: ...
    def __getitem__(self, k: int | slice) -> FlatModel | list[FlatModel]:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        parameters, buffers = self._on_cpu
        return FlatModel(
            self.layout,
            parameters[k],
            buffers[k],
            self.integers_of(k),
            self.frozen,
        )

    def integers_of(self, k: int) -> Integers:
        """Return a model's integer tensors by name."""
        return {name: np.asarray(values[k]) for name, values in self.integers.items()}

    def there(self) -> list[ModelRow]:
        """Return the models where they lie."""
        return [ModelRow(self, k) for k in range(len(self))]

    def may_stay(self, clients: int) -> bool:
        """Tell whether so many clients' rows leave a device enough of its memory."""
        memory = device_memory(self.parameters.device)
        row = (self.parameters.nbytes + self.buffers.nbytes) / len(self)
        return memory is None or 2 * clients * row <= STAYING_SHARE * memory

    def without(self, some: Tensor) -> ModelRows:
        """Return the models with some parameters, ``[P]`` of bool, set to 0."""
        none = some.to(self.parameters.device)
        parameters = self.parameters.masked_fill(none, 0)
        return replace(self, parameters=parameters, _brought=[])

    def among(self, places: Sequence[int], others: Sequence[FlatModel]) -> ModelRows:
        """Return these in some places, and where they lie others in all the rest.

        Parameters
        ----------
        places : Sequence[int]
            C places, ascending.
        others : Sequence[FlatModel]
            One for each place there is; of those in ``places`` nothing is taken.
        """
        rest = sorted({*range(len(others))} - {*places})
        order = np.argsort([*places, *rest])
        where = torch.from_numpy(order).to(self.parameters.device)

        def joined(own: Tensor, more: list[Tensor]) -> Tensor:
            return torch.cat([own, torch.stack(more).to(own.device)])[where]

        integers = {
            name: np.concatenate(
                [values, np.stack([others[k].integers[name] for k in rest])]
            )[order]
            for name, values in self.integers.items()
        }
        return replace(
            self,
            parameters=joined(self.parameters, [others[k].parameters for k in rest]),
            buffers=joined(self.buffers, [others[k].buffers for k in rest]),
            integers=integers,
            _brought=[],
        )

    def travelling(self) -> ModelRows:
        """Return the part of them that a round changes."""
        none = self.frozen.new_empty(0)
        return replace(self, layout=self.layout.travelling, frozen=none)


@dataclass(frozen=True, slots=True, eq=False)
class ModelRow:
    """One of several models, where it lies; a call brings it to the CPU.

    Attributes
    ----------
    rows : ModelRows
        All of them, which are brought together.
    k : int
        Which one.
    """

    rows: ModelRows
    k: int

    def __call__(self) -> FlatModel:
        """Return it on the CPU."""
        return self.rows[self.k]

    @property
    def parameters(self) -> Tensor:
        """``[P]``, where it lies."""
        return self.rows.vectors[0][self.k]

    @property
    def buffers(self) -> Tensor:
        """``[B]``, where it lies."""
        return self.rows.vectors[1][self.k]

    @property
    def integers(self) -> Integers:
        """Integer tensors by name."""
        return self.rows.integers_of(self.k)

    def is_finite(self) -> bool:
        """Tell whether all values are finite."""
        return self.rows.is_finite(self.k)

    def negative_variances(self) -> list[Entry]:
        """Return the variances that have negative values."""
        if not self.rows.layout.variances:
            return []
        _, *negative = self.rows._looked_at[:, self.k]
        pairs = zip(self.rows.layout.variances, negative, strict=True)
        return [entry for entry, odd in pairs if odd]


# A model that this process holds, wherever.
Held = FlatModel | ModelRow
