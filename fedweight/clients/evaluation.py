"""A model's loss and accuracy on clients' examples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.layout import FlatModel, as_tensor
from ..core.module import FlatModule
from ..data.examples import Examples
from .noise import own_streams, watched

EVALUATION_BATCH = 1024


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
