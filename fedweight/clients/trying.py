"""Trials of a model: a few steps on a few examples, made in several ways."""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from textwrap import shorten

import numpy as np
import torch
from torch import Tensor, nn

from ..core.batches import least_examples
from ..core.layout import FlatModel, as_tensor
from ..core.module import FlatModule
from ..core.precision import Precision
from ..data.examples import Examples
from .batchable import instead_of
from .coding import Coding
from .noise import LocalTraining, own_streams
from .objectives.base import TOLD, Facts, Objective
from .samples import ROWS
from .settings import TrainingSettings
from .steps._torch.recording import Observer
from .steps.batched import BatchedTrainer
from .steps.loop import run_steps, train
from .steps.task import Known, LocalResult, Task

log = logging.getLogger("fedweight")

# At once it makes batches of the app's size, up to this one: a model may ask how many
# examples there are.
LARGEST_BATCH = 64

SEED = 0

# What an objective does from some round on is tried, too.
LATE = 10**6

# Results are the same if a tensor's changes differ by no more than a share of its
# largest one, or of the model's largest one: what ought to be 0 is rounding. What is
# done twice rounds alike; so do one client alone and at once, in double precision.
SAME = {torch.float64: (1e-6, 1e-9), torch.float32: (1e-3, 1e-4)}
TWICE = (1e-4, 1e-5)
# Where products are of values rounded to 8 bits, only what is no rounding shows.
ROUNDED = (0.2, 0.05)
MIXED = 2e-2


_NO_CODES = Coding()


@dataclass(frozen=True)
class Findings:
    """How a model trains.

    Attributes
    ----------
    least : int
        How many examples a batch needs: 1, or 2 where one alone does not do.
    draws : str
        What draws random numbers from a stream of the process; empty if nothing.
    coarse : str
        The operation that computes in half precision; empty if none does.
    fault : str
        Why a client's result would depend on the process and on who trained there
        before; empty if it does not.
    """

    least: int = 1
    draws: str = ""
    coarse: str = ""
    fault: str = ""


def try_alone(
    make: Callable[[], nn.Module],
    examples: Examples,
    objective: Objective,
    device: str,
    cancelled: Callable[[], bool],
    coding: Coding = _NO_CODES,
) -> Findings:
    """Find out how a model trains, one client after another.

    Parameters
    ----------
    make : Callable[[], nn.Module]
        Makes the architecture.
    examples : Examples
        :data:`ROWS` examples of one client.
    objective : Objective
        What is minimised on a batch.
    device : str
        Where training runs.
    cancelled : Callable[[], bool]
        Asked before every step; once it says yes, this raises.
    coding : Coding
        How classes and groups are coded.

    Raises
    ------
    Exception
        Whatever keeps the model from training on these examples.
    """
    modules = []
    for seed in (SEED, SEED + 1):
        with own_streams(seed, torch.device(device)):
            modules.append(FlatModule(make(), device))
    module, other = modules
    start = module.save()

    def run(
        module: FlatModule, rows: slice, epochs: int = 2, rate: float = 0.01
    ) -> tuple[LocalResult, list[str]]:
        """Train as a client with these examples; tell which streams were drawn from."""
        size = start.layout.num_parameters
        task = task_of(examples.take(rows), epochs, SEED, objective, coding, size)
        with own_streams(SEED, module.parameters.device):
            before = _streams(module.parameters.device)
            result = run_steps(
                module,
                start,
                task,
                objective,
                TrainingSettings(batch_size=ROWS),
                learning_rate=rate,
                least=1,
                cancelled=cancelled,
                noisy=True,
            )
            after = _streams(module.parameters.device)
        return result, [name for name in before if before[name] != after[name]]

    def can_train(k: int) -> bool:
        try:
            result, _ = run(module, slice(k), epochs=1, rate=0.0)
        except Exception:
            if cancelled():
                raise
            return False
        vectors = result.model.parameters, result.model.buffers
        finite = all(vector.isfinite().all() for vector in vectors)
        return finite and math.isfinite(result.loss)

    # The same client as the first of a process, and after another.
    first, drawn = run(module, slice(0, 2))
    run(other, slice(2, ROWS))
    later, _ = run(other, slice(0, 2))
    least = least_examples(can_train)
    operations, coarse = _observed(module, start, examples)
    fault = ""
    if different := _difference(later, first, start, TWICE):
        by = f" ({', '.join(operations)})" if operations else ""
        fault = (
            f"a client that trains in another process, after another client, gets "
            f"{different}. What its code keeps, or draws when it is built, must be a "
            f"parameter or a buffer; and random numbers must come from PyTorch's own "
            f"stream, not from a generator of the model's{by}."
        )
    draws = (operations or drawn)[0] if drawn else ""
    return Findings(least, draws, coarse, fault)


