"""Choosing a plan: a short measurement of the actual model, data and device.

What was chosen is kept in a file of the machine, so that the same configuration goes
on giving the same bits on it; and it is part of the run's record.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, MessageType, RecordDict
from flwr.clientapp import ClientApp

from ..core.errors import OutputError
from ..core.paths import cache_folder
from ..core.threads import num_cores
from ..core.version import __version__
from ..core.writing import write_whole
from ..messages import _flower, keys
from ..messages.dispatch import Cohort
from .grid import FIRST_NODE, usable_plan
from .local import LocalGrid
from .plan import Plan

# A run shorter than this many seconds, by the estimate below, is not worth measuring.
WORTH_MEASURING = 3.0

# Seconds that a step costs PyTorch besides its arithmetic, and floating-point
# operations a second: rough, because only the order of magnitude matters.
STEP_OVERHEAD, OPERATIONS = 2e-4, 3e10

# Clients train at once in these numbers, or one by one: so many of them, for long
# enough that what surrounds them shows as it does in a run.
CHUNKS = (10, 20, 40)
SEQUENTIAL = 10
SAMPLE = max(CHUNKS)
LEAST_SECONDS = 0.15
WARM_UPS = 2

# Batched training has to win by this much: it is the more intricate of the two.
MARGIN = 1.1


def estimated_seconds(num_steps: int, batch_size: int, num_parameters: int) -> float:
    """Return about how long so many steps of a dense model take, one by one.

    Examples
    --------
    >>> estimated_seconds(num_steps=10_000, batch_size=32, num_parameters=50_000)
    5.2
    """
    operations = 6 * batch_size * num_parameters
    return round(num_steps * (STEP_OVERHEAD + operations / OPERATIONS), 1)


def choose_plan(
    client_app: ClientApp,
    arrays: ArrayRecord,
    *,
    clients: Sequence[int],
    num_clients: int,
    cohort: int,
    about: Mapping[str, Any],
    cache: Path | None = None,
) -> Plan:
    """Measure how clients of an app train fastest, or remember it.

    Parameters
    ----------
    client_app : ClientApp
        An app of ours.
    arrays : ArrayRecord
        The global model.
    clients : Sequence[int]
        Clients to measure with; the first few are used.
    num_clients : int
        N.
    cohort : int
        How many clients train in a round.
    about : Mapping
        What the measurement depends on, such as model, data and device; the key under
        which the plan is kept.
    cache : Path, optional
        The file; by default ``plans.json`` in the user's cache folder.

    Returns
    -------
    Plan
        One after another, unless many at once is clearly faster, and gives the same.
    """
    path = cache or default_cache()
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    known = _read(path)
    if key in known:
        plan = Plan(int(known[key]["chunk"]))
        return usable_plan(plan, client_app, num_clients, {})
    chunks = [c for c in (1, *CHUNKS) if c <= max(1, cohort // num_cores())]
    if usable_plan(Plan(chunks[-1]), client_app, num_clients, {}) == Plan():
        return Plan()
    speeds = {
        chunk: _speed(client_app, arrays, clients[:cohort], num_clients, Plan(chunk))
        for chunk in chunks
    }
    best = max(speeds, key=lambda chunk: speeds[chunk])
    chunk = best if speeds[best] > MARGIN * speeds[1] else 1
    known[key] = {"chunk": chunk, "updates_per_second": speeds, "about": dict(about)}
    _write(path, known)
    return Plan(chunk)


def _speed(
    client_app: ClientApp,
    arrays: ArrayRecord,
    clients: Sequence[int],
    num_clients: int,
    plan: Plan,
) -> float:
    """Return the client updates a second of one thread, after a warm-up.

    As many clients train together as do in a list of the plan. A step is traced at the
    first meeting, and several in one call at the second: neither is measured.
    """
    content = RecordDict({keys.ARRAYS: arrays, keys.CONFIG: ConfigRecord()})
    at_once = plan.chunk if plan.chunk > 1 else SEQUENTIAL
    nodes = [FIRST_NODE + client for client in clients[:at_once]]
    with _flower.task_identity(run_id=0):
        grid = LocalGrid(client_app, num_clients, threads=1, plan=plan)
        for _ in range(WARM_UPS):
            warm_up = Cohort(content, nodes[: plan.chunk], MessageType.TRAIN)
            grid.send_and_receive(warm_up)
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < LEAST_SECONDS:
            grid.send_and_receive(Cohort(content, nodes, MessageType.TRAIN))
            done += len(nodes)
    return round(done / (time.perf_counter() - began), 1)


def machine() -> dict[str, Any]:
    """Return what of the machine a plan depends on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = {"torch": torch.__version__, "fedweight": __version__}
    return {"cores": num_cores(), "gpus": gpus, **versions}


def default_cache() -> Path:
    """Return the file of the machine's plans."""
    return cache_folder() / "plans.json"


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        plans: dict[str, Any] = json.loads(path.read_text())
        return plans
    return {}


def _write(path: Path, plans: Mapping[str, Any]) -> None:
    """Keep the plans, if there is a place for them."""
    with contextlib.suppress(OSError, OutputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(plans, indent=1), shared=True)
