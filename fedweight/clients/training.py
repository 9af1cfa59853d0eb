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


class LocalOptimizer:
    """SGD or Adam as ``torch.optim`` defines them, to the bit, on a few tensors.

    Parameters
    ----------
    settings : TrainingSettings
        Which, and its parameters.
    learning_rate : float
        Of this round.
    parameters : Sequence[Tensor]
        What will be optimised: one vector of a client, or tensors of many clients.

    Attributes
    ----------
    remembers : bool
        Whether it moves a tensor whose gradient is 0, by its weight decay or by
        gradients before: then it matters that ``torch.optim`` leaves a tensor alone
        that has no gradient.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        learning_rate: float,
        parameters: Sequence[Tensor],
    ) -> None:
        self.settings = settings
        self.learning_rate = learning_rate
        adam = settings.optimizer == "adam"
        moments = parameters if adam or settings.momentum else ()
        self.first = [torch.zeros_like(p) for p in moments]
        self.second = [torch.zeros_like(p) for p in moments] if adam else []
        self.num_steps = [0] * len(parameters)
        self.remembers = bool(moments or settings.weight_decay)

    def divide(self, places: Sequence[slice]) -> None:
        """Go on with parts of the one vector that it has had so far."""
        self.first = [v[place] for v in self.first for place in places]
        self.second = [v[place] for v in self.second for place in places]
        self.num_steps *= len(places)

    def step(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> None:
        """Change the parameters in place; the gradients stay.

        A parameter whose gradient is ``None`` is left alone.
        """
        for k, (w, g) in enumerate(zip(parameters, gradients, strict=True)):
            if g is None:
                continue
            self.num_steps[k] += 1
            if self.settings.weight_decay:
                # Not in place: two parameters may have one tensor as their gradient.
                g = g.add(w, alpha=self.settings.weight_decay)
            if self.second:
                self._adam(k, w, g)
                continue
            if self.first:
                g = self.first[k].mul_(self.settings.momentum).add_(g)
            w.add_(g, alpha=-self.learning_rate)

    def _adam(self, k: int, w: Tensor, g: Tensor) -> None:
        beta_1, beta_2, epsilon = 0.9, 0.999, 1e-8
        m, v, steps = self.first[k], self.second[k], self.num_steps[k]
        rate = self.learning_rate / (1 - beta_1**steps)
        root = (1 - beta_2**steps) ** 0.5
        m.lerp_(g, 1 - beta_1)
        v.mul_(beta_2).addcmul_(g, g, value=1 - beta_2)
        w.addcdiv_(m, v.sqrt().div_(root).add_(epsilon), value=-rate)


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
        Of this round.
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
    optimizer = _FlatOptimizer(module, settings, learning_rate)
    losses: list[Tensor] = []
    sizes: list[int] = []
    outputs: list[Tensor] = []
    labels: list[Tensor] = []
    parts = batches(n, settings.batch_size, least)
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
