"""A model as vectors: one for its trained parameters, one for its floating buffers.

A method of this library reads and writes whole vectors. The names and shapes that
a state dict needs live in a :class:`Layout`; :class:`FlatRecord` is Flower's
``ArrayRecord`` over such vectors, which makes its arrays only when somebody looks.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import (
    Callable,
    Collection,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from io import BytesIO
from operator import is_
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor, nn

from .errors import AggregationError, ClientError, ConfigurationError
from .texts import listed

Kind = Literal["parameter", "frozen", "buffer", "integer"]

# Integer tensors by name.
Integers = dict[str, npt.NDArray[Any]]

# How BatchNorm and its kin name the running statistics in a state dict. A record
# that came by wire does not say what is trained, so the names have to.
BUFFER_NAMES = ("running_mean", "running_var")

# Dtypes of weights that are not trained, by how their names begin.
UNFIT = ("bfloat16", "float16", "float8", "float4", "complex")

# How NumPy begins the bytes of an array of numbers.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(?P<dtype>[<>|][biufc]\d+)', "
    rb"'fortran_order': (?P<fortran>False|True), "
    rb"'shape': \((?P<shape>|\d+,|\d+(?:, \d+)+)\), \} *\n",
    re.DOTALL,
)
_HEADER_LOCK = threading.Lock()


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
    def of_record(
        cls,
        record: ArrayRecord,
        buffers: Collection[str] | None = None,
        frozen: Collection[str] | None = None,
    ) -> Layout:
        """Lay out a record of arrays.

        Parameters
        ----------
        record : ArrayRecord
            Named arrays, as a state dict gives them.
        buffers : Collection[str], optional
            Names of the floating arrays that change without being trained. By default
            those whose last part is ``running_mean`` or ``running_var``.
        frozen : Collection[str], optional
            Names of the floating arrays that never change; none by default.
        """
        if isinstance(record, FlatRecord) and record.flat is not None:
            return record.flat.layout
        if buffers is None:
            buffers = {n for n in record if n.rsplit(".", 1)[-1] in BUFFER_NAMES}
        shapes = {n: (a.shape, a.dtype) for n, a in record.items()}
        return cls.of(shapes, buffers, frozen or ())

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
        return flatten(FlatRecord(self), layout)


def view(array: Array) -> npt.NDArray[Any]:
    """Read an array of a record without copying it.

    Raises
    ------
    AggregationError
        If the bytes are not a plain NumPy array; objects are never unpickled.
    """
    try:
        shape, fortran, dtype, start = _read_header(array.data)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        if any(length < 0 for length in shape):
            raise ValueError(f"its shape is {shape}")
        count = int(np.prod(shape, dtype=np.int64))
        flat = np.frombuffer(array.data, dtype, count, start)
        values: npt.NDArray[Any] = flat.reshape(shape, order="F" if fortran else "C")
    # NumPy lets Python's parser look at the header, which anybody may have written:
    # any error gets out, RecursionError and MemoryError too.
    except Exception as error:
        raise AggregationError(
            f"an array cannot be read: {type(error).__name__}: {error}."
        ) from error
    return values


def _read_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return an array's shape, Fortran order, dtype, and where its values start.

    NumPy's reader has Python parse the header, in which two threads at once can fail
    (CPython before 3.11.8 and 3.12.2, issue 106905). So what NumPy writes for numbers
    is read here, and anything else by one of our threads at a time.
    """
    usual = _HEADER.match(data)
    if usual and usual.end() == 10 + int.from_bytes(data[8:10], "little"):
        shape = tuple(int(n) for n in usual["shape"].split(b",") if n.strip())
        dtype = np.dtype(usual["dtype"].decode())
        return shape, usual["fortran"] == b"True", dtype, usual.end()
    stream = BytesIO(data)
    with _HEADER_LOCK:
        version = np.lib.format.read_magic(stream)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        return *read(stream), stream.tell()


def flatten(
    record: ArrayRecord,
    layout: Layout,
    *,
    given: str = "the record",
    expected: str = "the model",
) -> FlatModel:
    """Read a record's arrays into vectors.

    Parameters
    ----------
    record : ArrayRecord
        Has the layout's names and shapes, in any order.
    layout : Layout
        What is expected.
    given, expected : str
        What an error calls the two.

    Raises
    ------
    AggregationError
        If a tensor is missing, unexpected, or of another shape or kind; the message
        names it.
    """
    flat = record.flat if isinstance(record, FlatRecord) else None
    if flat is not None and (flat.layout is layout or flat.layout == layout):
        return flat
    missing = [e.name for e in layout.entries if e.name not in record]
    unexpected = set(record) - {e.name for e in layout.entries}
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
        values = view(record[e.name])
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
    return FlatModel(layout, parameters, buffers, integers, frozen)


