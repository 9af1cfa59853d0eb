"""Local training: from the global model and a client's data to its local model.

A pure function of the received model, the examples, the random stream and the
objective; which process it runs in, and after which other client, does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.examples import Examples
from ..errors import ClientError, check_choice, check_range
from ..parameters import FlatModel, FlatModule, as_tensor
from ..rng import permutation
from .noise import LocalTraining
from .objectives import Batch, Objective

EVALUATION_BATCH = 1024


@dataclass(frozen=True)
class TrainingSettings:
    """How a client trains.

    Parameters
    ----------
    epochs : int
        Passes over the client's data in a round, 1 or more.
    batch_size : int
        Examples in a step, 1 or more; the last step of a pass takes what is left.
    optimizer : {"sgd", "adam"}
        Fresh in every round.
    learning_rate : float
        0 or more.
    learning_rate_decay : float
        In (0, 1]; round t trains with ``learning_rate * decay ** (t - 1)``.
    momentum : float
        In [0, 1); for ``sgd``.
    weight_decay : float
        0 or more; the strength of the L2 term, in the gradient.
    """

    epochs: int = 1
    batch_size: int = 32
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    learning_rate_decay: float = 1.0
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range("epochs", self.epochs, 1)
        check_range("batch_size", self.batch_size, 1)
        check_choice("optimizer", self.optimizer, ["sgd", "adam"])
        check_range("learning_rate", self.learning_rate, 0)
        check_range(
            "learning_rate_decay", self.learning_rate_decay, 0, 1, low_open=True
        )
        check_range("momentum", self.momentum, 0, 1, high_open=True)
        check_range("weight_decay", self.weight_decay, 0)

    def learning_rate_in(self, round: int) -> float:
        """Return the learning rate of a round, which count from 1."""
        return float(self.learning_rate * self.learning_rate_decay ** (round - 1))

    @property
    def diverging_mu(self) -> float:
        """From which ``mu`` on a proximal term alone makes training diverge.

        A step of SGD multiplies the distance from the received model by ``1 -
        learning_rate * mu``, so it grows from ``2 / learning_rate`` on; with momentum
        from ``2 * (1 + momentum) / learning_rate`` on. Adam's steps do not grow.

        Examples
        --------
        >>> TrainingSettings(learning_rate=0.1).diverging_mu
        20.0
        """
        if self.optimizer != "sgd" or not self.learning_rate:
            return math.inf
        return 2 * (1 + self.momentum) / self.learning_rate


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
    """SGD or Adam as ``torch.optim`` defines them, on a few tensors.

    Parameters
    ----------
    settings : TrainingSettings
        Which, and its parameters.
    learning_rate : float
        Of this round.
    parameters : Sequence[Tensor]
        What will be optimised: one vector of a client, or tensors of many clients.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        learning_rate: float,
        parameters: Sequence[Tensor],
    ) -> None:
        self.settings = settings
        self.learning_rate = learning_rate
        self.num_steps = 0
        adam = settings.optimizer == "adam"
        moments = parameters if adam or settings.momentum else ()
        self.first = [torch.zeros_like(p) for p in moments]
        self.second = [torch.zeros_like(p) for p in moments] if adam else []

    def step(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Change the parameters in place; the gradients stay."""
        self.num_steps += 1
        if self.settings.weight_decay:
            # Not in place: two parameters may have one tensor as their gradient.
            gradients = [
                g.add(w, alpha=self.settings.weight_decay)
                for w, g in zip(parameters, gradients, strict=True)
            ]
        if self.second:
            self._adam(parameters, gradients)
            return
        if self.first:
            for v, g in zip(self.first, gradients, strict=True):
                v.mul_(self.settings.momentum).add_(g)
            gradients = self.first
        for w, g in zip(parameters, gradients, strict=True):
            w.add_(g, alpha=-self.learning_rate)

    def _adam(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        beta_1, beta_2, epsilon = 0.9, 0.999, 1e-8
        rate = self.learning_rate / (1 - beta_1**self.num_steps)
        root = (1 - beta_2**self.num_steps) ** 0.5
        for w, g, m, v in zip(
            parameters, gradients, self.first, self.second, strict=True
        ):
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
    cancelled : Callable[[], bool]
        Asked before every step; once it says yes, training raises.

    Returns
    -------
    LocalResult
        The local model, after ``epochs * ceil(n / batch_size)`` steps.
    """
    module.load(start)
    n = len(task.examples)
    if n == 0:
        return LocalResult(start, math.nan, math.nan, 0)
    device = module.parameters.device
    x, y = as_tensor(task.examples.x).to(device), as_tensor(task.examples.y).to(device)
    received = start.parameters.to(device)
    optimizer = LocalOptimizer(settings, learning_rate, [module.parameters])
    losses: list[Tensor] = []
    sizes: list[int] = []
    outputs: list[Tensor] = []
    labels: list[Tensor] = []
    noisy = True  # Whether the model draws noise is known after its first step.
    module.train()
    for epoch in range(task.epochs):
        order = torch.from_numpy(permutation(task.order_key, epoch, n)).to(device)
        shuffled_x, shuffled_y = x.index_select(0, order), y.index_select(0, order)
        for first in range(0, n, settings.batch_size):
            if cancelled():
                raise ClientError("training was cancelled")
            last = min(first + settings.batch_size, n)
            batch = Batch(shuffled_x[first:last], shuffled_y[first:last])
            noise = LocalTraining(task.noise_key, len(losses)) if noisy else None
            with noise or nullcontext():
                logits = module.module(batch.x)
            noisy = noise is not None and noise.layers > 0
            loss = objective.loss(logits, batch)
            module.gradients.zero_()
            loss.backward()  # type: ignore[no-untyped-call]
            penalty = objective.penalty_gradient(module.parameters, received)
            if penalty is not None:
                module.gradients.add_(penalty)
            optimizer.step([module.parameters], [module.gradients])
            losses.append(loss.detach())
            sizes.append(last - first)
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


def evaluate(
    module: FlatModule, model: FlatModel, examples: Examples
) -> tuple[float, float]:
    """Return a model's mean cross-entropy and accuracy on some examples.

    Both are NaN where there are no examples.
    """
    return evaluate_each(module, model, [examples])[0]


@torch.no_grad()
def evaluate_each(
    module: FlatModule, model: FlatModel, parts: Sequence[Examples]
) -> list[tuple[float, float]]:
    """Return one model's loss and accuracy on each client's examples.

    The examples of all go through the model together, so that small clients do not
    cost a call each; see :func:`evaluate`.
    """
    if not any(len(part) for part in parts):
        return [(math.nan, math.nan)] * len(parts)
    module.load(model)
    module.train(False)
    device = module.parameters.device
    some = [part for part in parts if len(part)]
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
