"""The models of several clients as rows of a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from .layout import FlatModel, Layout

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class ModelRows(Sequence[FlatModel]):
    """Models of one layout, a row each; a model is made when it is asked for.

    Rows may lie on a device, such as a GPU; a model has them on the CPU, where all are
    brought when the first one is asked for.

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

    @cached_property
    def _on_cpu(self) -> tuple[Tensor, Tensor]:
        return self.parameters.cpu(), self.buffers.cpu()

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
            {name: np.asarray(values[k]) for name, values in self.integers.items()},
            self.frozen,
        )

    def travelling(self) -> ModelRows:
        """Return the part of them that a round changes."""
        none = self.frozen.new_empty(0)
        return replace(self, layout=self.layout.travelling, frozen=none)
