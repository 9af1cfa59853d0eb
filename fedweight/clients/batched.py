"""Local training of a chunk of clients at once.

The same step as in :mod:`fedweight.clients.training`, batched over clients with
``torch.vmap`` and traced once to plain tensor operations, so that Python's share does
not grow with the clients. Clients of different sizes share a chunk: a step that is
not full is padded and masked, and a client that is done is set aside.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.func import functional_call, vmap

from ..core.batches import num_batches
from ..core.errors import ClientError
from ..core.layout import Entry, FlatModel, as_tensor
from ..core.module import FlatModule
from ..core.rng import permutations
from .cross_entropy import OfLabels
from .graphs import (
    Recorder,
    Replayed,
    drop_idle,
    drop_unused,
    fuse_descent,
    gather,
    grad,
    has_few_operations,
    plain_attention,
    plain_execution,
    several,
    without_python,
)
from .noise import STREAMS, LocalTraining
from .objectives import Batch, Objective
from .optimizers import LocalOptimizer, Rate, clip_each
from .settings import TrainingSettings
from .training import LocalResult, Task

log = logging.getLogger("fedweight")

Step = Callable[..., Any]

# A learning rate of all clients, or one of each.
Rates = float | Sequence[float]

# Returns examples of a size, to fill, like a tensor of them.
Allocate = Callable[[Sequence[int], Tensor], tuple[Tensor, Tensor]]

# So many steps are made in one call, where what a call costs shows: a step has few
# operations, and the models of a chunk have no more than so many values.
SEVERAL = 4
SMALL = 1 << 23

# On a GPU the memory of chunks of so many sizes is kept.
KEPT_SIZES = 4

# Data stay on a GPU if they take no more than this share of what is free there.
SHARE_OF_DATA = 0.5


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
    """

    rows: Tensor
    buffer_rows: Tensor
    integers: dict[str, Tensor]
    losses: Tensor
    correct: Tensor
    num_steps: npt.NDArray[np.int64]

    @property
    def models(self) -> list[Tensor]:
        """All that a model consists of, ``[C, ...]`` each."""
        return [self.rows, self.buffer_rows, *self.integers.values()]


