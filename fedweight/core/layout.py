"""A model as vectors: one for its trained parameters, one for its floating buffers.

A method of this library reads and writes whole vectors. The names and shapes that
a state dict needs live in a :class:`Layout`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import (
    Callable,
    Collection,
    Iterator,
    Mapping,
)
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from .errors import AggregationError, ConfigurationError
from .pytorch import torch
from .texts import listed

if TYPE_CHECKING:
    from torch import Tensor, nn

Kind = Literal["parameter", "frozen", "buffer", "integer", "tied"]

NOTHING_TIED: Mapping[str, str] = MappingProxyType({})

# Integer tensors by name.
Integers = dict[str, npt.NDArray[Any]]

# Kinds of tensors that need not travel.
STAYING = ("frozen", "tied")

# Dtypes of weights that are not trained, by how their names begin.
UNFIT = ("float16", "float8", "float4", "complex")

# What is carried as another dtype that holds each of its values exactly, since NumPy
# does not have it.
CARRIED_AS = {"bfloat16": "float32"}


@dataclass(frozen=True)
class Entry:
    """One named tensor of a model and where its values lie.

    ``start:stop`` counts in the vector of its kind; it is empty for integers, and for
    another name of the tensor ``of``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    start: int
    stop: int
    of: str = ""


@lru_cache(maxsize=64)
def _shared(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """Return the entries that are equal to these and came first."""
    return entries


def _tied(module: nn.Module) -> dict[str, str]:
    """Return, by name, which other name a tensor of a module has before it."""
    first: dict[int, str] = {}
    kinds = module.named_parameters, module.named_buffers
    kept = module.state_dict()
    named = [
        (name, tensor)
        for of in kinds
        for name, tensor in of(remove_duplicate=False)
        if name in kept
    ]
    return {
        name: before
        for name, tensor in named
        if (before := first.setdefault(id(tensor), name)) != name
    }


@dataclass(frozen=True)
class Layout:
    """Names, shapes and places of a model's tensors, in state-dict order.

    Floating tensors that are trained are *parameters*; those that never change are
    *frozen*; those that change without being trained (running statistics) are
    *buffers*; everything else is *integer*. A further name of one of them is *tied*.
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
        tied: Mapping[str, str] = NOTHING_TIED,
    ) -> Self:
        """Lay out tensors given as ``name -> (shape, dtype)``.

        ``tied`` has, by name, what a tensor is another name of.
        """
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
            of = tied.get(name, "")
            kind = "tied" if of else kind
            start = ends[kind]
            if kind not in ("integer", "tied"):
                ends[kind] += int(np.prod(shape, dtype=np.int64))
            place = start, ends[kind]
            entries.append(Entry(name, tuple(shape), dtype, kind, *place, of))
        return cls(tuple(entries))

    @classmethod
    def of_module(cls, module: nn.Module) -> Self:
        """Lay out a module's state dict."""
        buffers = {name for name, _ in module.named_buffers()}
        frozen = {n for n, p in module.named_parameters() if not p.requires_grad}
        tied = _tied(module)
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
                "optimisers do not take. Keep the weights in float32, float64 or "
                "bfloat16, or use autocast to compute in less."
            )
        shapes = {n: (s, CARRIED_AS.get(d, d)) for n, (s, d) in shapes.items()}
        return cls.of(shapes, buffers, frozen, tied)

    @cached_property
    def travelling(self) -> Layout:
        """The tensors that a round changes, each once: neither frozen nor tied ones.

        The vectors of parameters and buffers mean the same in both. It is this layout
        itself where there are no others.
        """
        entries = tuple(e for e in self.entries if e.kind not in STAYING)
        return self if len(entries) == len(self.entries) else Layout(entries)

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
    def firsts(self) -> dict[str, Entry]:
        """The tensors that others are tied to, by name."""
        names = {e.of for e in self.entries if e.of}
        return {e.name: e for e in self.entries if e.name in names}

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
            elif e.kind != "tied":  # It is what its first name says.
                with np.errstate(over="ignore"):  # infinity is found by whoever checks
                    vectors[e.kind][e.start : e.stop] = values.reshape(-1)
        parameters, frozen, buffers = map(torch.from_numpy, vectors.values())
        return cls(layout, parameters, buffers, integers, frozen)

    def named_arrays(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Yield every tensor by name, in state-dict order, in its own dtype."""
        vectors = {
            kind: vector.detach().cpu().numpy() for kind, vector in self._vectors()
        }
        firsts = self.layout.firsts
        for named in self.layout.entries:
            e = firsts[named.of] if named.of else named
            if e.kind == "integer":
                yield named.name, self.integers[e.name]
            else:
                values = vectors[e.kind][e.start : e.stop].reshape(e.shape)
                yield named.name, values.astype(e.dtype, copy=False)

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

    def is_finite(self) -> bool:
        """Tell whether all values that a round changes are finite."""
        return is_finite(self.parameters) and is_finite(self.buffers)

    def negative_variances(self) -> list[Entry]:
        """Return the variances that have negative values."""
        if not self.layout.variances:
            return []
        places = ((e, self.buffers[e.start : e.stop]) for e in self.layout.variances)
        return [e for e, values in places if bool((values < 0).any())]

    def travelling(self) -> FlatModel:
        """Return the part of it that a round changes; see :attr:`Layout.travelling`."""
        layout = self.layout.travelling
        if layout is self.layout:
            return self
        return replace(self, layout=layout, frozen=self.frozen.new_empty(0))

    @property
    def base(self) -> Base:
        """The other part of it, which no round changes."""
        return Base(self.layout, self.frozen)

    def laid_out(self, layout: Layout) -> FlatModel:
        """Return the same model in another layout of the same tensors.

        Frozen and tied ones may be left out.

        Raises
        ------
        AggregationError
            If it has other tensors.
        """
        if self.layout is layout or self.layout == layout:
            return self
        if self.layout.travelling == layout:
            return self.travelling()
        return FlatModel.of_arrays(dict(self.named_arrays()), layout)


@dataclass(frozen=True, eq=False)
class Base:
    """What of a model no round changes: frozen values, and names of tied tensors.

    Attributes
    ----------
    layout : Layout
        The whole model's.
    frozen : Tensor
        Shape ``[F]``.
    """

    layout: Layout
    frozen: Tensor

    def complete(self, model: FlatModel) -> FlatModel:
        """Return the whole model of which one has the part that travels."""
        return replace(model, layout=self.layout, frozen=self.frozen)

    @cached_property
    def digest(self) -> str:
        """What tells it from any other: 64 hexadecimal digits of SHA-256.

        It is empty for a model of which all travels.
        """
        staying = [e for e in self.layout.entries if e.kind in STAYING]
        if not staying:
            return ""
        found = hashlib.sha256()
        for e in staying:
            found.update(repr((e.name, e.shape, e.dtype, e.kind, e.of)).encode())
        values = self.frozen.detach().cpu().numpy()
        found.update(values.astype(values.dtype.newbyteorder("<"), copy=False).data)
        return found.hexdigest()

    @property
    def alone(self) -> FlatModel:
        """The frozen tensors as a model of their own."""
        frozen = tuple(e for e in self.layout.entries if e.kind == "frozen")
        none = self.frozen.new_empty(0)
        return FlatModel(Layout(frozen), none, none, frozen=self.frozen)


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
