"""What a model achieves on clients' examples, added up."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core.layout import FlatModel, as_tensor
from ..core.module import FlatModule
from ..data.examples import Examples
from ..metrics import TASKS, Statistics, Sums
from .noise import STREAMS, own_streams, watched
from .steps._torch.differentiation import plain_attention

Array = npt.NDArray[Any]

EVALUATION_BATCH = 1024

# Where examples have a target for each pixel, so many targets at most go at once.
EVALUATION_TARGETS = 1 << 22

# So many examples of all clients together, where each has a model of its own.
AT_ONCE = 4096

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
    return measured_of(statistics, sums_of_each(module, model, [examples], statistics))


def measured_of(statistics: Statistics, sums: Sums) -> dict[str, float]:
    """Return what is measured of one client's sums, by name."""
    measured = statistics.result(sums)
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
    adding = statistics.begin(
        [len(part) for part in parts], [part.attributes for part in parts]
    )
    some = [part for part in parts if len(part)]
    if not some:
        return adding.sums()
    module.load(model)
    module.train(False)
    device = module.parameters.device
    y = _joined([part.y for part in some]).to(device)
    for first, batch in _batches([part.x for part in some], _batch_size(y), device):
        outputs = module(batch)
        adding.add(outputs, y[first : first + len(batch)])
    return adding.sums()


