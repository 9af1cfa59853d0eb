"""The worker processes, as Ray actors: begun, sent their lists, replaced when lost."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import ray
from flwr.clientapp import ClientApp
from ray.exceptions import RayError
from ray.util.check_serialize import inspect_serializability
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ...core.client_store import ClientRows
from ...core.errors import EngineError
from ..grid import Nodes
from ..workers.jobs import Job
from ..workers.pool import Crew, Sent
from ..workers.worker import Answer, Side, Worker, as_state, driver
from .rows import LOST, Shard

# Seconds to wait for the workers; a cluster where others work may have no room.
START_TIMEOUT = 120.0

# States of clients that have fewer bytes come with the answers of a list: to ask for
# them once more would take as long as a quick client.
SMALL_BYTES = 50_000


class RayWorker(Worker):
    """A worker that is a Ray actor."""

    most_bytes = SMALL_BYTES

    def load(self, app: ClientApp, nodes: Nodes) -> str:
        """Take over an app; return the Ray node that this process is on."""
        super().load(app, nodes)
        return str(ray.get_runtime_context().get_node_id())


class Actors(Crew):
    """The workers as Ray actors; a slot is gone where its Ray node is.

    Parameters
    ----------
    count : int
        How many; Ray runs already.
    options : dict
        What each asks Ray for.
    """

    LOST = LOST

    def __init__(self, count: int, options: dict[str, Any]) -> None:
        self._options = {"max_restarts": 0, **options}
        actor = cast(Any, ray.remote(RayWorker)).options(**self._options)
        self.handles: list[Any] = [actor.remote() for _ in range(count)]
        self.places: list[str] = [""] * count
        self.gone: set[int] = set()

    @property
    def slots(self) -> list[int]:
        """The slots whose node is there."""
        return [slot for slot in range(len(self.handles)) if slot not in self.gone]

    def put(self, value: Any) -> Any:
        """Put a value into Ray's shared memory; return a reference."""
        return ray.put(value)

    def get(self, references: Sequence[Any]) -> list[Any]:
        """Return the values that references stand for, or states as bytes."""
        apart = [one for one in references if isinstance(one, ray.ObjectRef)]
        got = iter(ray.get(apart))
        return [
            next(got) if isinstance(one, ray.ObjectRef) else as_state(one)
            for one in references
        ]

    def shard(self, rows: Any, place: str, side: Side) -> Shard:
        """Return what a share's models are, which stay on their Ray node."""
        return Shard(rows, place, side)

    def load(self, slots: Sequence[int], app: ClientApp, nodes: Nodes) -> None:
        """Send an app to the workers in some slots and wait until they have it."""
        try:
            self._app = (ray.put(app), nodes)
        except Exception as error:
            raise EngineError(_unshippable(app, error)) from error
        loaded = [self._start(self.handles[slot]) for slot in slots]
        ready, late = ray.wait(loaded, num_returns=len(loaded), timeout=START_TIMEOUT)
        if late:
            raise EngineError(
                f"{len(ready)} of {len(loaded)} Ray workers started within "
                f"{START_TIMEOUT:g} s. Others may be using the cluster: ask for fewer "
                "workers, or try again later."
            )
        try:
            places = ray.get(loaded)
        except RayError as error:
            raise EngineError(
                "a Ray worker cannot load the ClientApp. The modules that it comes "
                f"from must be importable there: {getattr(error, 'cause', '') or error}"
            ) from error
        for slot, place in zip(slots, places, strict=True):
            self.places[slot] = place

    def _start(self, worker: Any) -> Any:
        """Send the app to a worker; return what stands for where it is."""
        worker.prepare.remote(*driver())
        return worker.load.remote(*self._app)

    def send(
        self,
        worker: Any,
        jobs: Sequence[Job],
        known: Mapping[int, Any],
        kept: Mapping[str, ClientRows] | None,
    ) -> Sent:
        """Send a list to a worker; wait for the answers.

        ``known`` are the states that clients have, as bytes or references to them;
        ``kept`` is what they have in the store.
        """
        arrays: dict[int, Any] = {}
        for job in jobs:
            arrays |= job.arrays
        clients = [client for job in jobs for client in job.clients]
        states = {client: known[client] for client in clients if client in known}
        shares = sum(job.share is not None and job.share.keeps_rows for job in jobs)
        sent = worker.run.options(num_returns=1 + shares).remote(
            [(job.clients, job.share or job.payloads) for job in jobs],
            list(arrays),
            list(states),
            kept,
            *arrays.values(),
            *states.values(),
        )
        first, *rows = sent if shares else [sent]
        # The only place where what clients reply comes into this process. Vectors stay
        # in shared memory, and last as long as somebody looks at them.
        got = cast("tuple[list[Answer], Any, list[bytes] | None]", ray.get(first))
        answers, written, small = got
        if small is not None:
            return Sent(answers, rows, small, written)
        count = sum(sum(answer.has_state) for answer in answers)
        # Only now it is known how many there are. As results of a task they are this
        # process's own, and stay when the worker ends.
        done, *references = worker.states.options(num_returns=1 + count).remote()
        ray.get(done)  # Raises whatever went wrong.
        return Sent(answers, rows, references, written)

    def replace(self, lost: Any) -> None:
        """Start a worker anew where it was; give it up if its node is gone."""
        if lost not in self.handles:
            return  # Another has its slot already.
        slot = self.handles.index(lost)
        place = self.places[slot]
        alive = {node["NodeID"] for node in cast(Any, ray).nodes() if node["Alive"]}
        if place not in alive:
            self.gone.add(slot)
            if len(self.gone) == len(self.handles):
                raise EngineError("the Ray nodes of all workers are gone.")
            return
        here = NodeAffinitySchedulingStrategy(place, soft=False)
        actor = cast(Any, ray.remote(RayWorker))
        worker = actor.options(**self._options, scheduling_strategy=here).remote()
        self._start(worker)
        self.handles[slot] = worker

    def kill(self) -> None:
        """End the workers."""
        # Somebody may have ended Ray, when ``kill`` would start it, or begun another.
        if ray.is_initialized():
            for handle in self.handles:
                with contextlib.suppress(Exception):
                    ray.kill(handle)


def _name_of(failure: Any) -> str:
    """Return the name of what cannot be sent, quoted; Ray 2.60 has it in a path."""
    path = getattr(failure, "path", None)
    name = path[-1] if path else getattr(failure, "name", None)
    return "" if name is None else f"'{name}' "


def _unshippable(app: ClientApp, error: Exception) -> str:
    """Say what of an app cannot be sent to another process."""
    found: set[str] = set()
    with open(os.devnull, "w") as nowhere, contextlib.suppress(Exception):
        for value in vars(app).values():
            for part in value.values() if isinstance(value, dict) else [value]:
                if getattr(part, "__self__", None) is app:
                    continue
                _, failures = inspect_serializability(part, print_file=nowhere)
                found |= {
                    f"{_name_of(failure)}({type(failure.obj).__name__})"
                    for failure in failures
                    if not inspect.isroutine(failure.obj)
                }
    because = f", because of {', '.join(sorted(found))}" if found else ""
    return (
        f"the ClientApp cannot be sent to Ray workers{because}: "
        f"{error.__cause__ or error}. Make such objects inside the client's functions, "
        "or use engine = 'local'."
    )
