"""Mistakes in an objective of one's own, found before the first round."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..core.errors import ClientError, ConfigurationError, FedweightError
from ..core.module import FlatModule
from ..core.texts import plain
from ..data.examples import Examples
from .batchable import place_of
from .coding import Coding
from .noise import own_streams
from .objectives.base import Objective
from .objectives.checks import check_declared
from .objectives.plain import Plain
from .samples import ROWS
from .settings import TrainingSettings
from .steps.loop import train
from .task_objectives import for_task
from .trying import SEED, task_of


def is_own(objective: Objective) -> bool:
    """Tell whether an objective, or one inside it, is not this library's."""
    module = type(objective).__module__
    inner = getattr(objective, "inner", None)
    inside = isinstance(inner, Objective) and is_own(inner)
    return inside or module.partition(".")[0] != __name__.partition(".")[0]


def check_own(
    make: Callable[[], nn.Module],
    examples: Examples,
    objective: Objective,
    device: str,
    coding: Coding,
) -> None:
    """Train with an objective for a step; say in one line why that cannot be.

    Parameters
    ----------
    make : Callable[[], nn.Module]
        Makes the architecture.
    examples : Examples
        A few of one client.
    objective : Objective
        What is minimised on a batch.
    device : str
        Where it runs.
    coding : Coding
        How classes and groups are coded.

    Raises
    ------
    ConfigurationError
        If it wants what there is not, trains nothing, or a step with it raises, though
        one with the task's own loss does not.
    """
    name = f"objective {type(objective).__name__}"
    check_declared(objective)
    try:
        module = _step(make, examples, objective, device, coding)
    except (Exception, SystemExit) as error:  # On a device its process would end.
        try:
            _step(make, examples, for_task(Plain(), coding.task), device, coding)
        except Exception:  # It is not the objective: the clients will say what it is.
            return
        raise ConfigurationError(_said(name, error)) from error
    names = [e.name for e in module.layout.parameters]
    if not any(objective.trains(one) for one in names):
        raise ConfigurationError(
            f"{name}: trains() is False for every parameter of the model, so nothing "
            f"would be trained. There are {plain(', '.join(names))}."
        )


def _step(
    make: Callable[[], nn.Module],
    examples: Examples,
    objective: Objective,
    device: str,
    coding: Coding,
) -> FlatModule:
    """Make a step with an objective, as a client does that has these examples."""
    with own_streams(SEED, torch.device(device)):
        module = FlatModule(make(), device)
        size = module.layout.num_parameters
        start, task = module.save(), task_of(examples, 1, SEED, objective, coding, size)
        told = [start.parameters, *task.known.facts.values()]
        told += task.known.shared.values()
        before = [tensor.clone() for tensor in told]
        train(
            module,
            start,
            task,
            objective,
            TrainingSettings(batch_size=ROWS),
            learning_rate=0.01,
        )
    if not all(map(torch.equal, told, before)):
        raise ClientError(
            f"objective {type(objective).__name__}: it changes in place what facts "
            "tells it, which other steps and clients are told, too. Make new tensors: "
            "a + 1 in place of a += 1."
        )
    return module


def _said(name: str, error: BaseException) -> str:
    """Return what went wrong in one line, and where."""
    place, _ = place_of(error)
    reason = plain((str(error).splitlines() or [""])[0])
    if isinstance(error, FedweightError):
        if reason.startswith(name):
            return reason
        return f"{name}: {reason.removeprefix('objective: ')}"
    where = f"{place}: " if place else ""
    return f"{name}: {where}{type(error).__name__}: {reason}".rstrip(".:") + "."
