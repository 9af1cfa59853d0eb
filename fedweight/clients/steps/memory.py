"""What the steps of a chunk of clients start from and change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...core.layout import FlatModel
from ._torch.cuda_graphs import Replayed
from .carried import Carried
from .step import Step
from .task import Tasks


@dataclass
class TrainedRows:
    """What C clients trained, on the device where they did.

    Attributes
    ----------
    rows, buffer_rows : Tensor
        ``[C, P]`` and ``[C, B]``.
    integers : dict[str, Tensor]
        Integer tensors by name, ``[C, ...]``.
    losses, correct : Tensor
        ``[C]``: sums over all examples that training met.
    num_steps : ndarray
        ``[C]``.
    carried : Carried
        What they carry.
    """

    rows: Tensor
    buffer_rows: Tensor
    integers: dict[str, Tensor]
    losses: Tensor
    correct: Tensor
    num_steps: npt.NDArray[np.int64]
    carried: Carried

    @property
    def of_clients(self) -> list[Tensor]:
        """All that a step changes of a client, ``[C, ...]`` each."""
        carry = self.carried.carry.values()
        return [self.rows, self.buffer_rows, *self.integers.values(), *carry]


@dataclass(frozen=True)
class ChunkState:
    """What the steps of a chunk start from, and what they change.

    Attributes
    ----------
    received, frozen : Tensor
        ``[P]`` and ``[F]``: the global model's parameters, trained and frozen.
    rate : Tensor
        0-d: the learning rate.
    trained : TrainedRows
        So far; the number of steps is not known yet.
    """

    received: Tensor
    frozen: Tensor
    rate: Tensor
    trained: TrainedRows

    @classmethod
    def of(
        cls,
        start: FlatModel,
        tasks: Tasks,
        rate: float,
        carried: Carried,
        device: torch.device,
    ) -> ChunkState:
        """Give every client the model that it begins with."""
        clients = len(tasks)
        received, buffers, integers = _on(device, start)
        trained = TrainedRows(
            _copies(received, clients),
            _copies(buffers, clients),
            {name: _copies(values, clients) for name, values in integers.items()},
            torch.zeros(clients, device=device),
            torch.zeros(clients, device=device),
            np.zeros(clients, np.int64),
            carried,
        )
        own_rate = torch.tensor(rate, dtype=received.dtype, device=device)
        frozen = start.frozen.to(device, copy=True)
        _give_own(trained, tasks)
        return cls(received, frozen, own_rate, trained)

    def begin(
        self, start: FlatModel, tasks: Tasks, rate: float, carried: Carried
    ) -> None:
        """Do the same again, in the same memory."""
        received, buffers, integers = _on(self.received.device, start)
        self.received.copy_(received)
        self.frozen.copy_(start.frozen)
        self.rate.fill_(rate)
        self.trained.rows.copy_(received)
        self.trained.buffer_rows.copy_(buffers)
        for name, values in integers.items():
            self.trained.integers[name].copy_(values)
        self.trained.losses.zero_()
        self.trained.correct.zero_()
        pairs = zip(self.trained.carried.tensors, carried.tensors, strict=True)
        for own, given in pairs:
            own.copy_(given)
        _give_own(self.trained, tasks)


@dataclass
class ChunkMemory:
    """What chunks of one number of clients use again, and the graphs over it.

    Attributes
    ----------
    state : ChunkState
        Begun anew by each chunk.
    """

    state: ChunkState
    _examples: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = field(
        default_factory=dict
    )
    _batches: dict[tuple[Any, ...], list[Tensor]] = field(default_factory=dict)
    _steps: dict[tuple[int, int, bool], Replayed] = field(default_factory=dict)

    def examples(
        self, size: Sequence[int], like: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return ``x [*size, ...]`` and ``y [*size, ...]``, to fill."""
        key = kind_of_buffer(size, like)
        if key not in self._examples:
            self._examples[key] = allocate_examples(size, like)
        return self._examples[key]

    def in_place(self, batch: list[Tensor]) -> list[Tensor]:
        """Put a batch where graphs expect it; examples may be there already."""
        x, y, *_ = batch
        there = any(x is kept for kept, _ in self._examples.values())
        key = there, x.shape, x.dtype, len(batch)
        if key not in self._batches:
            new = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in batch]
            self._batches[key] = [x, y, *new[2:]] if there else new
        for kept, values in zip(self._batches[key], batch, strict=True):
            if kept is not values:
                kept.copy_(values)
        return self._batches[key]

    def replayed(self, step: Step, batch: Sequence[Tensor], descends: bool) -> Replayed:
        """Return a step as a graph over this memory, and over a batch put in it."""
        key = batch[0].data_ptr(), len(batch), descends
        if key not in self._steps:
            self._steps[key] = Replayed(step)
        return self._steps[key]


def _give_own(trained: TrainedRows, tasks: Tasks) -> None:
    """Let clients that begin with a model of their own have it."""
    for k, own in enumerate(tasks.own or ()):
        if own is not None:
            trained.rows[k] = own.parameters
            trained.buffer_rows[k] = own.buffers
            for name, values in own.integers.items():
                trained.integers[name][k] = torch.from_numpy(np.asarray(values))


def _copies(values: Tensor, clients: int) -> Tensor:
    """Return a tensor once for each client, ``[C, ...]``; quicker than ``repeat``."""
    if not values.numel():
        return values.new_empty((clients, *values.shape))
    return values.expand(clients, *values.shape).clone(
        memory_format=torch.contiguous_format
    )


def _on(
    device: torch.device, model: FlatModel
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return a model's parameters, buffers and integers on a device."""
    integers = {
        name: torch.from_numpy(np.array(values)).to(device)
        for name, values in model.integers.items()
    }
    return model.parameters.to(device), model.buffers.to(device), integers


def kind_of_buffer(size: Sequence[int], like: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
    """Return what :func:`allocate_examples` depends on, but for the device."""
    x, y = like
    return tuple(size), x.shape[1:], x.dtype, y.shape[1:], y.dtype


def allocate_examples(
    size: Sequence[int], like: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return ``x [*size, ...]`` and ``y [*size, ...]``, where those of ``like`` are."""
    x, y = (t.new_zeros((*size, *t.shape[1:])) for t in like)
    return x, y
