"""Local training of a chunk of clients at once.

The same step as in :mod:`fedweight.clients.training`, batched over clients with
``torch.func`` and traced once to plain tensor operations, so that Python's share does
not grow with the clients. Clients of different sizes share a chunk: a step that is
not full is padded and masked, and a client that is done is set aside.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import ClientError
from ..parameters import Entry, FlatModel, FlatModule, as_tensor
from ..rng import permutation, permutations
from .noise import LocalTraining
from .objectives import Batch, Objective
from .training import LocalOptimizer, LocalResult, Task, TrainingSettings

Step = Callable[..., Any]

# PyTorch traces one function at a time in a process.
TRACING = threading.Lock()


@dataclass(frozen=True)
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
    """

    rows: Tensor
    buffer_rows: Tensor
    integers: dict[str, Tensor]
    losses: Tensor
    correct: Tensor
    num_steps: npt.NDArray[np.int64]


class BatchedTrainer:
    """Trains chunks of clients; keeps what it traced and its buffers.

    Threads may share one: what is traced is the same for all, buffers are each's own.

    Parameters
    ----------
    module : FlatModule
        The architecture.
    objective : Objective
        What is minimised on a batch.
    settings : TrainingSettings
        The optimiser and the size of a batch.
    """

    def __init__(
        self, module: FlatModule, objective: Objective, settings: TrainingSettings
    ) -> None:
        self.module = module
        self.objective = objective
        self.settings = settings
        self.device = module.parameters.device
        layout = module.layout
        trained = {n for n, p in module.module.named_parameters() if p.requires_grad}
        self.parameters = [e for e in layout.parameters if e.name in trained]
        self.frozen = [e for e in layout.parameters if e.name not in trained]
        self.buffers = [e for e in layout.entries if e.kind == "buffer"]
        self.integers = [e for e in layout.entries if e.kind == "integer"]
        self._least = 1  # Fewer examples in a step make the model raise.
        self._steps: dict[tuple[Any, ...], Step] = {}
        self._own = threading.local()
        self._on_device: dict[int, tuple[npt.NDArray[Any], Tensor]] = {}

    def train(
        self,
        start: FlatModel,
        tasks: Sequence[Task],
        *,
        learning_rate: float,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[LocalResult]:
        """Train some clients from the same global model.

        Parameters
        ----------
        start : FlatModel
            The global model as received.
        tasks : Sequence[Task]
            C clients, each with one example or more.
        learning_rate : float
            Of this round.
        cancelled : Callable[[], bool]
            Asked before every step; once it says yes, training raises.

        Returns
        -------
        list[LocalResult]
            In the order of the tasks; the models are rows of one matrix.
        """
        trained = self.train_rows(
            start, tasks, learning_rate=learning_rate, cancelled=cancelled
        )
        rows, buffer_rows = trained.rows.cpu(), trained.buffer_rows.cpu()
        integers = {n: t.cpu().numpy() for n, t in trained.integers.items()}
        losses, correct = trained.losses.tolist(), trained.correct.tolist()
        results = []
        for k, task in enumerate(tasks):
            seen = len(task.examples) * task.epochs
            own = {name: values[k] for name, values in integers.items()}
            model = FlatModel(self.module.layout, rows[k], buffer_rows[k], own)
            num_steps = int(trained.num_steps[k])
            results.append(
                LocalResult(model, losses[k] / seen, correct[k] / seen, num_steps)
            )
        return results

    def train_rows(
        self,
        start: FlatModel,
        tasks: Sequence[Task],
        *,
        learning_rate: float,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> TrainedRows:
        """Train some clients; leave their models on the device, as one matrix.

        The arguments are those of :meth:`train`.
        """
        plan = _Schedule.of(tasks, self.settings.batch_size)
        clients = len(tasks)
        received = start.parameters.to(self.device)
        rows = received.repeat(clients, 1)
        buffer_rows = start.buffers.to(self.device).repeat(clients, 1)
        integers = {
            name: torch.from_numpy(np.array(values))
            .to(self.device)
            .expand(clients, *values.shape)
            .clone()
            for name, values in start.integers.items()
        }
        parameters = _views(rows, self.parameters)
        buffers = _views(buffer_rows, self.buffers)
        counters = [integers[e.name] for e in self.integers]
        frozen = [received[e.start : e.stop].view(e.shape) for e in self.frozen]
        optimizer = LocalOptimizer(self.settings, learning_rate, parameters)
        seeds = torch.tensor([task.noise_key for task in tasks], device=self.device)
        losses = torch.zeros(clients, device=self.device)
        correct = torch.zeros(clients, device=self.device)
        counts = plan.counts.to(self.device)
        done: dict[int, tuple[Tensor, Tensor, dict[str, Tensor]]] = {}
        feed = self._feed(tasks, plan)
        with torch.no_grad():
            for step in range(plan.total):
                if cancelled():
                    raise ClientError("training was cancelled")
                for k in plan.ended(step):
                    done[k] = (
                        rows[k].clone(),
                        buffer_rows[k].clone(),
                        {n: t[k].clone() for n, t in integers.items()},
                    )
                x, y = feed(step)
                mask = plan.mask(step)
                extra = [seeds, torch.tensor(step, device=self.device)]
                if mask is not None:
                    mask = mask.to(self.device)
                    extra.append(mask)
                inputs = [parameters, frozen, buffers, counters, [rows, received]]
                run = self._step([*inputs, [x, y], extra])
                if step == 0:
                    plan.check(self._least)
                gradients, loss, logits = run(*chain(*inputs), x, y, *extra)
                optimizer.step(parameters, gradients)
                hits = logits.argmax(-1) == y
                if mask is not None:
                    hits = hits * mask
                correct += hits.sum(1)
                losses.addcmul_(loss.to(losses.dtype), counts[step])
        for k, (row, buffer_row, own) in done.items():
            rows[k] = row
            buffer_rows[k] = buffer_row
            for name, values in own.items():
                integers[name][k] = values
        return TrainedRows(rows, buffer_rows, integers, losses, correct, plan.steps)

    def _feed(
        self, tasks: Sequence[Task], plan: _Schedule
    ) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Return what gives each step its batch, ``[C, B, ...]`` and ``[C, B]``."""
        if self.device.type != "cpu" and _share_a_home(tasks):
            return self._feed_resident(tasks, plan)
        x_all, y_all = self._buffers_for(tasks, plan)

        def shuffled(step: int) -> tuple[Tensor, Tensor]:
            plan.fill(tasks, step, x_all, y_all)
            x, y = plan.batch(step, x_all, y_all)
            return x.to(self.device), y.to(self.device)

        return shuffled

    def _feed_resident(
        self, tasks: Sequence[Task], plan: _Schedule
    ) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Feed from the whole data set, which stays on the device."""
        data_x, data_y = (
            self._resident(home(array)[0])
            for array in (tasks[0].examples.x, tasks[0].examples.y)
        )
        first = [home(task.examples.x)[1] for task in tasks]
        rows = torch.from_numpy(plan.rows(tasks, first)).to(self.device)

        def gathered(step: int) -> tuple[Tensor, Tensor]:
            return data_x[rows[step]], data_y[rows[step]]

        return gathered

    def _resident(self, array: npt.NDArray[Any]) -> Tensor:
        """Return an array as it lies on the device, where it is put once."""
        if id(array) not in self._on_device:
            self._on_device[id(array)] = (array, as_tensor(array).to(self.device))
        return self._on_device[id(array)][1]

    def _buffers_for(
        self, tasks: Sequence[Task], plan: _Schedule
    ) -> tuple[Tensor, Tensor]:
        """Return ``x [C, S, B, ...]`` and ``y [C, S, B]`` for one pass, to fill."""
        x = as_tensor(tasks[0].examples.x)
        size = (len(tasks), int(plan.per_epoch.max()), plan.batch_size)
        key = (size, x.shape[1:], x.dtype)
        if getattr(self._own, "key", None) != key:
            self._own.key = key
            self._own.x = torch.zeros(*size, *x.shape[1:], dtype=x.dtype)
            self._own.y = torch.zeros(size, dtype=torch.int64)
        return self._own.x, self._own.y

    def _step(self, inputs: list[list[Tensor]]) -> Step:
        """Return the traced step for these shapes: gradients, losses and logits."""
        (x, _), extra = inputs[-2:]
        key = (x.shape, x.dtype, x.is_contiguous(), len(extra))
        if key not in self._steps:
            with TRACING:
                if key not in self._steps:
                    self._steps[key] = self._trace(inputs)
        return self._steps[key]

    def _trace(self, inputs: list[list[Tensor]]) -> Step:
        """Record the step's tensor operations, for these shapes."""
        along: list[int | None] = [0, None, *([0] * (len(inputs[-1]) - 2))]
        batched: Callable[..., Any] = vmap(
            grad_and_value(self._loss, has_aux=True),
            in_dims=(0, None, 0, 0, 0, 0, along),  # Of seeds, the step, perhaps a mask.
        )
        penalised = self._penalty_of(*inputs[4]) is not None

        def flat(*tensors: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
            rest = iter(tensors)
            parts = [[next(rest) for _ in part] for part in inputs]
            *state, (rows, received), (x, y), extra = parts
            gradients, (loss, logits) = batched(*state, x, y, extra)
            if penalised:
                penalties = _views(self._penalty_of(rows, received), self.parameters)
                gradients = [g + p for g, p in zip(gradients, penalties, strict=True)]
            return gradients, loss, logits

        # Buffers change in place as the trace goes: those are copies, with the same
        # strides, which the trace depends on.
        copies = [*inputs[:2], *([_twin(t) for t in p] for p in inputs[2:4])]
        self.module.module.train()
        traced: Any = make_fx(flat)(*chain(*copies, *inputs[4:]))
        traced.graph.eliminate_dead_code()
        traced.recompile()
        step: Step = traced.forward
        return step

    def _penalty_of(self, rows: Tensor, received: Tensor) -> Any:
        """Return the penalty's gradient for each client, ``[C, P]``, or ``None``."""
        if self.objective.penalty_gradient(received, received) is None:
            return None
        return vmap(self.objective.penalty_gradient, in_dims=(0, None))(rows, received)

    def _loss(
        self,
        parameters: list[Tensor],
        frozen: list[Tensor],
        buffers: list[Tensor],
        counters: list[Tensor],
        x: Tensor,
        y: Tensor,
        extra: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return one client's loss on a batch, and its logits."""
        seed, step, *rest = extra
        mask = rest[0] if rest else None
        state = {
            e.name: t
            for entries, tensors in (
                (self.parameters, parameters),
                (self.frozen, frozen),
                (self.buffers, buffers),
                (self.integers, counters),
            )
            for e, t in zip(entries, tensors, strict=True)
        }
        with LocalTraining(seed, step, mask) as noise:
            logits = functional_call(self.module.module, state, (x,))
        self._least = max(self._least, noise.least)
        return self.objective.loss(logits, Batch(x, y, mask)), logits.detach()


@dataclass(frozen=True)
class _Schedule:
    """Who does how many steps, and how full each step is.

    A client's steps follow one another without a gap, whatever the others do: its
    momentum must not notice them.

    Attributes
    ----------
    per_epoch, steps : ndarray
        ``[C]``: a client's steps in one pass, and in all.
    counts : Tensor
        ``[total, C]``: real examples of each client in each step, float32.
    ragged : bool
        Whether any step of any client is not full.
    """

    batch_size: int
    per_epoch: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    counts: Tensor
    ragged: bool

    @classmethod
    def of(cls, tasks: Sequence[Task], batch_size: int) -> _Schedule:
        """Lay out the steps of some clients."""
        sizes = np.array([len(task.examples) for task in tasks])
        per_epoch = -(-sizes // batch_size)
        steps = per_epoch * np.array([task.epochs for task in tasks])
        step = np.arange(steps.max())[:, None]
        left = np.clip(sizes - (step % per_epoch) * batch_size, 0, batch_size)
        counts = left * (step < steps)
        return cls(
            batch_size,
            per_epoch,
            steps,
            torch.from_numpy(counts.astype(np.float32)),
            bool((counts != batch_size).any()),
        )

    @property
    def total(self) -> int:
        """Steps of the chunk."""
        return len(self.counts)

    def check(self, least: int) -> None:
        """Raise if a step has too few examples for the model."""
        if self.ragged and ((self.counts > 0) & (self.counts < least)).any():
            raise ValueError(
                f"Expected more than {least - 1} value per channel when training"
            )

    def ended(self, step: int) -> list[int]:
        """Return the clients whose last step was the one before."""
        return [int(k) for k in np.flatnonzero(self.steps == step)]

    def fill(self, tasks: Sequence[Task], step: int, x: Tensor, y: Tensor) -> None:
        """Shuffle the data of the clients that begin a pass into ``x`` and ``y``."""
        begins = (step % self.per_epoch == 0) & (step < self.steps)
        for k in map(int, np.flatnonzero(begins)):
            task, examples = tasks[k], tasks[k].examples
            n = len(examples)
            epoch = step // int(self.per_epoch[k])
            order = torch.from_numpy(permutation(task.order_key, epoch, n))
            for source, target in ((examples.x, x), (examples.y, y)):
                rows = target[k].flatten(0, 1)[: self.per_epoch[k] * self.batch_size]
                torch.index_select(as_tensor(source), 0, order, out=rows[:n])
                # Padding is masked, but 0 * NaN is NaN: it is the client's own, too.
                rows[n:] = rows[0]

    def rows(
        self, tasks: Sequence[Task], first: Sequence[int]
    ) -> npt.NDArray[np.int64]:
        """Return the row of each example in a common array, ``[total, C, B]``.

        ``first`` is where each client's rows begin; padding points there, too.
        """
        sizes = np.array([len(task.examples) for task in tasks])
        keys = np.array([task.order_key for task in tasks], np.uint64)
        begin = np.asarray(first)
        rows = np.empty((self.total, len(tasks), self.batch_size), np.int64)
        rows[:] = begin[:, None]
        for n in np.unique(sizes):
            alike = np.flatnonzero(sizes == n)
            steps = int(self.per_epoch[alike[0]])
            padded = np.zeros((len(alike), steps * self.batch_size), np.int64)
            for epoch in range(int(self.steps[alike].max()) // steps):
                padded[:, :n] = permutations(keys[alike], epoch, int(n))
                order = padded.reshape(len(alike), steps, self.batch_size)
                place = slice(epoch * steps, (epoch + 1) * steps)
                rows[place, alike] += order.transpose(1, 0, 2)
        return rows

    def batch(self, step: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return a step's batch of every client, ``[C, B, ...]`` and ``[C, B]``."""
        place = step % self.per_epoch
        if (place == place[0]).all():
            return x[:, int(place[0])], y[:, int(place[0])]
        client, at = torch.arange(len(place)), torch.from_numpy(place)
        return x[client, at], y[client, at]

    def mask(self, step: int) -> Tensor | None:
        """Return which places of a step hold an example, ``[C, B]``, float32."""
        if not self.ragged:
            return None
        places = torch.arange(self.batch_size)
        return (places < self.counts[step][:, None]).float()


def _twin(tensor: Tensor) -> Tensor:
    """Return a copy with the same strides."""
    twin = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return twin.copy_(tensor)


def home(array: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], int]:
    """Return the larger array that an array's rows lie in, and where they begin.

    Clients' data are slices of the data set's; an array of its own is its own home.

    Examples
    --------
    >>> everybody = np.zeros((10, 3))
    >>> whole, first = home(everybody[4:6])
    >>> whole is everybody, first
    (True, 4)
    """
    base = array.base
    if (
        isinstance(base, np.ndarray)
        and base.shape[1:] == array.shape[1:]
        and base.strides == array.strides
        and base.dtype == array.dtype
    ):
        offset = array.__array_interface__["data"][0]
        begin = base.__array_interface__["data"][0]
        return base, (offset - begin) // base.strides[0]
    return array, 0


def _share_a_home(tasks: Sequence[Task]) -> bool:
    """Tell whether all clients' examples are rows of the same two arrays."""
    homes = set()
    for task in tasks:
        (x, first_x), (y, first_y) = home(task.examples.x), home(task.examples.y)
        if first_x != first_y:
            return False
        homes.add((id(x), id(y)))
    return len(homes) == 1


def _views(rows: Tensor, entries: Sequence[Entry]) -> list[Tensor]:
    """Return named tensors ``[C, *shape]`` as views of rows ``[C, P]``."""
    return [rows[:, e.start : e.stop].view(len(rows), *e.shape) for e in entries]