class BatchedTrainer:
    """Trains chunks of clients; keeps what it traced and its buffers.

    Threads may share one: what is traced is the same for all, buffers are each's own.
    On a GPU steps are CUDA graphs over memory that is kept, and one thread at a time
    trains.

    Parameters
    ----------
    module : FlatModule
        The architecture.
    objective : Objective
        What is minimised on a batch.
    settings : TrainingSettings
        The optimiser and the size of a batch.
    least : int
        2 for a model that cannot train on one example; see :func:`.training.train`.
    compiled : bool
        Whether steps may leave the interpreter, as TorchScript and CUDA graphs do.
    """

    def __init__(
        self,
        module: FlatModule,
        objective: Objective,
        settings: TrainingSettings,
        *,
        least: int = 1,
        compiled: bool = True,
    ) -> None:
        self.module = module
        self.objective = objective
        self.settings = settings
        self.least = least
        self.compiled = compiled
        self.device = module.parameters.device
        layout = module.layout
        self.parameters = list(layout.parameters)
        self.frozen = [e for e in layout.entries if e.kind == "frozen"]
        self.buffers = [e for e in layout.entries if e.kind == "buffer"]
        self.integers = [e for e in layout.entries if e.kind == "integer"]
        # Whether a step is w - rate * gradient, with one rate for all of a round.
        self._descends = settings.descends and not settings.rate_schedule.over_steps
        self._least = 1  # Fewer examples in a step make the model raise.
        self._steps: dict[tuple[Any, ...], Step] = {}
        self._moved: dict[tuple[Any, ...], list[int]] = {}
        self._several: dict[tuple[Any, ...], Step | None] = {}
        self._own = threading.local()
        self._replays = compiled and self.device.type == "cuda"
        self._memories: dict[int, _ChunkMemory] = {}  # by clients of a chunk
        self._turn = threading.Lock()
        # By address; None where the device has no memory.
        self._on_device: dict[
            tuple[int, int], tuple[_SharedArrays, tuple[Tensor, Tensor] | None]
        ] = {}

    def train(
        self,
        start: FlatModel,
        tasks: Sequence[Task],
        *,
        learning_rate: Rates,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[LocalResult]:
        """Train some clients from the same global model.

        Parameters
        ----------
        start : FlatModel
            The global model as received.
        tasks : Sequence[Task]
            C clients, each with one example or more.
        learning_rate : float or Sequence[float]
            Of this round, of all clients or of each; over its steps the settings may
            have a schedule.
        cancelled : Callable[[], bool]
            Asked before every step, or every few that are made in one call; once it
            says yes, training raises.

        Returns
        -------
        list[LocalResult]
            In the order of the tasks; the models are rows of one matrix.
        """
        trained = self.train_rows(
            start, tasks, learning_rate=learning_rate, cancelled=cancelled
        )
        rows, buffer_rows = (
            trained.rows.cpu().unbind(),
            trained.buffer_rows.cpu().unbind(),
        )
        integers = {n: t.cpu().numpy() for n, t in trained.integers.items()}
        losses, correct = trained.losses.tolist(), trained.correct.tolist()
        num_steps = trained.num_steps.tolist()
        results = []
        for k, task in enumerate(tasks):
            seen = len(task.examples) * task.epochs
            own = {name: values[k] for name, values in integers.items()}
            model = FlatModel(
                self.module.layout, rows[k], buffer_rows[k], own, start.frozen
            )
            loss, accuracy = losses[k] / seen, correct[k] / seen
            results.append(LocalResult(model, loss, accuracy, num_steps[k]))
        return results

    def train_rows(
        self,
        start: FlatModel,
        tasks: Sequence[Task],
        *,
        learning_rate: Rates,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> TrainedRows:
        """Train some clients; leave their models on the device, as one matrix.

        The arguments are those of :meth:`train`.
        """
        rates = _Rates.of(self.settings, learning_rate, len(tasks))
        if not self._replays:
            state = _State.of(start, len(tasks), rates.first, self.device)
            return self._run(state, tasks, rates, cancelled)
        with self._turn, torch.cuda.device(self.device):
            memory = self._memory(start, len(tasks), rates.first)
            trained = self._run(memory.state, tasks, rates, cancelled, memory)
            return copy.deepcopy(trained)

    def _memory(
        self, start: FlatModel, clients: int, learning_rate: float
    ) -> _ChunkMemory:
        """Return the memory of chunks of so many clients, ready to begin."""
        memory = self._memories.pop(clients, None)
        if memory is None:
            state = _State.of(start, clients, learning_rate, self.device)
            memory = _ChunkMemory(state)
            if len(self._memories) == KEPT_SIZES:
                unused_longest = next(iter(self._memories))
                del self._memories[unused_longest]
        else:
            memory.state.begin(start, learning_rate)
        self._memories[clients] = memory
        return memory

    def _run(
        self,
        own: _State,
        tasks: Sequence[Task],
        rates: _Rates,
        cancelled: Callable[[], bool],
        memory: _ChunkMemory | None = None,
    ) -> TrainedRows:
        """Run a chunk's steps, which change its state; in kept memory, if given."""
        plan = _Schedule.of(tasks, self.settings.batch_size, self.least)
        trained = own.trained
        descends = self._descends and rates.same
        parameters = _views(trained.rows, self.parameters)
        buffers = _views(trained.buffer_rows, self.buffers)
        counters = [trained.integers[e.name] for e in self.integers]
        frozen = [own.frozen[e.start : e.stop].view(e.shape) for e in self.frozen]
        optimizer: LocalOptimizer | None = None
        rate_of = rates.every(plan.steps, trained.rows)
        keys = np.array([task.noise_key for task in tasks], np.int64)
        seeds = torch.from_numpy(keys).to(self.device)
        counts = plan.counts.to(self.device)
        of_steps = [counts, torch.arange(plan.total, device=self.device)]
        if plan.ragged:
            places = torch.arange(plan.width, device=self.device)
            of_steps.append((places < counts[:, :, None]).float())
        done: dict[int, list[Tensor]] = {}
        allocate = self._buffers_for if memory is None else memory.examples
        feed = self._feed(tasks, plan, allocate)
        gathering = None
        if isinstance(feed, _Gathering) and descends and memory is None:
            gathering = feed
        ends = [trained.rows, own.received]
        sums = [trained.losses, trained.correct, own.rate]
        state = [parameters, frozen, buffers, counters, ends, sums]
        plan.check(self._least)  # As far as it is known; a trace may tell more.
        step = 0
        with torch.no_grad(), plain_execution():
            while step < plan.total:
                if cancelled():
                    raise ClientError("training was cancelled")
                for k in plan.ended.get(step, ()):
                    done[k] = [tensor[k].clone() for tensor in trained.models]
                if gathering is not None and plan.all_go_on(step, SEVERAL):
                    some = slice(step, step + SEVERAL)
                    of_some = tuple(values[some] for values in of_steps)
                    source = gathering.of(some)
                    given = (tuple(chain(*state)), *source, seeds, of_some)
                    run_some = self._several_steps(given)
                    if run_some is not None:
                        run_some(*given)
                        step += SEVERAL
                        continue
                batch = [*feed(step), seeds, *(values[step] for values in of_steps)]
                if memory is not None:
                    batch = memory.in_place(batch)
                inputs = [*state, batch]
                run = self._step(inputs, descends)
                if memory is not None:
                    run = memory.replayed(run, batch, descends)
                if step == 0:
                    plan.check(self._least)
                gradients = run(*chain(*inputs))
                if not descends:
                    moved = [parameters[k] for k in self._moved[_kind(batch, descends)]]
                    if optimizer is None:
                        optimizer = LocalOptimizer(self.settings, rates.first, moved)
                    if rate_of is not None:
                        optimizer.learning_rate = rate_of(step)
                    if self.settings.clip_norm:
                        gradients = clip_each(gradients, self.settings.clip_norm)
                    optimizer.step(moved, gradients)
                step += 1
        for k, model in done.items():
            for tensor, values in zip(trained.models, model, strict=True):
                tensor[k] = values
        trained.num_steps = plan.steps
        return trained

    def _feed(
        self, tasks: Sequence[Task], plan: _Schedule, allocate: Allocate
    ) -> Callable[[int], Sequence[Tensor]]:
        """Return what gives each step its batch, ``[C, width, ...]``, ``[C, width]``.

        What is gathered on the device lies in what ``allocate`` gives.
        """
        shared = _shared_arrays(tasks)
        data = None if shared is None else self._resident(shared)
        if shared is not None and data is not None:
            rows = torch.from_numpy(plan.rows(tasks, shared.first)).to(self.device)
            return _Gathering(data, allocate(rows.shape[1:], data[0]), rows)
        size = (len(tasks), int(plan.per_epoch.max()), plan.width)
        x_all, y_all = self._buffers_for(size, as_tensor(tasks[0].examples.x))

        def shuffled(step: int) -> tuple[Tensor, Tensor]:
            plan.fill(tasks, step, x_all, y_all)
            x, y = plan.batch(step, x_all, y_all)
            return x.to(self.device), y.to(self.device)

        return shuffled

    def _resident(self, shared: _SharedArrays) -> tuple[Tensor, Tensor] | None:
        """Return all data as they lie on the device, where they are put if they fit."""
        own = as_tensor(shared.x), as_tensor(shared.y)
        if self.device.type == "cpu" and not self._replays:
            return own
        place = _address(shared.x), _address(shared.y)
        if place not in self._on_device:
            size, free = shared.x.nbytes + shared.y.nbytes, _free_bytes(self.device)
            values = None
            if size <= SHARE_OF_DATA * free:
                values = own[0].to(self.device), own[1].to(self.device)
            else:
                log.warning(
                    "the clients' data, %.3g GB, do not stay on %s, where %.3g GB are "
                    "free: what each step needs is copied there",
                    size / 1e9,
                    self.device,
                    free / 1e9,
                )
            self._on_device[place] = (shared, values)
        return self._on_device[place][1]

    def _buffers_for(self, size: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
        """Return this thread's ``x [*size, ...]`` and ``y [*size]``, to fill."""
        key = _kind_of_buffer(size, like)
        if getattr(self._own, "key", None) != key:
            self._own.examples = _allocate(size, like)
            self._own.key = key
        examples: tuple[Tensor, Tensor] = self._own.examples
        return examples

    def _step(self, inputs: list[list[Tensor]], descends: bool) -> Step:
        """Return the traced step for these shapes."""
        key = _kind(inputs[-1], descends)
        if key not in self._steps:
            # PyTorch traces one function at a time in a process.
            with STREAMS.alone():
                if key not in self._steps:
                    self._steps[key] = self._trace(inputs, key, descends)
        return self._steps[key]

    def _several_steps(self, given: Sequence[Any]) -> Step | None:
        """Return several steps as one call; ``None`` where that is not worth it.

        That is known once a step has been traced.
        """
        state, data, batch, rows, seeds, of_steps = given
        key = _kind([*batch, seeds, *of_steps], True)
        step = self._steps.get(key)
        if step is not None and key not in self._several:
            with STREAMS.alone():
                if key not in self._several:
                    self._several[key] = None
                    size = sum(values.numel() for values in state)
                    if has_few_operations(step) and size <= SMALL:
                        state, batch = copy.deepcopy((state, batch))
                        examples = state, data, batch, rows, seeds, of_steps
                        self._several[key] = several(step, examples)
        return self._several.get(key)

    def _trace(
        self, inputs: list[list[Tensor]], key: tuple[Any, ...], descends: bool
    ) -> Step:
        """Record the step's tensor operations, for these shapes.

        The step counts losses and hits, and changes the parameters in place where it
        ``descends``; else it returns the gradients instead, of those parameters that
        have one.
        """
        along: list[int | None] = [0, None, *([0] * (len(inputs[-1]) - 5))]
        penalised = self._penalty_of(*inputs[4]) is not None
        moving = set(range(len(self.buffers)))  # Those that a step changes.

        def flat(*tensors: Tensor) -> list[Tensor]:
            left = iter(tensors)
            parts = [[next(left) for _ in part] for part in inputs]
            *state, (rows, received), (losses, correct, rate), batch = parts
            x, y, seeds, counts, *rest = batch
            extra = [seeds, *rest]
            scale = rate if descends else torch.ones_like(rate)
            # vmap's BatchNorm changes running statistics only where they lie together.
            parameters, frozen, buffers, counters = state
            together = [
                buffer.contiguous() if k in moving else buffer
                for k, buffer in enumerate(buffers)
            ]
            # What a client's pass over its batch finds out while it is recorded.
            assigned: list[int] = []
            with_gradient: list[int] = []
            batched: Callable[..., Any] = vmap(
                grad(partial(self._loss, assigned), with_gradient),
                in_dims=(0, None, 0, 0, None, 0, 0, along),  # Of seeds, step, and mask.
            )
            gradients, (loss, logits, values) = batched(
                parameters, frozen, together, counters, scale, x, y, extra
            )
            if any(map(recorder.has_changed, parameters)):
                raise RuntimeError("the model changes its parameters itself")
            for k, value in zip(assigned, values, strict=True):
                [*together, *counters][k].copy_(value)
            for k in sorted(moving):
                if recorder.has_changed(together[k]):
                    buffers[k].copy_(together[k])
                else:
                    moving.remove(k)
            hits = logits.argmax(-1) == y
            if len(extra) > 2:
                hits = hits * extra[2]
                # A client that has ended counts no more, whatever its loss is now.
                loss = torch.where(counts > 0, loss, 0)
            correct.add_(hits.sum(1))
            losses.addcmul_(loss.to(losses.dtype), counts)
            penalties: Sequence[Any] = [None] * len(parameters)
            if penalised:
                penalties = _views(self._penalty_of(rows, received), self.parameters)
            of = dict(zip(with_gradient, gradients, strict=True))
            if not descends:
                found = [_sum(of.get(k), p) for k, p in enumerate(penalties)]
                self._moved[key] = [k for k, g in enumerate(found) if g is not None]
                return [g for g in found if g is not None]
            for parameter, penalty in zip(parameters, penalties, strict=True):
                if penalty is not None:
                    parameter.sub_(penalty * rate)
            for k, gradient in of.items():
                parameters[k].sub_(gradient)
            return [losses]

        # Tracing runs the step, which changes tensors in place: on a copy, with the
        # same strides, as the trace depends on them, and views of the same rows.
        self.module.train()
        asked = -1
        while len(moving) != asked:  # Again without copies of buffers that stay.
            asked = len(moving)
            copies, recorder = copy.deepcopy(inputs), Recorder()
            with plain_attention():
                traced: Any = recorder.trace(flat, [*chain(*copies)])
        drop_unused(traced.graph)
        drop_idle(traced.graph)
        fuse_descent(traced.graph)
        traced.recompile()
        if self._replays or not self.compiled:  # A graph will be without Python.
            return traced.forward  # type: ignore[no-any-return]
        return without_python(traced, [*chain(*copies)])

    def _penalty_of(self, rows: Tensor, received: Tensor) -> Any:
        """Return the penalty's gradient for each client, ``[C, P]``, or ``None``."""
        if self.objective.penalty_gradient(received, received) is None:
            return None
        return vmap(self.objective.penalty_gradient, in_dims=(0, None))(rows, received)

    def _loss(
        self,
        assigned: list[int],
        parameters: list[Tensor],
        frozen: list[Tensor],
        buffers: list[Tensor],
        counters: list[Tensor],
        scale: Tensor,
        x: Tensor,
        y: Tensor,
        extra: list[Tensor],
    ) -> tuple[Tensor, tuple[Tensor, Tensor, list[Tensor]]]:
        """Return one client's loss on a batch, scaled; the loss, the logits, and more.

        That is what the model assigned to buffers or counters; ``assigned`` is told
        which ones they are.
        """
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
        values = []
        kept = zip([*self.buffers, *self.integers], [*buffers, *counters], strict=True)
        for k, (e, given) in enumerate(kept):
            value = state[e.name]
            if value is given:
                continue
            if value.dtype != given.dtype or value.shape != given.shape:
                raise RuntimeError(f"the buffer '{e.name}' is given another shape")
            assigned.append(k)
            values.append(value.detach())
        with OfLabels(y):
            loss = self.objective.loss(logits, Batch(x, y, mask))
        return loss * scale, (loss.detach(), logits.detach(), values)


def _sum(gradient: Tensor | None, penalty: Tensor | None) -> Tensor | None:
    """Return a parameter's whole gradient, or ``None`` where it has none."""
    if gradient is None or penalty is None:
        return penalty if gradient is None else gradient
    return gradient + penalty


@dataclass(frozen=True)
class _State:
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
        cls, start: FlatModel, clients: int, rate: float, device: torch.device
    ) -> _State:
        """Give every client the global model."""
        received, buffers, integers = _on(device, start)
        trained = TrainedRows(
            _copies(received, clients),
            _copies(buffers, clients),
            {name: _copies(values, clients) for name, values in integers.items()},
            torch.zeros(clients, device=device),
            torch.zeros(clients, device=device),
            np.zeros(clients, np.int64),
        )
        own_rate = torch.tensor(rate, dtype=received.dtype, device=device)
        frozen = start.frozen.to(device, copy=True)
        return cls(received, frozen, own_rate, trained)

    def begin(self, start: FlatModel, rate: float) -> None:
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


@dataclass
class _ChunkMemory:
    """What chunks of one number of clients use again, and the graphs over it.

    Attributes
    ----------
    state : _State
        Begun anew by each chunk.
    """

    state: _State
    _examples: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = field(
        default_factory=dict
    )
    _batches: dict[tuple[Any, ...], list[Tensor]] = field(default_factory=dict)
    _steps: dict[tuple[int, int, bool], Replayed] = field(default_factory=dict)

    def examples(self, size: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x [*size, ...]`` and ``y [*size]``, to fill."""
        key = _kind_of_buffer(size, like)
        if key not in self._examples:
            self._examples[key] = _allocate(size, like)
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


def _copies(values: Tensor, clients: int) -> Tensor:
    """Return a tensor once for each client, ``[C, ...]``; quicker than ``repeat``."""
    if not values.numel():
        return values.new_empty((clients, *values.shape))
    return values.expand(clients, *values.shape).clone(
        memory_format=torch.contiguous_format
    )


def _kind_of_buffer(size: Sequence[int], like: Tensor) -> tuple[Any, ...]:
    """Return what :func:`_allocate` depends on, but for the device."""
    return tuple(size), like.shape[1:], like.dtype


def _allocate(size: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x [*size, ...]`` and ``y [*size]``, where ``like`` is."""
    x = torch.zeros((*size, *like.shape[1:]), dtype=like.dtype, device=like.device)
    return x, torch.zeros(tuple(size), dtype=torch.int64, device=like.device)


def _on(
    device: torch.device, model: FlatModel
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return a model's parameters, buffers and integers on a device."""
    integers = {
        name: torch.from_numpy(np.array(values)).to(device)
        for name, values in model.integers.items()
    }
    return model.parameters.to(device), model.buffers.to(device), integers


def _kind(batch: Sequence[Tensor], descends: bool) -> tuple[Any, ...]:
    """Return what a trace depends on."""
    x = batch[0]
    return x.shape, x.dtype, x.is_contiguous(), len(batch), descends


@dataclass(frozen=True)
class _Rates:
    """The learning rates of a chunk.

    Attributes
    ----------
    settings : TrainingSettings
        Has their schedule over steps.
    own : list[float]
        ``[C]``: each client's in this round.
    same : bool
        Whether they are equal.
    """

    settings: TrainingSettings
    own: list[float]
    same: bool

    @classmethod
    def of(cls, settings: TrainingSettings, given: Rates, clients: int) -> _Rates:
        """Take what was given for some clients."""
        if isinstance(given, int | float):
            return cls(settings, [given] * clients, True)
        own = list(given)
        return cls(settings, own, len(set(own)) == 1)

    @property
    def first(self) -> float:
        """The first client's."""
        return self.own[0]

    def every(
        self, steps: npt.NDArray[np.int64], like: Tensor
    ) -> Callable[[int], Rate] | None:
        """Return what tells a step's rate; ``None`` where it is the first, always.

        A tensor, ``[C]``, where those who make the step differ; as ``like`` is.
        """
        if not self.settings.rate_schedule.over_steps:
            if self.same:
                return None
            rates = torch.tensor(self.own, dtype=like.dtype, device=like.device)
            return lambda step: rates
        at, counts = self.settings.learning_rate_at, steps.tolist()

        def rate(step: int) -> Rate:
            pairs = zip(self.own, counts, strict=True)
            now = [at(own, step, n) if step < n else math.nan for own, n in pairs]
            busy = {value for value in now if value == value}
            if len(busy) == 1:
                return busy.pop()
            # Of those who are done nothing is kept any more.
            return torch.tensor(now, dtype=like.dtype, device=like.device).nan_to_num_()

        return rate


@dataclass(frozen=True)
class _Gathering:
    """Feeds each step from common arrays.

    Attributes
    ----------
    data : tuple[Tensor, Tensor]
        All examples, x and y.
    batch : tuple[Tensor, Tensor]
        ``[C, B, ...]`` and ``[C, B]``, filled anew for each step.
    rows : Tensor
        ``[total, C, B]``: which examples.
    """

    data: tuple[Tensor, Tensor]
    batch: tuple[Tensor, Tensor]
    rows: Tensor

    def __call__(self, step: int) -> Sequence[Tensor]:
        return gather(self.data, self.rows[step], self.batch)

    def of(self, steps: slice) -> tuple[Any, ...]:
        """Return what several steps are fed from."""
        return self.data, self.batch, self.rows[steps]


@dataclass(frozen=True)
class _Schedule:
    """Who does how many steps, and how full each step is.

    A client's steps follow one another without a gap, whatever the others do: its
    momentum must not notice them.

    Attributes
    ----------
    batch_size : int
        B: examples of a client in each step but its last ones.
    width : int
        Places for examples in a step: B, or B + 1 where somebody's last example has
        joined the batch before it.
    per_epoch, steps : ndarray
        ``[C]``: a client's steps in one pass, and in all.
    counts : Tensor
        ``[total, C]``: real examples of each client in each step, float32.
    ragged : bool
        Whether any step of any client is not full.
    ended : dict[int, list[int]]
        By step, the clients whose last step was the one before; not the last ones.
    passes : dict[int, list[tuple[list[int], int, int]]]
        By step, who begins a pass over the own data there: clients of one size
        together, with that size and the number of the pass.
    """

    batch_size: int
    width: int
    per_epoch: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    counts: Tensor
    ragged: bool
    ended: dict[int, list[int]]
    passes: dict[int, list[tuple[list[int], int, int]]]

    @classmethod
    def of(cls, tasks: Sequence[Task], batch_size: int, least: int) -> _Schedule:
        """Lay out the steps of some clients."""
        sizes = tuple(len(task.examples) for task in tasks)
        epochs = tuple(task.epochs for task in tasks)
        return _schedule(sizes, epochs, batch_size, least)

    @property
    def total(self) -> int:
        """Steps of the chunk."""
        return self.counts.shape[0]

    def check(self, least: int) -> None:
        """Raise if a step has too few examples for the model."""
        if self.ragged and ((self.counts > 0) & (self.counts < least)).any():
            raise ValueError(
                f"Expected more than {least - 1} value per channel when training"
            )

    def fill(self, tasks: Sequence[Task], step: int, x: Tensor, y: Tensor) -> None:
        """Shuffle the data of the clients that begin a pass into ``x`` and ``y``."""
        for alike, orders in self._orders(tasks, step):
            steps = orders.shape[1]
            together = torch.from_numpy(orders.reshape(len(alike), -1))
            for k, order in zip(alike, together.unbind(), strict=True):
                examples = tasks[k].examples
                for source, target in ((examples.x, x), (examples.y, y)):
                    rows = target[k, :steps].flatten(0, 1)
                    torch.index_select(as_tensor(source), 0, order, out=rows)

    def _orders(
        self, tasks: Sequence[Task], step: int
    ) -> Iterator[tuple[list[int], npt.NDArray[np.int64]]]:
        """Yield who begins a pass, those of one size together, and what they take.

        The examples of each step of the pass, ``[K, steps, width]``. Padding is the
        client's own first one: it is masked, but a model need not be defined for
        examples that nobody has.
        """
        for alike, size, epoch in self.passes.get(step, ()):
            keys = np.array([tasks[k].order_key for k in alike], np.uint64)
            orders = permutations(keys, epoch, size)
            steps = int(self.per_epoch[alike[0]])
            before = (steps - 1) * self.batch_size
            if size == steps * self.width:  # Every step is full.
                yield alike, orders.reshape(len(alike), steps, self.width)
                continue
            rows = np.zeros((len(alike), steps, self.width), np.int64)
            full = len(alike), steps - 1, self.batch_size
            rows[:, :-1, : self.batch_size] = orders[:, :before].reshape(full)
            rows[:, -1, : size - before] = orders[:, before:]
            yield alike, rows

    def rows(
        self, tasks: Sequence[Task], first: Sequence[int]
    ) -> npt.NDArray[np.int64]:
        """Return the row of each example in a common array, ``[total, C, width]``.

        ``first`` is where each client's rows begin; padding points there, too.
        """
        rows = np.empty((self.total, len(tasks), self.width), np.int64)
        rows[:] = np.asarray(first)[:, None]
        for step in self.passes:
            for alike, orders in self._orders(tasks, step):
                these = alike if len(alike) < len(tasks) else slice(None)
                steps = orders.shape[1]
                rows[step : step + steps, these] += orders.transpose(1, 0, 2)
        return rows

    def batch(self, step: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return a step's batch of every client, x and y ``[C, width, ...]``."""
        place = step % self.per_epoch
        if (place == place[0]).all():
            return x[:, int(place[0])], y[:, int(place[0])]
        client, at = torch.arange(len(place)), torch.from_numpy(place)
        return x[client, at], y[client, at]

    def all_go_on(self, step: int, steps: int) -> bool:
        """Tell whether there are so many steps from one on, and nobody ends between."""
        between = range(step + 1, step + steps)
        return step + steps <= self.total and self.ended.keys().isdisjoint(between)


@lru_cache(maxsize=64)  # Clients are often of the same size.
def _schedule(
    sizes: tuple[int, ...], epochs: tuple[int, ...], batch_size: int, least: int
) -> _Schedule:
    examples = np.array(sizes)
    per_epoch = num_batches(examples, batch_size, least)
    steps = per_epoch * np.array(epochs)
    step = np.arange(steps.max())[:, None]
    place = step % per_epoch
    left = np.where(
        place < per_epoch - 1, batch_size, examples - (per_epoch - 1) * batch_size
    )
    counts = left * (step < steps)
    width = max(batch_size, int(counts.max()))
    ended: dict[int, list[int]] = {}
    for k, end in enumerate(steps.tolist()):
        if end < len(counts):
            ended.setdefault(end, []).append(k)
    passes: dict[int, list[tuple[list[int], int, int]]] = {}
    for n in sorted(set(sizes)):
        alike = [k for k, size in enumerate(sizes) if size == n]
        for epoch in range(max(epochs[k] for k in alike)):
            busy = [k for k in alike if epoch < epochs[k]]
            first = epoch * int(per_epoch[alike[0]])
            passes.setdefault(first, []).append((busy, n, epoch))
    return _Schedule(
        batch_size,
        width,
        per_epoch,
        steps,
        torch.from_numpy(counts.astype(np.float32)),
        bool((counts != width).any()),
        ended,
        passes,
    )


def shared_array(
    arrays: Sequence[npt.NDArray[Any]],
) -> tuple[npt.NDArray[Any], list[int]] | None:
    """Return the array whose rows some arrays are, and which row is each one's first.

    Clients' data are slices of the data set's. The result has the arrays' shape but
    for the rows, whatever shape the memory had before: what came from another process
    lies in a vector. ``None`` is returned where the arrays have no common array.

    Examples
    --------
    >>> everybody = np.zeros((10, 3))
    >>> whole, first = shared_array([everybody[4:6], everybody[:4]])
    >>> whole is everybody, first
    (True, [4, 0])
    """
    whole, shape = _base(arrays[0]), arrays[0].shape[1:]
    bytes_of_row = whole.itemsize * math.prod(shape)
    if not bytes_of_row or whole.nbytes % bytes_of_row or not whole.flags.c_contiguous:
        return None
    for array in arrays:
        fits = array.dtype == whole.dtype and array.shape[1:] == shape
        if not fits or not array.flags.c_contiguous or _base(array) is not whole:
            return None
    begin = _address(whole)
    places = [divmod(_address(array) - begin, bytes_of_row) for array in arrays]
    if any(rest for _, rest in places):
        return None
    if whole.shape[1:] != shape:
        whole = whole.reshape(-1, *shape)
    return whole, [row for row, _ in places]


def _base(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the array that an array is a view of, perhaps itself."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _address(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


@dataclass(frozen=True)
class _SharedArrays:
    """The arrays that all clients' examples are rows of, and where each one begins."""

    x: npt.NDArray[Any]
    y: npt.NDArray[Any]
    first: list[int]


def _shared_arrays(tasks: Sequence[Task]) -> _SharedArrays | None:
    """Return what the examples of several clients are rows of, if that is the same."""
    if len(tasks) == 1:
        return None
    x = shared_array([task.examples.x for task in tasks])
    y = shared_array([task.examples.y for task in tasks])
    if x is None or y is None or x[1] != y[1]:
        return None
    return _SharedArrays(x[0], y[0], x[1])


def _free_bytes(device: torch.device) -> float:
    """Return how much of a device's memory nobody has taken, as far as is known."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return free


def _views(rows: Tensor, entries: Sequence[Entry]) -> list[Tensor]:
    """Return named tensors ``[C, *shape]`` as views of rows ``[C, P]``."""
    if not entries:
        return []
    parts = rows.split_with_sizes([e.stop - e.start for e in entries], 1)
    return [
        part.view(len(rows), *e.shape) for part, e in zip(parts, entries, strict=True)
    ]
