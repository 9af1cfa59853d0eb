"""Choosing a plan: a short measurement of the actual model, data and devices.

What was chosen is kept in a file of the machine, so that the same configuration goes
on giving the same bits on it; and it is part of the run's record.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord
from torch import nn

from ..core.errors import OutputError
from ..core.paths import cache_folder
from ..core.threads import num_cores
from ..core.version import __version__
from ..core.writing import write_whole
from .grid import usable_plan
from .measuring import AppOf, Meter, await_device
from .plan import Plan, sizes_of
from .plan_search import Search

log = logging.getLogger("fedweight")

# A run shorter than this many seconds on a CPU, by the estimate below, is not worth
# measuring; where there is a card, too, it is from the second number on.
WORTH_MEASURING, WORTH_A_CARD = 3.0, 1.0

# Seconds that a step costs PyTorch besides its arithmetic, and floating-point
# operations a second: rough, because only the order of magnitude matters.
STEP_OVERHEAD, OPERATIONS = 2e-4, 3e10

# So many clients at once are tried first, and then twice as many each time.
FIRST_CHUNK = 10

# The file's format: what another one holds is passed over.
FORMAT = 2


def estimated_seconds(num_steps: int, batch_size: int, num_parameters: int) -> float:
    """Return about how long so many steps of a dense model take, one by one.

    Examples
    --------
    >>> estimated_seconds(num_steps=10_000, batch_size=32, num_parameters=50_000)
    5.2
    """
    operations = 6 * batch_size * num_parameters
    return round(num_steps * (STEP_OVERHEAD + operations / OPERATIONS), 1)


def convolves(model: nn.Module) -> bool:
    """Tell whether a model has convolutions."""
    return any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())


def plans_for(device: str, model: nn.Module, cohort: int) -> list[Plan]:
    """Return the plans that may be the fastest on a device, the smallest first.

    On a CPU convolutions of many clients at once are slower, always. On a card all of
    a cohort may train at once: it is one queue of work.

    Examples
    --------
    >>> [str(plan) for plan in plans_for("cpu", nn.Linear(2, 2), 50)]
    ['loop', 'batched-10', 'batched-20', 'batched-40']
    >>> [str(plan) for plan in plans_for("cuda", nn.Conv2d(1, 1, 3), 50)]
    ['loop', 'batched-10', 'batched-20', 'batched-40', 'batched-50']
    >>> plans_for("cpu", nn.Conv2d(1, 1, 3), 50)
    [Plan(chunk=1)]
    """
    chunks, chunk = [1], FIRST_CHUNK
    if device == "cpu" and convolves(model):
        return [Plan()]
    while chunk <= cohort:
        chunks.append(chunk)
        chunk *= 2
    if device != "cpu" and cohort > chunks[-1]:
        chunks.append(cohort)
    return [Plan(chunk) for chunk in chunks]


@dataclass(frozen=True)
class Choice:
    """A device and a plan, and why.

    Attributes
    ----------
    device : str
        Where clients train.
    plan : Plan
        How they do.
    why : Mapping[str, Any]
        What a run records of it: ``by`` what it was chosen, and what was measured.
    """

    device: str
    plan: Plan
    why: Mapping[str, Any]
    _key: str = ""
    _cache: Path | None = None

    def remember(self, plan: Plan) -> None:
        """Keep another plan, as the device has no room for this one."""
        if self._cache is not None:
            known = _read(self._cache)
            if self._key in known:
                known[self._key]["plan"] = str(plan)
                _write(self._cache, known)


def choose_plan(
    app_of: AppOf,
    arrays: ArrayRecord,
    plans: Mapping[str, Sequence[Plan]],
    *,
    clients: Sequence[int],
    num_clients: int,
    cohort: int,
    rounds: int,
    about: Mapping[str, Any],
    estimate: float = 0.0,
    threads: int | None = None,
    workers: Mapping[str, int] | None = None,
    cache: Path | None = None,
) -> Choice:
    """Measure where and how clients of an app train fastest, or remember it.

    It takes a second, or 2% of the run if that is more: sizes that would take longer
    are not tried, and what turns out to take longer is cut off. That does not count
    what the device needs to start, nor the trial that tells whether clients of this
    model may train at once.

    Parameters
    ----------
    app_of : Callable[[str], ClientApp]
        Returns an app of ours that trains on a device.
    arrays : ArrayRecord
        The global model.
    plans : Mapping[str, Sequence[Plan]]
        By device, what may be chosen (:func:`plans_for`); cards before the CPU.
    clients : Sequence[int]
        Clients to measure with, as many as train in a round or fewer.
    num_clients : int
        N.
    cohort, rounds : int
        How many clients train in a round, and how often.
    about : Mapping
        What the measurement depends on, such as model and data; with the devices and
        plans the key under which the choice is kept.
    estimate : float
        About how many seconds the run takes, before anything is measured.
    threads : int, optional
        As of :class:`~fedweight.simulations.local.LocalGrid`.
    workers : Mapping[str, int], optional
        By device, how many Ray workers there are; without, clients train here.
    cache : Path, optional
        The file; by default ``plans.json`` in the user's cache folder.

    Returns
    -------
    Choice
        One after another, unless many at once is clearly faster, and gives the same.
    """
    path = cache or default_cache()
    content = {
        "format": FORMAT,
        "plans": {device: [*map(str, some)] for device, some in plans.items()},
        **about,
    }
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    known = _read(path).get(key)
    if known is not None:
        device, plan = known["device"], Plan.parse(known["plan"]) or Plan()
        if device in plans:
            plan = usable_plan(plan, app_of(device), num_clients, {})
            why = {**known["why"], "by": f"an earlier measurement, kept in {path}"}
            return Choice(device, plan, why, key, path)
    began = time.perf_counter()
    usable: dict[str, list[Plan]] = {}
    for device, some in plans.items():
        await_device(device)
        most = usable_plan(some[-1], app_of(device), num_clients, {})
        usable[device] = [*some] if most == some[-1] else [Plan()]
    if sum(map(len, usable.values())) == 1 or not clients:
        device, (plan, *_) = next(iter(usable.items()))
        return Choice(device, plan, {"by": "there is no other way to train"})
    meter = Meter(
        app_of,
        arrays,
        clients[:cohort],
        num_clients,
        sizes=sizes_of(app_of(next(iter(usable))), clients[:cohort]),
        threads=threads,
        workers=workers,
    )
    search = Search(meter, usable, updates=rounds * cohort, estimate=estimate)
    device, plan = search.best()
    meter.let_go(usable)
    limits = [one for one in search.found if one.too_many]
    if limits:
        first = limits[0]
        log.warning(
            "engine.plan: %s is too many clients at once for %s: no more than %s. (%s)",
            first.plan,
            first.device,
            limits[-1].fits,
            first.note,
        )
    why = {
        "by": "a measurement",
        "seconds": round(search.spent, 3),
        "seconds_allowed": round(search.allowed, 3),
        "seconds_with_trials": round(time.perf_counter() - began, 3),
        "measured": [one.record() for one in search.found],
    }
    kept = {"device": device, "plan": str(plan), "why": why, "about": content}
    _write(path, {**_read(path), key: kept})
    return Choice(device, plan, why, key, path)


def machine() -> dict[str, Any]:
    """Return what of the machine a plan depends on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = {"torch": torch.__version__, "fedweight": __version__}
    return {"cores": num_cores(), "gpus": gpus, **versions}


def default_cache() -> Path:
    """Return the file of the machine's plans."""
    return cache_folder() / "plans.json"


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the plans that are kept; what is of another format is passed over."""
    with contextlib.suppress(OSError, ValueError):
        plans = json.loads(path.read_text("utf-8"))
        if isinstance(plans, dict):
            return {key: kept for key, kept in plans.items() if _is_kept(kept)}
    return {}


def _is_kept(kept: Any) -> bool:
    return (
        isinstance(kept, dict)
        and isinstance(kept.get("device"), str)
        and isinstance(kept.get("plan"), str)
        and isinstance(kept.get("why"), dict)
        and kept.get("about", {}).get("format") == FORMAT
    )


def _write(path: Path, plans: Mapping[str, Any]) -> None:
    """Keep the plans, if there is a place for them."""
    with contextlib.suppress(OSError, OutputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(plans, indent=1), shared=True)