_MAKING = threading.Lock()


class FlatRecord(ArrayRecord):
    """Flower's ``ArrayRecord`` over a :class:`FlatModel`.

    It is an ordinary record to whoever reads it as one: the arrays are made at the
    first look. Code of ours reads :attr:`flat` and never pays for them. Changing an
    array makes it an ordinary record (``flat`` is ``None`` then). The vectors are
    shared, not copied: nobody may change them in place.
    """

    def __init__(self, flat: FlatModel) -> None:
        super().__init__()
        self.__dict__["_flat"] = flat
        self.__dict__["_made"] = False

    @property
    def flat(self) -> FlatModel | None:
        """The vectors, or ``None`` once somebody has changed an array."""
        value: FlatModel | None = self.__dict__["_flat"]
        return value

    def _make(self) -> None:
        flat = self.flat
        if flat is None or self.__dict__["_made"]:
            return
        with _MAKING:  # Clients that train in several threads read the same record.
            if not self.__dict__["_made"]:
                arrays = [(n, Array(np.asarray(v))) for n, v in flat.named_arrays()]
                self.__dict__["_data"].update(arrays)
                self.__dict__["_made"] = True

    def plain(self) -> ArrayRecord:
        """Return an ordinary ``ArrayRecord`` with the same arrays."""
        return ArrayRecord(dict(self.items()))

    def copy(self) -> Self:
        """Return a shallow copy; the vectors are shared."""
        new = super().copy()
        new.__dict__["_flat"] = self.flat
        new.__dict__["_made"] = self.__dict__["_made"]
        return new

    def __getitem__(self, item: str) -> Array:
        self._make()
        return super().__getitem__(item)

    def __setitem__(self, key: str, value: Array) -> None:
        self._make()
        self.__dict__["_flat"] = None
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self._make()
        self.__dict__["_flat"] = None
        super().__delitem__(key)

    def __iter__(self) -> Iterator[str]:
        self._make()
        return super().__iter__()

    def __len__(self) -> int:
        flat = self.flat
        return super().__len__() if flat is None else len(flat.layout.entries)

    def __contains__(self, key: object) -> bool:
        self._make()
        return super().__contains__(key)

    def __eq__(self, other: object) -> bool:
        self._make()
        if isinstance(other, FlatRecord):
            other._make()
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        self._make()
        return super().__repr__()

    def keys(self) -> KeysView[str]:
        """Return the names."""
        self._make()
        return super().keys()

    def values(self) -> ValuesView[Array]:
        """Return the arrays."""
        self._make()
        return super().values()

    def items(self) -> ItemsView[str, Array]:
        """Return names and arrays."""
        self._make()
        return super().items()

    def deflate(self) -> bytes:
        """Serialise as an ordinary record, so that any Flower node can read it."""
        return self.plain().deflate()

    def __reduce__(self) -> tuple[Callable[..., ArrayRecord], tuple[Any, ...]]:
        flat = self.flat
        if flat is None:
            return ArrayRecord, (dict(self.__dict__["_data"]),)
        return FlatRecord, (flat,)


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


