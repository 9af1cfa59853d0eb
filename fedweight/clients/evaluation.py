"""What a model achieves on clients' examples, added up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..core.layout import FlatModel, as_tensor
from ..core.module import FlatModule
from ..data.examples import Examples
from ..metrics import TASKS, Statistics, Sums
from .noise import own_streams, watched

EVALUATION_BATCH = 1024

# Where examples have a target for each pixel, so many targets at most go at once.
EVALUATION_TARGETS = 1 << 22

CLASSIFIED = Statistics(TASKS["classification"])


def evaluate(
    module: FlatModule,
    model: FlatModel,
    examples: Examples,
    statistics: Statistics = CLASSIFIED,
) -> dict[str, float]:
    """Return what is measured of a model on some examples, by name.

    ``loss``, their mean, and what else the statistics measure: ``accuracy`` by default.
    NaN where there are no examples.
    """
    measured = statistics.result(sums_of_each(module, model, [examples], statistics))
    return {n: float(values[0]) for n, values in measured.items() if values.ndim == 1}


def sums_of_each(
    module: FlatModule,
    model: FlatModel,
    parts: Sequence[Examples],
    statistics: Statistics = CLASSIFIED,
    *,
    apart: bool = False,
) -> Sums:
    """Return what is added up of one model on each client's examples.

    The examples of all go through the model together, so that small clients do not
    cost a call each. They do not where ``apart`` says so, nor where the model turns out
    to draw random numbers: then each client's are their own.
    """
    if not any(len(part) for part in parts):
        return statistics.zero(len(parts))
    if apart and len(parts) > 1:
        each = [sums_of_each(module, model, [part], statistics) for part in parts]
        return Sums.joined(each)
    run = partial(_sums_of_each, module, model, statistics)
    device = module.parameters.device
    result, draws = watched(partial(run, parts), device)
    if draws:
        several = []
        for part in parts:
            with own_streams(0, device):
                several.append(run([part]))
        return Sums.joined(several)
    return result


@torch.no_grad()
def _sums_of_each(
    module: FlatModule,
    model: FlatModel,
    statistics: Statistics,
    parts: Sequence[Examples],
) -> Sums:
    """Do the work of :func:`sums_of_each`, on the streams as they are."""
    adding = statistics.begin([len(part) for part in parts])
    some = [part for part in parts if len(part)]
    if not some:
        return adding.sums()
    module.load(model)
    module.train(False)
    device = module.parameters.device
    x = [as_tensor(part.x) for part in some]
    y = torch.cat([as_tensor(part.y) for part in some]).to(device)
    for first, batch in _batches(x, _batch_size(y)):
        outputs = module.module(batch.to(device))
        adding.add(outputs, y[first : first + len(batch)])
    return adding.sums()


@torch.no_grad()
def outputs_of(module: FlatModule, examples: Examples) -> Tensor:
    """Return what a model makes of some examples, ``[n, ...]``."""
    module.train(False)
    device = module.parameters.device
    x, size = [as_tensor(examples.x)], _batch_size(as_tensor(examples.y))
    with own_streams(0, device):
        each = [module.module(b.to(device)).cpu() for _, b in _batches(x, size)]
    return torch.cat(each)


def _batch_size(y: Tensor) -> int:
    """Return how many examples go through a model at once, with targets ``[n, ...]``.

    Examples
    --------
    >>> _batch_size(torch.zeros(5)), _batch_size(torch.zeros(5, 512, 512))
    (1024, 16)
    """
    targets = math.prod(y.shape[1:])
    return max(1, min(EVALUATION_BATCH, EVALUATION_TARGETS // max(targets, 1)))


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
