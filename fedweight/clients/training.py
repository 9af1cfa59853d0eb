"""Local training: from the global model and a client's data to its local model.

A pure function of the received model, the examples, the random stream and the
objective; which process it runs in, and after which other client, does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.batches import batches
from ..core.errors import ClientError, check_range
from ..core.layout import FlatModel, as_tensor
from ..core.module import FlatModule
from ..core.rng import permutation
from ..data.examples import Examples
from .noise import LocalTraining, own_streams, watched
from .objectives import Batch, Objective
from .optimizers import Foreign, LocalOptimizer, clip_factor
from .settings import TrainingSettings

EVALUATION_BATCH = 1024


@dataclass(frozen=True)
class Task:
    """One client's local training in one round.

    Attributes
    ----------
    examples : Examples
        Its training data.
    epochs : int
        Passes over them, 1 or more.
    order_key : int
        The key of the stream that orders the examples of every pass.
    noise_key : int
        The key, below 2**63, of the noise inside the model, such as dropout's.
    """

    examples: Examples
    epochs: int
    order_key: int
    noise_key: int = 0

    def __post_init__(self) -> None:
        """Check the range."""
        if self.epochs < 1:  # Asked first: there is one for each client and round.
            check_range("epochs", self.epochs, 1)


class LocalResult(NamedTuple):
    """What local training made.

    ``loss`` and ``accuracy`` are means over the examples as training met them; NaN
    for a client without data, whose model is the received one.
    """

    model: FlatModel
    loss: float
    accuracy: float
    num_steps: int


def train(
    module: FlatModule,
    start: FlatModel,
    task: Task,
    objective: Objective,
    settings: TrainingSettings,
    *,
    learning_rate: float,
    least: int = 1,
    draws: bool = False,
    cancelled: Callable[[], bool] = lambda: False,
) -> LocalResult:
    """Train a client's model.

    Parameters
    ----------
    module : FlatModule
        The architecture; its values are overwritten.
    start : FlatModel
        The global model as received.
    task : Task
        The client's examples, passes and streams.
    objective : Objective
        What is minimised on a batch.
    settings : TrainingSettings
        The optimiser and the size of a batch.
    learning_rate : float
        Of this round; over its steps the settings may have a schedule.
    least : int
        2 for a model that cannot train on one example: a last batch of one joins the
        batch before it.
    draws : bool
        Whether the model is known to draw from the process's random streams. If it is
        not known and shows, the client trains again: see :func:`.noise.own_streams`.
    cancelled : Callable[[], bool]
        Asked before every step; once it says yes, training raises.

    Returns
    -------
    LocalResult
        The local model, after ``epochs * ceil(n / batch_size)`` steps; the received
        one after none where there are fewer examples than the model needs.

    Raises
    ------
    ClientError
        If the model returns no logits, or puts other tensors in the place of its own.
    """
    if len(task.examples) < least:
        return LocalResult(start, math.nan, math.nan, 0)
    run = partial(
        run_steps,
        module,
        start,
        task,
        objective,
        settings,
        learning_rate=learning_rate,
        least=least,
        cancelled=cancelled,
    )
    device = module.parameters.device
    if not draws:
        result, draws = watched(run, device)
        if not draws:
            return result
    with own_streams(task.noise_key, device):
        return run(noisy=True)


def run_steps(
    module: FlatModule,
    start: FlatModel,
    task: Task,
    objective: Objective,
    settings: TrainingSettings,
    *,
    learning_rate: float,
    least: int,
    cancelled: Callable[[], bool],
    noisy: bool = False,
) -> LocalResult:
    """Do the steps of :func:`train`, on the streams as they are.

    Parameters
    ----------
    noisy : bool
        Whether the model may draw noise in any step. Otherwise one that draws none in
        its first step is taken to draw none.
    """
    module.load(start)
    n = len(task.examples)
    device = module.parameters.device
    x, y = as_tensor(task.examples.x).to(device), as_tensor(task.examples.y).to(device)
    received = start.parameters.to(device)
    foreign = isinstance(settings.rule, Foreign)
    kind = _ForeignOptimizer if foreign else _FlatOptimizer
    optimizer = kind(module, settings, learning_rate)
    losses: list[Tensor] = []
    sizes: list[int] = []
    outputs: list[Tensor] = []
    labels: list[Tensor] = []
    parts = batches(n, settings.batch_size, least)
    changes, total = settings.rate_schedule.over_steps, len(parts) * task.epochs
    looks = True  # Whether the model draws noise is known after its first step.
    module.train()
    for epoch in range(task.epochs):
        order = torch.from_numpy(permutation(task.order_key, epoch, n)).to(device)
        shuffled_x, shuffled_y = x.index_select(0, order), y.index_select(0, order)
        for part in parts:
            if cancelled():
                raise ClientError("training was cancelled")
            batch = Batch(shuffled_x[part], shuffled_y[part])
            noise = LocalTraining(task.noise_key, len(losses)) if looks else None
            with noise or nullcontext():
                logits = module.module(batch.x)
            if not isinstance(logits, Tensor):
                raise ClientError(
                    f"the model returned {type(logits).__name__}, not one tensor of "
                    "logits, [n, C]."
                )
            looks = noisy or (noise is not None and noise.layers > 0)
            loss = objective.loss(logits, batch)
            module.gradients.zero_()
            loss.backward()  # type: ignore[no-untyped-call]
            penalty = objective.penalty_gradient(module.parameters, received)
            if penalty is not None:
                module.gradients.add_(penalty)
            if settings.clip_norm:
                length = module.gradients.norm()
                module.gradients.mul_(clip_factor(length, settings.clip_norm))
            if changes:
                rate = settings.learning_rate_at(learning_rate, len(losses), total)
                optimizer.set_rate(rate)
            optimizer.step(everything=penalty is not None)
            losses.append(loss.detach())
            sizes.append(len(batch.y))
            outputs.append(logits.detach())
            labels.append(batch.y)
    # One look at the device for all steps.
    means = zip(torch.stack(losses).tolist(), sizes, strict=True)
    correct = torch.cat(outputs).argmax(1) == torch.cat(labels)
    seen = n * task.epochs
    return LocalResult(
        module.save(start),
        loss=sum(loss * size for loss, size in means) / seen,
        accuracy=int(correct.count_nonzero()) / seen,
        num_steps=len(losses),
    )


class _FlatOptimizer:
    """An optimizer on a module's one vector, as long as all of it has gradients."""

    def __init__(
        self, module: FlatModule, settings: TrainingSettings, learning_rate: float
    ) -> None:
        self.module = module
        self.parameters = [module.parameters]
        self.gradients = [module.gradients]
        self.optimizer = LocalOptimizer(settings, learning_rate, self.parameters)
        if self.optimizer.remembers:
            module.fresh_gradients()  # From now on.

    def set_rate(self, rate: float) -> None:
        """Let the next steps have another learning rate."""
        self.optimizer.learning_rate = rate

    def step(self, *, everything: bool) -> None:
        """Use the gradients of this step; all parameters have one if ``everything``."""
        if not self.optimizer.remembers:  # A gradient of 0 is as good as none.
            self.optimizer.step(self.parameters, self.gradients)
            return
        fresh = self.module.fresh_gradients()
        whole = everything or all(fresh)
        if not whole and len(self.parameters) != len(fresh):
            places = [slice(e.start, e.stop) for e in self.module.layout.parameters]
            self.parameters = [self.module.parameters[place] for place in places]
            self.gradients = [self.module.gradients[place] for place in places]
            self.optimizer.divide(places)
        if whole:
            fresh = [True] * len(self.parameters)
        pairs = zip(self.gradients, fresh, strict=True)
        self.optimizer.step(self.parameters, [g if own else None for g, own in pairs])


