"""Codecs: how the parameters that a client sends back are written on the wire.

A simulation sends nothing, but a codec that loses something loses it here, too: what
the server aggregates is what it would have read, and ``bytes_up`` is what it would have
received. Buffers and integer tensors are sent as they are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from ..core.errors import ConfigurationError
from ..core.layout import FlatModel, Layout
from ..core.model_rows import ModelRows
from ..core.options import checked_fields
from ..core.registry import Registry

CODECS = Registry(
    "codec",
    {
        "dense": "fedweight.messages.codecs:Dense",
        "bfloat16": "fedweight.messages.codecs:BFloat16",
        "low-bits": "fedweight.messages.codecs:LowBits",
    },
)

# What gives a client's stream of random numbers.
Draw = Callable[[], np.random.Generator]


class Codec(ABC):
    """How one named tensor is written, of one client or of many at once.

    Attributes
    ----------
    exact : bool
        Whether what is read is what was written, to the bit.
    of_updates : bool
        Whether what training added is written, which the server adds to the model that
        the client had received; else the trained values themselves.
    draws : bool
        Whether it needs random numbers.
    """

    exact: ClassVar[bool] = False
    of_updates: ClassVar[bool] = False

    @property
    def draws(self) -> bool:
        """Whether it needs random numbers."""
        return False

    @abstractmethod
    def as_read(self, values: Tensor, uniform: Tensor | None) -> Tensor:
        """Return what the server reads of what clients write.

        Parameters
        ----------
        values : Tensor
            ``[C, n]``: a tensor of C clients.
        uniform : Tensor, optional
            ``[C, n]``: random numbers in [0, 1), where it needs them.
        """

    @abstractmethod
    def write(self, values: Tensor, uniform: Tensor | None) -> bytes:
        """Return a tensor of one client, ``[n]``, as :meth:`num_bytes` bytes."""

    @abstractmethod
    def read(self, data: bytes, count: int, dtype: torch.dtype) -> Tensor:
        """Return what :meth:`write` wrote, ``[n]``: as :meth:`as_read` says."""

    @abstractmethod
    def num_bytes(self, count: int, itemsize: int) -> int:
        """Return how many bytes a tensor of so many values takes.

        Parameters
        ----------
        count : int
            n, the number of values.
        itemsize : int
            How many bytes one of them has in the model.
        """


@checked_fields
@dataclass(frozen=True)
class Dense(Codec):
    """Every value as it is."""

    exact: ClassVar[bool] = True

    def as_read(self, values: Tensor, uniform: Tensor | None) -> Tensor:  # noqa: D102
        return values

    def write(self, values: Tensor, uniform: Tensor | None) -> bytes:  # noqa: D102
        return _little(values.numpy())

    def read(self, data: bytes, count: int, dtype: torch.dtype) -> Tensor:  # noqa: D102
        return _from_little(data, count, dtype)

    def num_bytes(self, count: int, itemsize: int) -> int:  # noqa: D102
        return count * itemsize


DENSE = Dense()


@checked_fields
@dataclass(frozen=True)
class BFloat16(Codec):
    """Every value as bfloat16, in two bytes: the nearest, of 8 significant bits.

    A model whose weights are bfloat16 loses nothing.
    """

    def as_read(self, values: Tensor, uniform: Tensor | None) -> Tensor:  # noqa: D102
        return values.to(torch.bfloat16).to(values.dtype)

    def write(self, values: Tensor, uniform: Tensor | None) -> bytes:  # noqa: D102
        return _little(values.to(torch.bfloat16).view(torch.int16).numpy())

    def read(self, data: bytes, count: int, dtype: torch.dtype) -> Tensor:  # noqa: D102
        words = _from_little(data, count, torch.int16)
        return words.view(torch.bfloat16).to(dtype)

    def num_bytes(self, count: int, itemsize: int) -> int:  # noqa: D102
        return 2 * count


@checked_fields
@dataclass(frozen=True)
class LowBits(Codec):
    """Updates as whole multiples of a step, in a few bits: uniform quantisation.

    With ``b`` bits and ``L = 2^(b-1) - 1`` an update ``d`` of a named tensor becomes
    ``s * round(d / s)``, where ``s = max|d| / L`` is sent along; so values have one of
    ``2 L + 1`` levels, of which 0 is one: what training leaves alone stays. Rounded to
    the nearest level an update is off by ``s / 2`` at most. Rounded up or down by
    chance, ``s * floor(d / s + u)`` with ``u`` uniform in [0, 1), it is off by less
    than ``s``, and by nothing in expectation (Dan Alistarh et al., "QSGD:
    Communication-Efficient SGD via Gradient Quantization and Encoding", NeurIPS 2017;
    of updates of several steps: Amirhossein Reisizadeh et al., "FedPAQ", AISTATS 2020).

    Parameters
    ----------
    bits : int
        b, of each value; 2 to 16.
    rounding : {"stochastic", "nearest"}
        By chance, from a stream of the client's own in each round, or to the nearest.
    """

    of_updates: ClassVar[bool] = True

    bits: Annotated[int, Field(ge=2, le=16)] = 8
    rounding: Literal["stochastic", "nearest"] = "stochastic"

    @property
    def draws(self) -> bool:
        """Whether values are rounded by chance."""
        return self.rounding == "stochastic"

    @property
    def most(self) -> int:
        """L, the number of levels above 0."""
        return int(2 ** (self.bits - 1) - 1)

    def levels(self, values: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return levels ``[C, n]``, as floating numbers, and the steps, ``[C, 1]``."""
        if not values.shape[1]:
            return values, values.new_zeros(len(values), 1)
        step = values.abs().amax(1, keepdim=True) / self.most
        found = values / torch.where(step > 0, step, 1)
        found = found.round() if uniform is None else (found + uniform).floor()
        # A value that is not finite stays one, and its client is rejected.
        return found.clamp(-self.most, self.most), step

    def as_read(self, values: Tensor, uniform: Tensor | None) -> Tensor:  # noqa: D102
        found, step = self.levels(values, uniform)
        return found * step

    def write(self, values: Tensor, uniform: Tensor | None) -> bytes:  # noqa: D102
        chance = None if uniform is None else uniform[None]
        found, step = self.levels(values[None], chance)
        words = found[0].nan_to_num().to(torch.int64).numpy() + self.most
        bits = words[:, None] >> np.arange(self.bits) & 1
        packed = np.packbits(bits.astype(np.uint8), bitorder="little")
        return _little(step[0].numpy()) + packed.tobytes()

    def read(self, data: bytes, count: int, dtype: torch.dtype) -> Tensor:  # noqa: D102
        step = _from_little(data, 1, dtype)
        packed = np.frombuffer(data, np.uint8, offset=step.element_size())
        bits = np.unpackbits(packed, count=count * self.bits, bitorder="little")
        words = bits.reshape(count, self.bits).astype(np.int64) << np.arange(self.bits)
        found = torch.from_numpy(words.sum(1) - self.most).to(dtype)
        return found.clamp(-self.most, self.most) * step

    def num_bytes(self, count: int, itemsize: int) -> int:  # noqa: D102
        return itemsize + math.ceil(count * self.bits / 8)


