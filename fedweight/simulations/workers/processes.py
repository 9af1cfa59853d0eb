"""The workers as processes of this machine, forked from one that has imported the app.

The standard library's fork server (:mod:`multiprocessing`) imports PyTorch, Flower and
the app once; a process forked from it is there within milliseconds and shares their
memory. Each slot is a pool of one process of :mod:`concurrent.futures`, so that a
client that ends its process takes nobody else with it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import pickletools
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Any

from flwr.clientapp import ClientApp

from ...core.client_store import ClientRows
from ...core.environment import set_environment
from ...core.errors import EngineError
from ...core.extras import Imported
from ..grid import Nodes
from .forking import METHOD, SETTINGS, WITH_THREADS, as_fork_server_needs
from .jobs import Job
from .pool import Crew, Sent
from .worker import Answer, Side, Worker, driver

cloudpickle = Imported("cloudpickle", "simulation", "a Flower app in other processes")

# Seconds for idle processes to end.
END_TIMEOUT = 2.0


class _Process:
    """A process, and what it has been sent."""

    def __init__(self) -> None:
        self.pool = _pool_of_one()
        self.held: set[int] = set()
        self.loaded: Future[None] | None = None
        self.children: list[BaseProcess] = []
        self.busy = False


def _pool_of_one() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context(METHOD),
        initializer=_begin,
        initargs=(dict(os.environ) | SETTINGS,),
    )


class Processes(Crew):
    """The workers as processes of this machine.

    Parameters
    ----------
    count : int
        How many.
    """

    LOST = (BrokenProcessPool,)

    def __init__(self, count: int) -> None:
        self.handles = [_Process() for _ in range(count)]
        self.places = [""] * count
        self.gone: set[int] = set()

    @property
    def slots(self) -> list[int]:
        """All: where a process has ended another can begin."""
        return list(range(len(self.handles)))

    def put(self, value: Any) -> bytes:
        """Return a value as bytes, which travel to each process once."""
        return pickle.dumps(value, 5)

    def get(self, references: Sequence[Any]) -> list[Any]:
        """Return the values of such bytes."""
        return [pickle.loads(data) for data in references]

    def shard(self, rows: Any, place: str, side: Side) -> Any:
        """Cohorts are not sent to processes."""
        raise NotImplementedError

    def load(self, slots: Sequence[int], app: ClientApp, nodes: Nodes) -> None:
        """Send an app to the processes and wait until they have it."""
        dumps = cloudpickle.dumps
        try:
            self._app = dumps((app, nodes))
        except Exception as error:
            raise EngineError(
                f"the ClientApp cannot be sent to other processes: {error}. Make such "
                "objects inside the client's functions, or use isolation = 'none'."
            ) from error
        workers = [self.handles[slot] for slot in slots]
        for worker in workers:
            self._start(worker)
        wait([worker.loaded for worker in workers])
        for worker in workers:
            try:
                worker.loaded.result()
            except Exception as error:
                raise EngineError(
                    "a worker process cannot load the ClientApp. The modules that it "
                    f"comes from must be importable there: {error}"
                ) from error

    def _start(self, worker: _Process) -> None:
        """Send the app to a process, which begins with the first that it is sent."""
        worker.held = set()
        before = {*multiprocessing.active_children()}
        modules = _modules(self._app)
        deadline = time.monotonic() + END_TIMEOUT
        while True:
            try:
                with as_fork_server_needs(modules):
                    worker.loaded = worker.pool.submit(_load, self._app, *driver())
                break
            except (EOFError, OSError):
                # The fork server ends just now, because of what it has imported, and
                # while it does nobody can tell: another is started when it has.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
                worker.pool = _pool_of_one()
        children = multiprocessing.active_children()
        worker.children += [child for child in children if child not in before]

    def send(
        self,
        worker: _Process,
        jobs: Sequence[Job],
        known: Mapping[int, Any],
        kept: Mapping[str, ClientRows] | None,
    ) -> Sent:
        """Send a list to a process; wait for the answers."""
        arrays: dict[int, bytes] = {}
        for job in jobs:
            arrays |= job.arrays
        news = {n: data for n, data in arrays.items() if n not in worker.held}
        states = {k: known[k] for job in jobs for k in job.clients if k in known}
        work = [(job.clients, job.share or job.payloads) for job in jobs]
        worker.held, worker.busy = set(), True
        try:
            sent = worker.pool.submit(_run, work, list(arrays), news, states, kept)
            answers, kept_states, written = sent.result()
        finally:
            worker.busy = False
        worker.held = set(arrays)
        return Sent(answers, [], kept_states, written)

    def replace(self, lost: _Process) -> None:
        """Start another process in the place of one that has ended."""
        if lost in self.handles:
            lost.pool.shutdown(wait=False)
            worker = self.handles[self.handles.index(lost)] = _Process()
            self._start(worker)

    def kill(self) -> None:
        """End the processes, by force those that do not end by themselves.

        One that still handles a client does not, nor one in which a client has left a
        thread; and this process could not end before them.
        """
        children = [child for worker in self.handles for child in worker.children]
        for worker in self.handles:
            for child in worker.children if worker.busy else ():
                with contextlib.suppress(Exception):
                    child.kill()
            worker.pool.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + END_TIMEOUT
        for child in children:
            with contextlib.suppress(Exception):
                child.join(max(0.0, deadline - time.monotonic()))
                if child.is_alive():
                    child.kill()
                    child.join(END_TIMEOUT)


def _modules(app: bytes) -> list[str]:
    """Return the modules that a pickled app names, where they may be imported early."""
    if any(name in sys.modules for name in WITH_THREADS):
        return []
    names = {text for _, text, _ in pickletools.genops(app) if isinstance(text, str)}
    return sorted(name for name in names if name in sys.modules and name != "__main__")


# What happens in a process.

_worker: Worker
_records: dict[int, Any] = {}


def _begin(environment: dict[str, str]) -> None:
    """Make a process ready: the environment is that of the one that started it."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    set_environment(environment)
    _worker = Worker()


def _end_with_parent() -> None:
    """End this process when the one that started it is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _load(app: bytes, paths: Sequence[str], argv: Sequence[str]) -> None:
    """Take over an app."""
    _records.clear()
    _worker.prepare(paths, argv)
    _worker.load(*pickle.loads(app))


def _run(
    work: Sequence[Any],
    numbers: Sequence[int],
    news: Mapping[int, bytes],
    states: Mapping[int, bytes],
    kept: Mapping[str, ClientRows] | None,
) -> tuple[list[Answer], list[bytes], Mapping[str, ClientRows]]:
    """Handle jobs; of array records, only those come along that are news here."""
    known = {number: _records[number] for number in numbers if number not in news}
    _records.clear()
    _records.update(known)
    _records.update({number: pickle.loads(data) for number, data in news.items()})
    records = [_records[number] for number in numbers]
    own = states.values()
    answers, written, left = _worker.run(
        work, numbers, list(states), kept, *records, *own
    )
    return answers, left, written