class _ForeignOptimizer:
    """An optimizer of PyTorch's or the user's on a module's own parameters."""

    def __init__(
        self, module: FlatModule, settings: TrainingSettings, learning_rate: float
    ) -> None:
        assert isinstance(settings.rule, Foreign)
        self.module = module
        named = dict(module.module.named_parameters())
        self.parameters = [named[e.name] for e in module.layout.parameters]
        self.optimizer = settings.rule.made(
            self.parameters, learning_rate, settings.weight_decay
        )
        module.fresh_gradients()  # From now on.

    def set_rate(self, rate: float) -> None:
        """Let the next steps have another learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def step(self, *, everything: bool) -> None:
        """Use the gradients of this step; all parameters have one if ``everything``."""
        kept = [parameter.grad for parameter in self.parameters]
        fresh = self.module.fresh_gradients()
        for parameter, own in zip(self.parameters, fresh, strict=True):
            if not (own or everything):
                parameter.grad = None  # As it is where nothing has asked for it.
        try:
            self.optimizer.step()
        finally:
            for parameter, grad in zip(self.parameters, kept, strict=True):
                parameter.grad = grad
            self.module.fresh_gradients()  # It may have changed them itself.


def evaluate(
    module: FlatModule, model: FlatModel, examples: Examples
) -> tuple[float, float]:
    """Return a model's mean cross-entropy and accuracy on some examples.

    Both are NaN where there are no examples.
    """
    return evaluate_each(module, model, [examples])[0]


def evaluate_each(
    module: FlatModule,
    model: FlatModel,
    parts: Sequence[Examples],
    *,
    apart: bool = False,
) -> list[tuple[float, float]]:
    """Return one model's loss and accuracy on each client's examples.

    The examples of all go through the model together, so that small clients do not
    cost a call each; see :func:`evaluate`. They do not where ``apart`` says so, nor
    where the model turns out to draw random numbers: then each client's are its own.
    """
    if not any(len(part) for part in parts):
        return [(math.nan, math.nan)] * len(parts)
    if apart and len(parts) > 1:
        return [evaluate(module, model, part) for part in parts]
    run = partial(_evaluate_each, module, model)
    device = module.parameters.device
    results, draws = watched(partial(run, parts), device)
    if draws:
        results = []
        for part in parts:
            with own_streams(0, device):
                results += run([part])
    return results


@torch.no_grad()
def _evaluate_each(
    module: FlatModule, model: FlatModel, parts: Sequence[Examples]
) -> list[tuple[float, float]]:
    """Do the work of :func:`evaluate_each`, on the streams as they are."""
    some = [part for part in parts if len(part)]
    if not some:
        return [(math.nan, math.nan)] * len(parts)
    module.load(model)
    module.train(False)
    device = module.parameters.device
    x = [as_tensor(part.x) for part in some]
    y = torch.cat([as_tensor(part.y) for part in some]).to(device)
    losses, correct = [], []
    for first, batch in _batches(x, EVALUATION_BATCH):
        labels = y[first : first + len(batch)]
        logits = module.module(batch.to(device))
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
        correct.append(logits.argmax(1) == labels)
    loss = torch.cat(losses).double().cpu().numpy()
    hits = torch.cat(correct).cpu().numpy()
    ends = np.cumsum([len(part) for part in parts])
    results = []
    for part, end in zip(parts, ends, strict=True):
        own = slice(end - len(part), end)
        known = len(part) > 0
        results.append(
            (float(loss[own].mean()), float(hits[own].mean()))
            if known
            else (math.nan, math.nan)
        )
    return results


def _batches(parts: Sequence[Tensor], size: int) -> Iterator[tuple[int, Tensor]]:
    """Yield rows of several tensors, ``size`` at a time, and where they begin."""
    if len(parts) == 1:
        for first in range(0, len(parts[0]), size):
            yield first, parts[0][first : first + size]
        return
    first, held = 0, list[Tensor]()
    for part in parts:
        while len(part):
            room = size - sum(len(h) for h in held)
            held.append(part[:room])
            part = part[room:]
            if sum(len(h) for h in held) == size:
                yield first, torch.cat(held)
                first, held = first + size, []
    if held:
        yield first, torch.cat(held)