def task_of(
    examples: Examples,
    epochs: int,
    key: int,
    objective: Objective,
    coding: Coding,
    size: int,
) -> Task:
    """Return a client's task, as if all clients had twice its examples together.

    ``size`` is P, how many parameters are trained.
    """
    totals: list[int] = []
    if coding.task.has_classes:
        counts = np.bincount(examples.y, minlength=coding.num_classes)
        totals = (2 * counts).tolist()
    facts = coding.facts(objective, examples, totals, LATE)
    x = as_tensor(examples.x)
    heard = objective.unheard(x, Facts(torch.zeros(size), facts))
    # What is as long as the model is taken to be of every parameter.
    shared = {name: one for name, one in heard.items() if one.shape == (size,)}
    facts |= {TOLD + name: one for name, one in heard.items() if name not in shared}
    known = Known(facts, groups=coding.groups(objective, examples), shared=shared)
    return Task(examples, epochs, key, key, known)


def _streams(device: torch.device) -> dict[str, object]:
    """Return the states of the process's random streams, by name."""
    _, words, *place = np.random.get_state()  # noqa: NPY002
    states: dict[str, object] = {
        "PyTorch's stream": torch.default_generator.get_state().numpy().tobytes(),
        "NumPy's stream": (np.asarray(words).tobytes(), *place),
        "Python's stream": random.getstate(),
    }
    if device.type == "cuda":
        states["the GPU's stream"] = torch.cuda.get_rng_state(device).numpy().tobytes()
    return states


def _observed(
    module: FlatModule, start: FlatModel, examples: Examples
) -> tuple[list[str], str]:
    """Return the operations that draw in two forward passes, and one that is coarse."""
    module.load(start)
    module.train()
    x = as_tensor(examples.x).to(module.parameters.device)
    with own_streams(SEED, module.parameters.device):
        try:
            observer = Observer()
        except RuntimeError:  # PyTorch lets nobody look any more.
            return [], ""
        for step in range(2):
            with LocalTraining(SEED, step), observer:
                module(x.clone())
    return sorted(observer.draws), observer.coarse


def try_batched(
    make: Callable[[], nn.Module],
    examples: Examples,
    objective: Objective,
    device: str,
    findings: Findings,
    batch_size: int,
    cancelled: Callable[[], bool] = lambda: False,
    coding: Coding = _NO_CODES,
    *,
    precision: Precision = "fp32",
    traced: bool = True,
) -> str:
    """Return why clients must not train at once; empty where it gives the same.

    In double precision where the model allows it, so that rounding is no difference;
    and in the one that clients compute in, where that is another step.

    Parameters
    ----------
    findings : Findings
        What :func:`try_alone` found; the other parameters are its, too.
    batch_size : int
        How many examples a batch has.
    precision : {"fp32", "tf32", "bf16"}
        In which clients compute.
    traced : bool
        Whether the step of many clients at once is traced.
    """
    if findings.draws:
        return (
            f"it draws random numbers from a stream of the process ({findings.draws})"
        )
    if findings.coarse:
        return (
            f"it computes in half precision, where rounding shows ({findings.coarse})"
        )
    size = min(batch_size, LARGEST_BATCH)
    run = partial(
        _compare,
        make,
        examples,
        objective,
        device,
        findings.least,
        size,
        cancelled,
        coding,
    )
    with own_streams(SEED, torch.device(device)):
        try:
            why = run(double=True, traced=traced)
        except Exception as error:
            if cancelled():
                raise
            log.debug("a trial in double precision failed: %s", error)
            why = run(double=False, traced=traced)
        if why or precision != "bf16":
            return why
        why = run(double=False, traced=traced, precision=precision)
        return why and f"with precision 'bf16' {why}"