def codec(name: str, **options: Any) -> Codec:
    """Make a codec by name, or the user's own by ``"module:Class"``.

    Raises
    ------
    ConfigurationError
        If there is none, or if it is no :class:`Codec`.

    Examples
    --------
    >>> codec("low-bits", bits=4).bits
    4
    """
    made = CODECS.resolve(name)(**options)
    if not isinstance(made, Codec):
        raise ConfigurationError(
            f"codec '{name}' is {type(made).__name__}, which is not derived from "
            "fedweight.messages.codecs.Codec."
        )
    return made


def as_read(
    codec: Codec,
    models: Sequence[FlatModel],
    start: FlatModel,
    draws: Sequence[Draw],
    mask: Tensor | None = None,
) -> Sequence[FlatModel]:
    """Return trained models as the server reads them.

    Parameters
    ----------
    codec : Codec
        How they are written.
    models : Sequence[FlatModel]
        What clients trained.
    start : FlatModel
        The model that they had received.
    draws : Sequence[Callable]
        What gives each client's random numbers.
    mask : Tensor, optional
        ``[P]``; where it is 0 nothing is sent, and the server reads 0.
    """
    if not len(models) or (codec.exact and mask is None):
        return models
    if codec.exact and mask is not None and isinstance(models, ModelRows):
        return models.without(mask.eq(0))  # Where they lie.
    rows, uniform = to_write(codec, models, start, draws)
    if mask is not None:
        rows[:, mask == 0] = 0
    for e in () if codec.exact else start.layout.parameters:
        here = slice(e.start, e.stop)
        part = rows[:, here].to(getattr(torch, e.dtype))
        chance = None if uniform is None else uniform[:, here].to(part)
        rows[:, here] = codec.as_read(part, chance).to(rows)
    if codec.of_updates:
        rows += start.parameters
    pairs = zip(models, rows.unbind(), strict=True)
    return [replace(model, parameters=row) for model, row in pairs]


def to_write(
    codec: Codec, models: Sequence[FlatModel], start: FlatModel, draws: Sequence[Draw]
) -> tuple[Tensor, Tensor | None]:
    """Return what is written of models, ``[C, P]``, and random numbers for it, if any.

    The arguments are those of :func:`as_read`.
    """
    rows = torch.stack([model.parameters for model in models])
    uniform = None
    if codec.draws:
        uniform = torch.empty(rows.shape)
        for row, draw in zip(uniform, draws, strict=True):
            row.copy_(torch.from_numpy(draw().random(len(row), np.float32)))
    if codec.of_updates:
        rows -= start.parameters
    return rows, uniform


def _little(values: npt.NDArray[Any]) -> bytes:
    """Return numbers as bytes, the lowest first."""
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def _from_little(data: bytes, count: int, dtype: torch.dtype) -> Tensor:
    """Return so many numbers that begin some bytes."""
    kind = torch.empty(0, dtype=dtype).numpy().dtype
    found = np.frombuffer(data, kind.newbyteorder("<"), count)
    return torch.from_numpy(found.astype(kind))


def num_bytes(codec: Codec, layout: Layout, mask: Tensor | None = None) -> int:
    """Return how many bytes a model takes.

    Parameters
    ----------
    codec : Codec
        How it is written.
    layout : Layout
        Which tensors there are.
    mask : Tensor, optional
        ``[P]``; where it is 0 nothing is sent.
    """
    trained = 0
    for e in layout.parameters:
        count = e.stop - e.start
        if mask is not None:
            count = int(torch.count_nonzero(mask[e.start : e.stop]))
        trained += codec.num_bytes(count, np.dtype(e.dtype).itemsize)
    rest = Layout(tuple(e for e in layout.entries if e.kind != "parameter"))
    return trained + rest.num_bytes
