"""Local training: from the global model and a client's data to its local model.

A pure function of the received model, the examples, the random stream and the
objective; which process it runs in, and after which other client, does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...core.batches import batches
from ...core.errors import ClientError
from ...core.layout import FlatModel, as_tensor
from ...core.module import FlatModule
from ...core.rng import permutation
from ..noise import own_streams, watched
from ..objectives.base import Batch, Objective
from ..optimizers import Foreign, clip_factor
from ..settings import TrainingSettings
from .hits import hits_of
from .module_optimizers import FlatOptimizer, ForeignOptimizer
from .module_step import ModuleStep
from .task import LocalResult, Task, groups_of


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
        begun = start if task.own is None else task.own
        return LocalResult(begun, math.nan, math.nan, 0)
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
    module.load(start if task.own is None else task.own)
    n = len(task.examples)
    device = module.parameters.device
    x, y = as_tensor(task.examples.x).to(device), as_tensor(task.examples.y).to(device)
    groups = None
    if "groups" in objective.wants:
        groups = as_tensor(groups_of(task)).to(device)
    foreign = isinstance(settings.rule, Foreign)
    kind = ForeignOptimizer if foreign else FlatOptimizer
    client = ModuleStep(module, start, task, objective, noisy=noisy)
    optimizer = kind(module, settings, learning_rate, client.trained)
    losses: list[Tensor] = []
    sizes: list[int] = []
    outputs: list[Tensor] = []
    labels: list[Tensor] = []
    hits: list[Tensor] = []
    many = y.ndim > 1  # Of outputs, such as one a pixel, there would be too many.
    parts = batches(n, settings.batch_size, least)
    changes, total = settings.rate_schedule.over_steps, len(parts) * task.epochs
    module.train()
    for epoch in range(task.epochs):
        order = torch.from_numpy(permutation(task.order_key, epoch, n)).to(device)
        shuffled_x, shuffled_y = x.index_select(0, order), y.index_select(0, order)
        for part in parts:
            if cancelled():
                raise ClientError("training was cancelled")
            batch = Batch(shuffled_x[part], shuffled_y[part])
            if groups is not None:
                batch.groups = groups.index_select(0, order[part])
            loss, penalised = client.gradient(batch, order[part], len(losses))
            if settings.clip_norm:
                length = module.gradients.norm()
                module.gradients.mul_(clip_factor(length, settings.clip_norm))
            if changes:
                rate = settings.learning_rate_at(learning_rate, len(losses), total)
                optimizer.set_rate(rate)
            optimizer.step(everything=penalised)
            client.change_after()
            losses.append(loss.value.detach())
            sizes.append(len(batch.y))
            if many:
                hits.append(hits_of(loss.outputs.detach(), batch.y))
            else:
                outputs.append(loss.outputs.detach())
                labels.append(batch.y)
    # One look at the device for all steps.
    means = zip(torch.stack(losses).tolist(), sizes, strict=True)
    if not many:
        hits = [hits_of(torch.cat(outputs), torch.cat(labels))]
    correct = torch.cat(hits).sum()
    seen = n * task.epochs
    return LocalResult(
        module.save(start),
        loss=sum(loss * size for loss, size in means) / seen,
        accuracy=float(correct) / seen,
        num_steps=len(losses),
        carry={name: value.cpu() for name, value in client.carry.items()},
        kept={name: value.cpu() for name, value in client.kept.items()},
    )