class FlatModule:
    """A module whose parameters and buffers are views of vectors.

    One optimiser step is then a few operations on one vector, and loading a model is
    one copy. The module stays usable as it is.

    Parameters
    ----------
    module : nn.Module
        Its floating tensors become views.
    device : torch.device or str
        Where the vectors live.

    Attributes
    ----------
    parameters, gradients : Tensor
        Shape ``[P]``; ``gradients`` is filled by ``backward``.
    frozen : Tensor
        Shape ``[F]``; parameters that ask for no gradient.
    buffers : Tensor
        Shape ``[B]``.
    """

    def __init__(self, module: nn.Module, device: torch.device | str = "cpu") -> None:
        self.module = module.to(device)
        self._parts = list(module.modules())
        self._modes: dict[bool, list[bool]] = {}
        self.layout = Layout.of_module(module)
        dtype = self.layout.dtype
        sizes = (
            self.layout.num_parameters,
            self.layout.num_frozen,
            self.layout.num_buffers,
        )
        self.parameters, self.frozen, self.buffers = (
            torch.empty(size, dtype=dtype, device=device) for size in sizes
        )
        self.gradients = torch.zeros_like(self.parameters)
        self._integers: dict[str, Tensor] = {}
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        vectors = {
            "parameter": self.parameters,
            "frozen": self.frozen,
            "buffer": self.buffers,
        }
        for e in self.layout.entries:
            tensor = tensors.get(e.name)
            if tensor is None:
                raise ConfigurationError(
                    f"model: '{e.name}' is tied to another parameter. Tied weights "
                    "are not supported: give the model one of the two."
                )
            if e.kind == "integer":
                self._integers[e.name] = tensor
                continue
            if tensor.dtype != dtype:
                raise ConfigurationError(
                    f"model: '{e.name}' is {tensor.dtype}, others are {dtype}. "
                    "All floating tensors must share one dtype."
                )
            place = slice(e.start, e.stop)
            values = vectors[e.kind][place]
            values.copy_(tensor.detach().reshape(-1))
            tensor.data = values.view(e.shape)
            if e.kind == "parameter":
                tensor.grad = self.gradients[place].view(e.shape)
        self._built = _Built(module, [e.name for e in self.layout.parameters])

    def fresh_gradients(self) -> list[bool]:
        """Tell which of the layout's parameters ``backward`` gave a gradient.

        Since this was asked last. One that has none is left alone by ``torch.optim``,
        though a gradient of 0 would make its momentum and weight decay move it.
        """
        return self._built.fresh_gradients()

    def train(self, mode: bool = True) -> None:
        """Let all layers train, or evaluate.

        PyTorch walks through all of them; here it does so only if one of them is not
        as it left it then.
        """
        if self._modes.get(mode) != [part.training for part in self._parts]:
            self.module.train(mode)
            self._modes[mode] = [part.training for part in self._parts]

    def load(self, model: FlatModel) -> None:
        """Copy a model's values in."""
        self._built.reset()
        self.parameters.copy_(model.parameters)
        self.frozen.copy_(model.frozen)
        self.buffers.copy_(model.buffers)
        for name, tensor in self._integers.items():
            tensor.copy_(torch.from_numpy(np.asarray(model.integers[name])))

    def save(self, loaded: FlatModel | None = None) -> FlatModel:
        """Copy the values out, to the CPU.

        Parameters
        ----------
        loaded : FlatModel, optional
            The model that was loaded; the result shares its frozen values.

        Raises
        ------
        ClientError
            If the module's code has put another tensor in the place of a parameter,
            or one of another kind in the place of a buffer, or has changed what is
            frozen.
        """
        self._built.collect()
        if loaded is None:
            frozen = self.frozen.to("cpu", copy=True)
        else:
            frozen = loaded.frozen
            self._check_frozen(frozen)
        return FlatModel(
            self.layout,
            self.parameters.detach().to("cpu", copy=True),
            self.buffers.detach().to("cpu", copy=True),
            {n: t.detach().cpu().numpy().copy() for n, t in self._integers.items()},
            frozen,
        )

    def _check_frozen(self, loaded: Tensor) -> None:
        """Raise ``ClientError`` if a frozen value is not the one that was loaded."""
        own = self.frozen.cpu()
        if torch.equal(own, loaded):
            return
        for e in self.layout.entries:
            place = slice(e.start, e.stop)
            if e.kind == "frozen" and not torch.equal(own[place], loaded[place]):
                raise ClientError(
                    f"model: its code changes '{e.name}', which asks for no gradient, "
                    "and nobody but the client would have that. Make it a buffer, with "
                    "'register_buffer'."
                )


