"""A model as vectors: one for its trained parameters, one for its floating buffers.

A method of this library reads and writes whole vectors. The names and shapes that
a state dict needs live in a :class:`Layout`.
"""

from __future__ import annotations

import math
from collections.abc import (
    Callable,
    Collection,
    Iterator,
    Mapping,
)
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .errors import AggregationError, ConfigurationError
from .texts import listed

Kind = Literal["parameter", "frozen", "buffer", "integer"]

# Integer tensors by name.
Integers = dict[str, npt.NDArray[Any]]

# Dtypes of weights that are not trained, by how their names begin.
UNFIT = ("bfloat16", "float16", "float8", "float4", "complex")


@dataclass(frozen=True)
class Entry:
    """One named tensor of a model and where its values lie.

    ``start:stop`` counts in the vector of its kind; it is empty for integers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    start: int
    stop: int


@lru_cache(maxsize=64)
def _shared(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """Return the entries that are equal to these and came first."""
    return entries


@dataclass(frozen=True)
class Layout:
    """Names, shapes and places of a model's tensors, in state-dict order.

    Floating tensors that are trained are *parameters*; those that never change are
    *frozen*; those that change without being trained (running statistics) are
    *buffers*; everything else is *integer*.
    """

    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        """Have the same entries as layouts that are equal: they compare quickly."""
        object.__setattr__(self, "entries", _shared(self.entries))

    @classmethod
    def of(
        cls,
        shapes: Mapping[str, tuple[tuple[int, ...], str]],
        buffers: Collection[str],
        frozen: Collection[str] = (),
    ) -> Self:
        """Lay out tensors given as ``name -> (shape, dtype)``."""
        entries = []
        ends: dict[Kind, int] = dict.fromkeys(get_args(Kind), 0)
        for name, (shape, dtype) in shapes.items():
            kind: Kind = "parameter"
            if not np.issubdtype(np.dtype(dtype), np.floating):
                kind = "integer"
            elif name in buffers:
                kind = "buffer"
            elif name in frozen:
                kind = "frozen"
            start = ends[kind]
            if kind != "integer":
                ends[kind] += int(np.prod(shape, dtype=np.int64))
            entries.append(Entry(name, tuple(shape), dtype, kind, start, ends[kind]))
        return cls(tuple(entries))

    @classmethod
    def of_module(cls, module: nn.Module) -> Self:
        """Lay out a module's state dict."""
        buffers = {name for name, _ in module.named_buffers()}
        frozen = {n for n, p in module.named_parameters() if not p.requires_grad}
        shapes = {
            name: (tuple(t.shape), str(t.dtype).removeprefix("torch."))
            for name, t in module.state_dict().items()
        }
        unfit = [
            (name, dtype)
            for name, (_, dtype) in shapes.items()
            if dtype.startswith(UNFIT)
        ]
        for name, dtype in unfit:
            raise ConfigurationError(
                f"model: '{name}' is {dtype}, which Flower's records do not carry or "
                "optimisers do not take. Keep the weights in float32 or float64, and "
                "use autocast to compute in less."
            )
        return cls.of(shapes, buffers, frozen)

    @cached_property
    def parameters(self) -> tuple[Entry, ...]:
        """The trained tensors."""
        return tuple(e for e in self.entries if e.kind == "parameter")

    @cached_property
    def num_parameters(self) -> int:
        """P, the length of the parameter vector."""
        return self._length("parameter")

    @cached_property
    def num_frozen(self) -> int:
        """F, the length of the vector of frozen values."""
        return self._length("frozen")

    @cached_property
    def num_buffers(self) -> int:
        """B, the length of the buffer vector."""
        return self._length("buffer")

    def _length(self, kind: Kind) -> int:
        return max((e.stop for e in self.entries if e.kind == kind), default=0)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """T + 1 places: tensor t of the parameters is ``offsets[t]:offsets[t + 1]``."""
        return (0, *(e.stop for e in self.parameters))

    @cached_property
    def variances(self) -> tuple[Entry, ...]:
        """The buffers that hold variances, which no value below 0 may enter."""
        buffers = (e for e in self.entries if e.kind == "buffer")
        return tuple(e for e in buffers if e.name.rsplit(".", 1)[-1] == "running_var")

    @cached_property
    def num_bytes(self) -> int:
        """The size of a model on the wire, without headers."""
        sizes = (math.prod(e.shape) * np.dtype(e.dtype).itemsize for e in self.entries)
        return sum(sizes)

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the vectors hold: float64 if any tensor is float64, else float32."""
        double = any(e.dtype == "float64" for e in self.entries)
        return torch.float64 if double else torch.float32


@dataclass
class FlatModel:
    """The values of one model: a global model, or what a client trained.

    Attributes
    ----------
    layout : Layout
        What the vectors mean.
    parameters : Tensor
        Shape ``[P]``.
    buffers : Tensor
        Shape ``[B]``; empty for a model without running statistics.
    integers : dict[str, ndarray]
        Integer tensors by name, such as ``num_batches_tracked``.
    frozen : Tensor
        Shape ``[F]``; empty for a model of which everything is trained. All models
        of a run share it.
    """

    layout: Layout
    parameters: Tensor
    buffers: Tensor
    integers: Integers = field(default_factory=dict)
    frozen: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def of_arrays(
        cls,
        arrays: Mapping[str, npt.NDArray[Any]],
        layout: Layout,
        *,
        given: str = "the record",
        expected: str = "the model",
    ) -> FlatModel:
        """Copy named arrays into vectors.

        Parameters
        ----------
        arrays : Mapping[str, ndarray]
            With the layout's names and shapes, in any order.
        layout : Layout
            What is expected.
        given, expected : str
            What an error calls the two.

        Raises
        ------
        AggregationError
            If a tensor is missing, unexpected, or of another shape or kind; the
            message names it.
        """
        missing = [e.name for e in layout.entries if e.name not in arrays]
        unexpected = set(arrays) - {e.name for e in layout.entries}
        if missing or unexpected:
            raise AggregationError(
                f"{given} has other tensors than {expected}: missing "
                f"{listed(map(repr, missing)) or 'none'}, unexpected "
                f"{listed(map(repr, sorted(unexpected))) or 'none'}."
            )
        numpy_dtype = np.float64 if layout.dtype == torch.float64 else np.float32
        vectors = {
            "parameter": np.empty(layout.num_parameters, numpy_dtype),
            "frozen": np.empty(layout.num_frozen, numpy_dtype),
            "buffer": np.empty(layout.num_buffers, numpy_dtype),
        }
        integers = {}
        for e in layout.entries:
            values = arrays[e.name]
            if values.shape != e.shape:
                raise AggregationError(
                    f"'{e.name}' has shape {list(values.shape)} in {given}, and "
                    f"{list(e.shape)} in {expected}."
                )
            number = e.kind != "integer" and values.dtype.kind in "iuf"
            if not number and values.dtype != e.dtype:
                raise AggregationError(
                    f"'{e.name}' has dtype {values.dtype} in {given}, and {e.dtype} in "
                    f"{expected}."
                )
            if e.kind == "integer":
                integers[e.name] = np.array(values)
            else:
                with np.errstate(over="ignore"):  # infinity is found by whoever checks
                    vectors[e.kind][e.start : e.stop] = values.reshape(-1)
        parameters, frozen, buffers = map(torch.from_numpy, vectors.values())
        return cls(layout, parameters, buffers, integers, frozen)

    def named_arrays(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Yield every tensor by name, in state-dict order, in its own dtype."""
        vectors = {
            kind: vector.detach().cpu().numpy() for kind, vector in self._vectors()
        }
        for e in self.layout.entries:
            if e.kind == "integer":
                yield e.name, self.integers[e.name]
            else:
                values = vectors[e.kind][e.start : e.stop].reshape(e.shape)
                yield e.name, values.astype(e.dtype, copy=False)

    def _vectors(self) -> tuple[tuple[Kind, Tensor], ...]:
        return (
            ("parameter", self.parameters),
            ("buffer", self.buffers),
            ("frozen", self.frozen),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy as a PyTorch state dict."""
        return {n: torch.from_numpy(np.array(a)) for n, a in self.named_arrays()}

    def __reduce__(self) -> tuple[Callable[..., FlatModel], tuple[Any, ...]]:
        """Travel as NumPy arrays, which Ray shares between processes."""
        return _flat_model, (
            self.layout,
            self.parameters.detach().cpu().numpy(),
            self.buffers.detach().cpu().numpy(),
            self.integers,
            self.frozen.detach().cpu().numpy(),
        )

    def with_parameters(self, parameters: Tensor) -> FlatModel:
        """Return the same model with other parameters, of the layout's dtype."""
        return replace(self, parameters=parameters.to(self.layout.dtype))

    def laid_out(self, layout: Layout) -> FlatModel:
        """Return the same model in another layout of the same tensors.

        Raises
        ------
        AggregationError
            If it has other tensors.
        """
        if self.layout is layout or self.layout == layout:
            return self
        return FlatModel.of_arrays(dict(self.named_arrays()), layout)


def _flat_model(
    layout: Layout,
    parameters: npt.NDArray[Any],
    buffers: npt.NDArray[Any],
    integers: Integers,
    frozen: npt.NDArray[Any],
) -> FlatModel:
    vectors = as_tensor(parameters), as_tensor(buffers)
    return FlatModel(layout, *vectors, integers, as_tensor(frozen))


def as_tensor(array: npt.NDArray[Any]) -> Tensor:
    """Return a tensor over an array's memory, without a copy, even if read-only.

    Shared memory comes read-only. The library never writes to such a tensor, and
    ``from_numpy`` would warn that one could.
    """
    if array.flags.writeable:
        return torch.from_numpy(array)
    return torch.from_dlpack(array)  # type: ignore[attr-defined]


def is_finite(values: Tensor) -> bool:
    """Tell whether all values are finite; the sum of finite values seldom is not."""
    if not values.numel():
        return True
    return math.isfinite(values.sum().item()) or bool(values.isfinite().all())