def _compare(
    make: Callable[[], nn.Module],
    examples: Examples,
    objective: Objective,
    device: str,
    least: int,
    size: int,
    cancelled: Callable[[], bool],
    coding: Coding,
    *,
    double: bool,
    traced: bool,
    precision: Precision = "fp32",
) -> str:
    """Train a few clients alone and at once; return what is different, if anything."""

    def built() -> FlatModule:
        module = make()
        # A copy: somebody else may have the module.
        module = copy.deepcopy(module)
        return FlatModule(module.double() if double else module, device, precision)

    some = examples.take(np.resize(np.arange(ROWS), size + 1))
    if double and some.x.dtype == np.float32:
        some = replace(some, x=some.x.astype(np.float64))
    settings = TrainingSettings(batch_size=size)
    module = built()
    start = module.save()
    alone = partial(
        train,
        module,
        start,
        objective=objective,
        settings=settings,
        least=least,
        cancelled=cancelled,
    )
    trainer = BatchedTrainer(
        built(), objective, settings, least=least, compiled=False, traced=traced
    )

    def task(k: int, n: int, epochs: int) -> Task:
        parameters = start.layout.num_parameters
        own = some.take(slice(n))
        return task_of(own, epochs, SEED + k, objective, coding, parameters)

    # A rate at which the largest change of a step is small.
    slope = alone(task=task(0, size, 1), learning_rate=1.0)
    largest = max(map(_largest, _changes(slope, start)), default=0.0)
    rate = min(0.1, 0.05 / largest) if largest > 0 else 0.1
    tolerance = ROUNDED if precision == "bf16" else SAME[start.layout.dtype]
    for full in (True, False):
        # Of the others one has a batch that is not full, and a step more, or an
        # example that has joined a batch; and one is done before the others.
        sizes = ((size, 2), (size, 2)) if full else ((size + 1, 1), (2, 1), (least, 2))
        tasks = [task(k, *own) for k, own in enumerate(sizes)]
        expected = [alone(task=t, learning_rate=rate) for t in tasks]
        try:
            found = trainer.train(start, tasks, learning_rate=rate, cancelled=cancelled)
        except Exception as error:
            if cancelled():
                raise
            line, *_ = str(error).splitlines() or [""]
            kind, where = type(error).__name__, instead_of(error)
            if where:
                return f"its step cannot be batched: {where} ({kind})"
            return f"its step cannot be batched ({kind}: {shorten(line, 100)})"
        for one, other in zip(found, expected, strict=True):
            different = _difference(one, other, start, tolerance)
            if different and full:
                return f"at once it gives {different}"
            if different:
                return (
                    f"a batch that is not full gives {different}, as where a layer "
                    "looks across the batch"
                )
    return ""


def mixes_examples(
    make: Callable[[], nn.Module], examples: Examples, device: str
) -> bool:
    """Tell whether a model's outputs for an example depend on others in the batch.

    In evaluation; a model that cannot take one example alone is taken not to.
    """
    with own_streams(SEED, torch.device(device)), torch.no_grad():
        module = FlatModule(make(), device)
        module.train(False)
        x = as_tensor(examples.x).to(module.parameters.device)
        together = module(x.clone())  # It may change its inputs.
        alone = [module(x[k : k + 1].clone()) for k in range(len(x))]
        apart = torch.cat(alone)
    tolerance = MIXED * together.abs().max().item()
    return not torch.allclose(together, apart, rtol=0, atol=tolerance, equal_nan=True)


def _difference(
    one: LocalResult,
    other: LocalResult,
    start: FlatModel,
    tolerance: tuple[float, float],
) -> str:
    """Return in what two results differ by more than rounding; empty if in nothing."""
    of_tensor, of_model = tolerance
    changes = _changes(other, start)
    largest = max((_largest(change) for change in changes), default=0.0)
    names = [e.name for e in start.layout.entries if e.kind != "integer"]
    pairs = zip(names, _changes(one, start), changes, strict=True)
    for name, found, expected in pairs:
        allowed = of_tensor * _largest(expected) + of_model * largest
        if not torch.allclose(found, expected, rtol=0, atol=allowed, equal_nan=True):
            return f"another '{name}'"
    for name, values in other.model.integers.items():
        if not np.array_equal(one.model.integers[name], values):
            return f"another '{name}'"
    if not np.isclose(one.loss, other.loss, of_tensor, of_tensor, equal_nan=True):
        return "another loss"
    return ""


def _largest(values: Tensor) -> float:
    """Return the largest finite size among some values, or 0."""
    sizes = values.abs().nan_to_num(nan=0.0, posinf=0.0)
    return sizes.max().item() if sizes.numel() else 0.0


def _changes(result: LocalResult, start: FlatModel) -> Sequence[Tensor]:
    """Return what training changed, for each floating tensor."""
    pairs = zip(result.model.named_arrays(), start.named_arrays(), strict=True)
    return [
        torch.as_tensor(np.subtract(after, before, dtype=np.float64))
        for (_, after), (_, before) in pairs
        if np.issubdtype(before.dtype, np.floating)
    ]