class _Built:
    """A module as it was built, which it is again for every model.

    Its own code may put other tensors in the place of its own. A parameter that is a
    view of a vector has to stay that one; a buffer may be assigned (``self.mean = 0.9 *
    self.mean + ...``), but nobody else's model must find it there. Nor what the code
    keeps in attributes.

    Parameters
    ----------
    module : nn.Module
        Its parameters, gradients and buffers are in their places.
    ordered : Sequence[str]
        The parameters whose gradients are asked for.
    """

    def __init__(self, module: nn.Module, ordered: Sequence[str]) -> None:
        self._module = module
        self._parameters = {name: _Place.of(p) for name, p in module.named_parameters()}
        # Buffers that no model has begin anew with each; and so do attributes.
        self._kept = set(module.state_dict())
        self._others = [
            (buffer, buffer.clone(), buffer._version)
            for name, buffer in module.named_buffers()
            if name not in self._kept
        ]
        # What each module has by name, now and when it was built.
        self._attributes: list[_Names] = []
        self._registered: list[_Names] = []
        for path, part in module.named_modules():
            for kind in ("_parameters", "_modules", "_buffers", ""):
                now = getattr(part, kind) if kind else vars(part)
                if isinstance(now, dict):  # TorchScript has them elsewhere.
                    names = _Names(path, kind, now, dict(now))
                    (self._registered if kind else self._attributes).append(names)
        # Most have no layers or no tensors of their own; they seldom get any.
        self._empty = [names.now for names in self._registered if not names.now]
        self._filled = [names for names in self._registered if names.now]
        self._gradients = [self._parameters[name].grad for name in ordered]
        self._versions = [0] * len(ordered)

    def fresh_gradients(self) -> list[bool]:
        """Tell which parameters' gradients have changed since this was asked last."""
        before = self._versions
        self._versions = [0 if g is None else g._version for g in self._gradients]
        pairs = zip(self._versions, before, strict=True)
        return [now != then for now, then in pairs]

    def reset(self) -> None:
        """Put everything back in its place, for another model."""
        for names in (*self._attributes, *self._changed()):
            if not names.same():
                names.now.clear()
                names.now.update(names.then)
        for place in self._parameters.values():
            place.restore()
        for k, (buffer, values, version) in enumerate(self._others):
            if buffer._version != version:
                buffer.copy_(values)
                self._others[k] = buffer, values, buffer._version

    def collect(self) -> None:
        """Take assigned buffers over into the vectors."""
        for names in self._changed():
            if names.kind == "_buffers":
                self._take(names)
            else:
                every = names.now.keys() | names.then.keys()
                self._refuse(names.named(n) for n in every if names.replaced(n))
        for name, place in self._parameters.items():
            if not place.is_held():
                raise ClientError(
                    f"model: its code gave '{name}' other memory, as '.data = ...' "
                    "does, and training does not reach that. Change a parameter in "
                    "place, as '.data.copy_(...)' does."
                )

    def _changed(self) -> list[_Names]:
        """Return whose layers or tensors are not those that were there."""
        looked_at = self._registered if any(self._empty) else self._filled
        return [names for names in looked_at if not names.same()]

    def _take(self, names: _Names) -> None:
        """Copy the values of a module's buffers to where they belong."""
        new = names.now.keys() - names.then.keys()
        if new:  # A cache, or something that the server's model does not have?
            kept = set(self._module.state_dict())
            self._refuse(kept.intersection(map(names.named, new)))
        for name, own in names.then.items():
            if names.named(name) not in self._kept or not names.replaced(name):
                continue
            found = names.now.get(name)
            kind = own.shape, own.dtype
            if not isinstance(found, Tensor) or (found.shape, found.dtype) != kind:
                raise ClientError(
                    f"model: its code assigned {_describe(found)} to the buffer "
                    f"'{names.named(name)}', which is {_describe(own)}. Assign one of "
                    "the same shape and dtype."
                )
            own.copy_(found.detach())
            names.now[name] = own

    @staticmethod
    def _refuse(names: Iterable[str]) -> None:
        """Refuse what the server's model would not have, or training not reach."""
        for name in sorted(names):
            raise ClientError(
                f"model: its code makes, replaces or removes '{name}' while it runs, "
                "and training does not reach that. Make it once, in '__init__'."
            )


class _Names(NamedTuple):
    """What a module has by name: tensors, layers, or attributes.

    Attributes
    ----------
    path : str
        The module's place in the whole model.
    kind : str
        What PyTorch calls them; empty for attributes.
    now, then : dict[str, Any]
        The module's own dictionary, and what was in it.
    """

    path: str
    kind: str
    now: dict[str, Any]
    then: dict[str, Any]

    def named(self, name: str) -> str:
        """Return a name in the whole model."""
        return f"{self.path}.{name}" if self.path else name

    def replaced(self, name: str) -> bool:
        """Tell whether there is something else under a name."""
        return self.now.get(name) is not self.then.get(name)

    def same(self) -> bool:
        """Tell whether they are the same objects under the same names."""
        now, then = self.now, self.then
        if self.kind in ("_parameters", "_buffers"):
            same = now.keys() == then.keys()
            return same and all(map(is_, now.values(), then.values()))
        try:
            return now == then  # Which looks first whether they are the same objects.
        except Exception:  # Such as two tensors, which are not just equal or not.
            return False


@dataclass
class _Place:
    """A parameter, and the memory and the gradient that it has in our vectors."""

    parameter: Tensor
    values: Tensor
    pointer: int
    grad: Tensor | None

    @classmethod
    def of(cls, parameter: Tensor) -> Self:
        """Take note of where a parameter is."""
        if parameter.grad is not None:
            # By `data` it has a version of its own, which tells when it changes.
            parameter.grad = parameter.grad.data
        values = parameter.data
        return cls(parameter, values, values.data_ptr(), parameter.grad)

    def is_held(self) -> bool:
        """Tell whether the parameter still has them."""
        there = self.parameter.data_ptr() == self.pointer
        return there and self.parameter.grad is self.grad

    def restore(self) -> None:
        """Let the parameter have them again."""
        if not self.is_held():
            self.parameter.data = self.values
            self.parameter.grad = self.grad


def _describe(value: Any) -> str:
    """Return what a message calls the content of a buffer."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} of shape {list(value.shape)}"


def is_finite(values: Tensor) -> bool:
    """Tell whether all values are finite; the sum of finite values seldom is not."""
    if not values.numel():
        return True
    return math.isfinite(values.sum().item()) or bool(values.isfinite().all())
