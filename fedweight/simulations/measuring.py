"""How fast clients train by a plan, on a device: a measurement that may be cut off."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MessageType, RecordDict
from flwr.clientapp import ClientApp

from ..messages import _flower, keys
from ..messages.dispatch import Cohort, Replies
from .grid import FIRST_NODE
from .local import LocalGrid
from .plan import Plan

AppOf = Callable[[str], ClientApp]

# Clients train for so many seconds, so that what surrounds them shows as in a run, and
# so many one after another, at most; the fastest time counts: what disturbs it is not
# the plan's.
ENOUGH = 0.1
SEQUENTIAL = 10

# A warm-up that takes more seconds than this is the only one.
LONG = 0.5

# A step is traced when it is first met, and several in one call at the second time.
WARM_UPS = 2

# Seconds between two signals that a measurement is to end.
PATIENCE = 0.01


@dataclass(frozen=True)
class Measured:
    """How fast clients trained by a plan.

    Attributes
    ----------
    device : str
        Where.
    plan : Plan
        How.
    updates_per_second : float, optional
        Client updates of a cohort a second; ``None`` where nothing came of it.
    seconds : float
        How long it took to find out.
    note : str
        Why nothing came of it.
    fits : Plan, optional
        The plan that the device had room for, where it had none for this one.
    """

    device: str
    plan: Plan
    updates_per_second: float | None
    seconds: float
    note: str = ""
    fits: Plan | None = None

    @property
    def too_many(self) -> bool:
        """Whether the device has no room for so many clients at once."""
        return self.fits is not None

    def record(self) -> dict[str, Any]:
        """Return what a run records of it."""
        return {
            "device": self.device,
            "plan": str(self.plan),
            "updates_per_second": self.updates_per_second,
            "seconds": round(self.seconds, 3),
            **({"note": self.note} if self.note else {}),
        }


class Meter:
    """Measures an app's clients, as a grid has them train.

    Parameters
    ----------
    app_of : Callable[[str], ClientApp]
        Returns an app of ours that trains on a device.
    arrays : ArrayRecord
        The global model.
    clients : Sequence[int]
        A cohort. Of its lists some are measured, in its middle by size.
    num_clients : int
        N.
    sizes : Sequence[int], optional
        How many examples each of the clients has.
    threads : int, optional
        As of :class:`~fedweight.simulations.local.LocalGrid`.
    workers : Mapping[str, int], optional
        By device, how many Ray workers there are: one is measured, in a thread.
    """

    def __init__(
        self,
        app_of: AppOf,
        arrays: ArrayRecord,
        clients: Sequence[int],
        num_clients: int,
        *,
        sizes: Sequence[int] | None = None,
        threads: int | None = None,
        workers: Mapping[str, int] | None = None,
    ) -> None:
        self.app_of = app_of
        self.num_clients = num_clients
        self.nodes = [FIRST_NODE + client for client in clients]
        self.sizes = sizes
        of_each = np.ones(len(self.nodes)) if sizes is None else np.array(sizes, float)
        # In updates of a client of the usual size.
        self._work = dict(zip(self.nodes, of_each / of_each.mean(), strict=True))
        self.threads = 1 if workers else threads
        self.workers = workers or {}
        self._content = RecordDict({keys.ARRAYS: arrays, keys.CONFIG: ConfigRecord()})

    def __call__(self, device: str, plan: Plan, limit: float) -> Measured:
        """Measure a plan on a device; cut it off after ``limit`` seconds."""
        app: Any = self.app_of(device)
        self.let_go([device])  # What was tried before takes no room from this.
        began = time.perf_counter()
        grid = LocalGrid(app, self.num_clients, threads=self.threads, plan=plan)
        grid.tells = False
        speed, note = None, ""
        with _flower.task_identity(run_id=0), _cut_off(app, limit) as over:
            try:
                speed = self._speed(grid, device, plan, over)
            except _Failed as failure:
                note = "cut off" if over.is_set() else str(failure)
            finally:
                grid.close()
        seconds = time.perf_counter() - began
        fits = None if grid.plan == plan else grid.plan
        if fits is not None:
            speed, note = None, f"too many at once for the device: {grid.why_halved}"
        return Measured(device, plan, speed, seconds, note, fits)

    def _speed(
        self, grid: LocalGrid, device: str, plan: Plan, over: threading.Event
    ) -> float:
        """Return the client updates of a cohort a second.

        Of what is cut off counts what was done before, if anything was.
        """
        lists = plan.cut(self._sent(self.nodes), self.sizes)
        if plan.chunk == 1:
            lists = [[node] for nodes in lists for node in nodes]
        first = self._in_the_middle(lists, 1)
        at_once, speed, spent = 1, 0.0, 0.0
        try:
            for _ in range(WARM_UPS):
                grid.threads = self.threads  # Not decided by the very first.
                seconds = self._train(grid, first, over)
                speed = max(speed, self._work_of(first) / seconds)
                if seconds > LONG or grid.plan != plan:
                    break
            threads = min(grid.threads or 1, len(lists))
            count = threads
            if plan.chunk == 1:  # So many that what a call takes shows little.
                count *= max(1, min(SEQUENTIAL, int(ENOUGH / seconds)))
            nodes = self._in_the_middle(lists, count)
            while spent < ENOUGH and grid.plan == plan:
                seconds = self._train(grid, nodes, over)
                one = self._work_of(nodes) / seconds
                speed = max(speed, one) if spent else one
                spent, at_once = spent + seconds, threads
        except _Failed:
            if not speed:
                raise
        # The last lists of a round may leave some of the threads or workers idle.
        workers = self.workers.get(device, grid.threads or 1)
        turns = -(-len(lists) // workers)
        return round(speed * len(lists) / (turns * at_once), 3)

    def _train(
        self, grid: LocalGrid, nodes: Sequence[int], over: threading.Event
    ) -> float:
        """Let some clients train; return how long they took."""
        began = time.perf_counter()
        replies = grid.send_and_receive(self._sent(nodes))
        seconds = time.perf_counter() - began
        if isinstance(replies, Replies) and replies.plain is not None:
            errors = [r.error for r in replies.plain if r.error is not None]
        else:
            errors = [_flower.reason_of(r.error) for r in replies if r.has_error()]
        if errors and (over.is_set() or len(errors) == len(nodes)):
            raise _Failed(errors[0].split("\n", 1)[0])
        return seconds

    def _sent(self, nodes: Sequence[int]) -> Cohort:
        return Cohort(self._content, nodes, MessageType.TRAIN)

    def _in_the_middle(self, lists: Sequence[Sequence[int]], count: int) -> list[int]:
        """Return the nodes of some lists whose clients are of the usual size."""
        count = min(count, len(lists))
        means = [self._work_of(nodes) / len(nodes) for nodes in lists]
        middle = int(np.argmin(np.abs(np.array(means) - 1.0)))
        begin = min(max(middle - count // 2, 0), len(lists) - count)
        return [node for nodes in lists[begin : begin + count] for node in nodes]

    def _work_of(self, nodes: Sequence[int]) -> float:
        return float(sum(map(self._work.__getitem__, nodes)))

    def let_go(self, devices: Iterable[str]) -> None:
        """Give back what is kept on cards for the next clients."""
        for device in devices:
            if device != "cpu":
                app: Any = self.app_of(device)
                app.let_go()


class _Failed(Exception):
    """All clients failed, or they were cut off."""


@contextmanager
def _cut_off(app: Any, limit: float) -> Iterator[threading.Event]:
    """Let an app's clients stop after some seconds; the event says that they had to."""
    over, done = threading.Event(), threading.Event()

    def watch() -> None:
        if done.wait(limit):
            return
        over.set()
        app.cancel()
        while not done.wait(PATIENCE):  # Those that have begun since.
            app.cancel()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield over
    finally:
        done.set()
        watcher.join()


def await_device(device: str) -> None:
    """Wait until a card has started: no plan is to pay for that."""
    if device != "cpu":
        torch.zeros(1, device=device)
        torch.cuda.synchronize(device)