@torch.no_grad()
def sums_of_own(
    module: FlatModule,
    models: Sequence[FlatModel],
    parts: Sequence[Examples],
    statistics: Statistics = CLASSIFIED,
) -> Sums:
    """Return what is added up of C clients' own models on each one's examples, at once.

    What :func:`sums_of_each` gives of each alone, to rounding: for a model that looks
    across a batch, or draws random numbers, it is not meant.

    Parameters
    ----------
    module : FlatModule
        The architecture.
    models : Sequence[FlatModel]
        C, of one layout, with the same frozen values.
    parts : Sequence[Examples]
        C; of one kind of input.
    statistics : Statistics
        What is added up.
    """
    sizes = np.array([len(part) for part in parts], np.int64)
    adding = statistics.begin(sizes.tolist())
    if not sizes.any():
        return adding.sums()
    own = _Own.of(module, models)
    device = module.parameters.device
    some = [part for part in parts if len(part)]
    x = _joined([part.x for part in some]).to(device)
    y = _joined([part.y for part in some]).to(device)
    starts = np.cumsum(sizes) - sizes
    outputs: Tensor | None = None
    width = max(1, AT_ONCE // len(parts))
    with STREAMS.alone(), plain_attention():
        for first in range(0, int(sizes.max()), width):
            left = np.flatnonzero(sizes > first)
            places = np.arange(first, min(first + width, int(sizes.max())))
            # A client that has fewer examples shows its last one again.
            rows = starts[left, None] + np.minimum(places, sizes[left, None] - 1)
            real = (places < sizes[left, None]).ravel()
            index = torch.from_numpy(rows).to(device)
            found = own.only(left, len(parts)).outputs(x[index]).flatten(0, 1)
            if outputs is None:
                outputs = found.new_empty(len(x), *found.shape[1:])
            # Chosen by numbers that are known here: by flags, a device is waited for.
            into = torch.from_numpy(rows.ravel()[real]).to(device)
            kept = torch.from_numpy(np.flatnonzero(real)).to(device)
            outputs.index_copy_(0, into, found.index_select(0, kept))
    assert outputs is not None
    adding.add(outputs, y)
    return adding.sums()


@dataclass(frozen=True)
class _Own:
    """Several models of one architecture, tensor by tensor: ``[C, *shape]`` each."""

    module: FlatModule
    tensors: dict[str, Tensor]
    shared: dict[str, Tensor]

    @classmethod
    def of(cls, module: FlatModule, models: Sequence[FlatModel]) -> _Own:
        """Lay some models beside each other."""
        module.load(models[0])  # What is frozen is in its place then.
        module.train(False)
        vectors, device = module.parameters, module.parameters.device
        rows = {
            "parameter": torch.stack([m.parameters for m in models]).to(vectors),
            "buffer": torch.stack([m.buffers for m in models]).to(vectors),
        }
        tensors, shared = {}, {}
        for e in module.layout.entries:
            if e.kind in rows:
                part = rows[e.kind][:, e.start : e.stop]
                tensors[e.name] = part.view(len(models), *e.shape)
            elif e.kind == "frozen":
                shared[e.name] = module.frozen[e.start : e.stop].view(e.shape)
            elif e.kind == "integer":
                values = np.stack([np.asarray(m.integers[e.name]) for m in models])
                tensors[e.name] = torch.from_numpy(values).to(device)
        return cls(module, tensors, shared)

    def only(self, some: npt.NDArray[np.int64], count: int) -> _Own:
        """Return some of them."""
        if len(some) == count:
            return self
        rows = torch.from_numpy(some).to(self.module.parameters.device)
        tensors = {n: t.index_select(0, rows) for n, t in self.tensors.items()}
        return _Own(self.module, tensors, self.shared)

    def outputs(self, x: Tensor) -> Tensor:
        """Return what each gives for its inputs: ``[C, n, ...]`` of ``[C, n, ...]``."""

        def of_client(own: dict[str, Tensor], x: Tensor) -> Tensor:
            state = {**self.shared, **own}
            outputs: Tensor = self.module.with_values(state, x)
            return outputs

        batched: Callable[..., Tensor] = torch.func.vmap(of_client)
        return batched(self.tensors, x)


def outputs_of(module: FlatModule, examples: Examples) -> Tensor:
    """Return what a model makes of some examples, ``[n, ...]``."""
    with own_streams(0, module.parameters.device):
        return _outputs(module, [examples])


def outputs_of_each(
    module: FlatModule,
    model: FlatModel,
    parts: Sequence[Examples],
    *,
    apart: bool = False,
) -> list[Tensor]:
    """Return what one model makes of each client's examples, ``[n, ...]`` each.

    All together or each alone, as :func:`sums_of_each` evaluates them.
    """
    some = [part for part in parts if len(part)]
    if not apart and len(some) > 1:
        module.load(model)
        work = partial(_outputs, module, some)
        found, draws = watched(work, module.parameters.device)
        if not draws:
            return list(torch.split(found, [len(part) for part in parts]))
    nothing = torch.zeros(0)
    return [predicted(module, model, p) if len(p) else nothing for p in parts]


@torch.no_grad()
def _outputs(module: FlatModule, parts: Sequence[Examples]) -> Tensor:
    """Do the work of :func:`outputs_of`, on the streams as they are."""
    module.train(False)
    x, size = [part.x for part in parts], _batch_size(as_tensor(parts[0].y))
    batches = _batches(x, size, module.parameters.device)
    return torch.cat([module(batch).cpu() for _, batch in batches])


def within(values: Sequence[int], most: int) -> Iterator[range]:
    """Yield consecutive places, of which the values add up to ``most``, or are one's.

    Examples
    --------
    >>> list(within([2, 3, 1, 9, 1], 5))
    [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    """
    first = total = 0
    for place, value in enumerate(values):
        if place > first and total + value > most:
            yield range(first, place)
            first, total = place, 0
        total += value
    if first < len(values):
        yield range(first, len(values))


def _batch_size(y: Tensor) -> int:
    """Return how many examples go through a model at once, with targets ``[n, ...]``.

    Examples
    --------
    >>> _batch_size(torch.zeros(5)), _batch_size(torch.zeros(5, 512, 512))
    (1024, 16)
    """
    targets = math.prod(y.shape[1:])
    return max(1, min(EVALUATION_BATCH, EVALUATION_TARGETS // max(targets, 1)))


def predicted(module: FlatModule, model: FlatModel, examples: Examples) -> Tensor:
    """Return what a model makes of some examples, as :func:`outputs_of` does."""
    module.load(model)
    return outputs_of(module, examples)


def _batches(
    parts: Sequence[Array], size: int, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Yield rows of several arrays, ``size`` at a time, and where they begin.

    They are copies: a model may change its inputs, as ``ReLU(inplace=True)`` does.
    """
    ends = [*accumulate(map(len, parts))]
    for first in range(0, ends[-1], size):
        stop = min(first + size, ends[-1])
        low, high = bisect_right(ends, first), bisect_left(ends, stop)
        some = [*parts[low : high + 1]]
        some[-1] = some[-1][: stop - (ends[high] - len(parts[high]))]
        some[0] = some[0][first - (ends[low] - len(parts[low])) :]
        yield first, _joined(some).to(device, copy=len(some) == 1)


def _joined(parts: Sequence[Array]) -> Tensor:
    """Return the rows of several arrays as one; of one array without a copy.

    In PyTorch's memory: what products of matrices are to the last bit may depend on
    where memory begins, and NumPy's begins anywhere.
    """
    several = [as_tensor(part) for part in parts]
    return several[0] if len(several) == 1 else torch.cat(several)
