"""Local training of a chunk of clients at once.

The same step as in :mod:`fedweight.clients.steps.loop`, batched over clients with
``torch.vmap`` and traced once to plain tensor operations, so that Python's share does
not grow with the clients. Clients of different sizes share a chunk: a step that is
not full is padded and masked, and a client that is done is set aside.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.errors import ClientError
from ...core.layout import FlatModel
from ...core.module import FlatModule
from ..noise import STREAMS
from ..objectives.base import Objective, defines, tracks
from ..optimizers import LocalOptimizer, clip_each
from ..settings import TrainingSettings
from ._torch.torchscript import has_few_operations, plain_execution, several
from .carried import Carried
from .feeding import Feeder, Gathering
from .inputs import StepInputs, StepNames, views
from .memory import ChunkMemory, ChunkState, TrainedRows
from .predictions import predictions
from .rates import LearningRates, Rates
from .results import Results
from .schedule import Schedule
from .step import ChunkStep, MadeStep, Step
from .task import Task, Tasks, groups_of

# So many steps are made in one call, where what a call costs shows: a step has few
# operations, and the models of a chunk have no more than so many values.
SEVERAL = 4

SMALL = 1 << 23

# On a GPU the memory of chunks of so many sizes is kept.
KEPT_SIZES = 4


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
        2 for a model that cannot train on one example; see :func:`.loop.train`.
    compiled : bool
        Whether steps may leave the interpreter, as TorchScript and CUDA graphs do.
    traced : bool
        Whether steps are traced; else they are made by ``torch.func`` every time, in
        one thread at a time, and stay in the interpreter.
    """

    def __init__(
        self,
        module: FlatModule,
        objective: Objective,
        settings: TrainingSettings,
        *,
        least: int = 1,
        compiled: bool = True,
        traced: bool = True,
    ) -> None:
        self.module = module
        self.objective = objective
        self.settings = settings
        self.least = least
        self.device = module.parameters.device
        self.traced = traced
        compiled = compiled and traced
        self._replays = compiled and self.device.type == "cuda"
        # A CUDA graph is without Python in any case.
        self._step = ChunkStep(
            module, objective, compiled=compiled and not self._replays
        )
        self._feeder = Feeder(self.device, keeps=self._replays)
        # Whether a step is w - rate * gradient, with one rate for all of a round.
        self._descends = settings.descends and not settings.rate_schedule.over_steps
        self._changes_after = defines(objective, "after_step")
        self._tracks = tracks(objective)
        self._least = 1  # Fewer examples in a step make the model raise.
        self._steps: dict[tuple[Any, ...], MadeStep] = {}
        self._several: dict[tuple[Any, ...], Step | None] = {}
        # By the number of clients of a chunk, and the shapes of what they carry.
        self._memories: dict[tuple[Any, ...], ChunkMemory] = {}
        self._turn = threading.Lock()

    def train(
        self,
        start: FlatModel,
        tasks: Sequence[Task],
        *,
        learning_rate: Rates,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Results:
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
        Results
            In the order of the tasks; the models are rows of one matrix.
        """
        columns = Tasks.of(tasks)
        trained = self.train_rows(
            start, columns, learning_rate=learning_rate, cancelled=cancelled
        )
        return Results(self.module, start, columns, trained)

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
        columns = Tasks.of(tasks)
        rates = LearningRates.of(self.settings, learning_rate, len(columns))
        carried = self._carried(start, columns)
        if not self._replays:
            state = ChunkState.of(start, columns, rates.first, carried, self.device)
            return self._run(state, columns, rates, cancelled)
        with self._turn, torch.cuda.device(self.device):
            memory = self._memory(start, columns, rates.first, carried)
            trained = self._run(memory.state, columns, rates, cancelled, memory)
            return copy.deepcopy(trained)

    def let_go(self) -> None:
        """Give back the memory that is kept; what was traced stays."""
        with self._turn:
            self._memories.clear()

    def _carried(self, start: FlatModel, tasks: Tasks) -> Carried:
        """Return what the objective knows of some clients, and what they carry."""
        if not self._tracks:
            return Carried()
        one_at_a_time = defines(self.objective, "look")
        with STREAMS.alone() if one_at_a_time else nullcontext():
            return Carried.of(
                self.objective,
                list(tasks),
                start.parameters,
                self.device,
                partial(predictions, self.module, start),
            )

    def _memory(
        self,
        start: FlatModel,
        tasks: Tasks,
        learning_rate: float,
        carried: Carried,
    ) -> ChunkMemory:
        """Return the memory of chunks of so many clients, ready to begin."""
        key = len(tasks), carried.shapes
        memory = self._memories.pop(key, None)
        if memory is None:
            state = ChunkState.of(start, tasks, learning_rate, carried, self.device)
            memory = ChunkMemory(state)
            if len(self._memories) == KEPT_SIZES:
                unused_longest = next(iter(self._memories))
                del self._memories[unused_longest]
        else:
            memory.state.begin(start, tasks, learning_rate, carried)
        self._memories[key] = memory
        return memory

    def _run(
        self,
        own: ChunkState,
        tasks: Tasks,
        rates: LearningRates,
        cancelled: Callable[[], bool],
        memory: ChunkMemory | None = None,
    ) -> TrainedRows:
        """Run a chunk's steps, which change its state; in kept memory, if given."""
        plan = Schedule.of(tasks, self.settings.batch_size, self.least)
        trained, carried = own.trained, own.trained.carried
        descends = self._descends and rates.same
        kind = self._step.client
        parameters = views(trained.rows, kind.parameters)
        optimizer: LocalOptimizer | None = None
        rate_of = rates.every(plan.steps, trained.rows)
        seeds = torch.from_numpy(tasks.noise_keys.view(np.int64)).to(self.device)
        of_steps = self._of_steps(tasks, plan)
        names = StepNames(
            tuple(carried.carry),
            tuple(carried.kept),
            tuple(carried.facts),
            tuple(carried.shared),
            ("x", "y", "seeds", *of_steps),
        )
        done: dict[int, list[Tensor]] = {}
        allocate = None if memory is None else memory.examples
        feed = self._feeder.feed(tasks, plan, allocate)
        gathering = None
        if isinstance(feed, Gathering) and descends and memory is None and self.traced:
            gathering = None if self._changes_after else feed
        state = StepInputs(
            parameters,
            [own.frozen[e.start : e.stop].view(e.shape) for e in kind.frozen],
            views(trained.buffer_rows, kind.buffers),
            [trained.integers[e.name] for e in kind.counters],
            [trained.rows, own.received],
            [trained.losses, trained.correct, own.rate],
            [*carried.carry.values()],
            [*carried.kept.values()],
            [*carried.facts.values()],
            [*carried.shared.values()],
            [],
        )
        plan.check(self._least)  # As far as it is known; a trace may tell more.
        tensors = tuple(chain(*state))
        kept = tuple(values.shape for values in state.kept)
        step = 0
        execution = plain_execution() if self.traced else nullcontext()
        with torch.no_grad(), execution:
            while step < plan.total:
                if cancelled():
                    raise ClientError("training was cancelled")
                for k in plan.ended.get(step, ()):
                    done[k] = [tensor[k].clone() for tensor in trained.of_clients]
                if gathering is not None and plan.all_go_on(step, SEVERAL):
                    some = slice(step, step + SEVERAL)
                    of_some = tuple(values[some] for values in of_steps.values())
                    source = gathering.of(some)
                    given = (tensors, *source, seeds, of_some)
                    run_some = self._several_steps(given, kept)
                    if run_some is not None:
                        run_some(*given)
                        step += SEVERAL
                        continue
                batch = [*feed(step), seeds, *(v[step] for v in of_steps.values())]
                if memory is not None:
                    batch = memory.in_place(batch)
                key = _kind(batch, descends, kept)
                traced = self._steps.get(key)
                if traced is None:
                    inputs = state._replace(batch=batch)
                    traced = self._trace(key, inputs, names, descends=descends)
                run = traced.run
                if memory is not None:
                    run = memory.replayed(run, batch, descends)
                if step == 0:
                    plan.check(self._least)
                gradients = run(*tensors, *batch)
                if not descends:
                    moved = [parameters[k] for k in traced.moved]
                    if optimizer is None:
                        optimizer = LocalOptimizer(self.settings, rates.first, moved)
                    if rate_of is not None:
                        optimizer.learning_rate = rate_of(step)
                    if self.settings.clip_norm:
                        gradients = clip_each(gradients, self.settings.clip_norm)
                    optimizer.step(moved, gradients)
                if self._changes_after:
                    self._step.change_after(state, names)
                step += 1
        for k, values_of_one in done.items():
            for tensor, values in zip(trained.of_clients, values_of_one, strict=True):
                tensor[k] = values
        trained.num_steps = plan.steps
        return trained

    def _of_steps(self, tasks: Tasks, plan: Schedule) -> dict[str, Tensor]:
        """Return what each step has besides examples, ``[total, ...]``, by name."""
        counts = plan.counts.to(self.device)
        found = {"counts": counts, "step": torch.arange(plan.total, device=self.device)}
        if plan.ragged:
            places = torch.arange(plan.width, device=self.device)
            found["mask"] = (places < counts[:, :, None]).float()
        wants_groups = "groups" in self.objective.wants
        if self.objective.per_example or wants_groups:
            ids = plan.rows(tasks, [0] * len(tasks))
            if self.objective.per_example:
                found["ids"] = torch.from_numpy(ids).to(self.device)
            if wants_groups:
                of_clients = [
                    groups_of(task)[ids[:, k]] for k, task in enumerate(tasks)
                ]
                groups = np.stack(of_clients, 1)
                found["groups"] = torch.from_numpy(groups).to(self.device)
        return found

    def _trace(
        self,
        key: tuple[Any, ...],
        inputs: StepInputs,
        names: StepNames,
        *,
        descends: bool,
    ) -> MadeStep:
        """Make the step for these shapes, if nobody has meanwhile."""
        # PyTorch traces one function at a time in a process.
        with STREAMS.alone():
            traced = self._steps.get(key)
            if traced is None:
                make = self._step.trace if self.traced else self._step.eager
                traced = make(inputs, names, descends=descends)
                self._least = max(self._least, traced.least)
                self._steps[key] = traced
        return traced

    def _several_steps(
        self, given: Sequence[Any], kept: tuple[Any, ...]
    ) -> Step | None:
        """Return several steps as one call; ``None`` where that is not worth it.

        That is known once a step has been traced.
        """
        state, data, batch, rows, seeds, of_steps = given
        key = _kind([*batch, seeds, *of_steps], True, kept)
        traced = self._steps.get(key)
        if traced is not None and key not in self._several:
            with STREAMS.alone():
                if key not in self._several:
                    self._several[key] = None
                    size = sum(values.numel() for values in state)
                    if has_few_operations(traced.run) and size <= SMALL:
                        state, batch = copy.deepcopy((state, batch))
                        examples = state, data, batch, rows, seeds, of_steps
                        self._several[key] = several(traced.run, examples)
        return self._several.get(key)


def _kind(
    batch: Sequence[Tensor], descends: bool, kept: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Return what a trace depends on; ``kept`` are shapes of what is kept."""
    x = batch[0]
    return x.shape, x.dtype, x.is_contiguous(), len(batch), descends, kept
