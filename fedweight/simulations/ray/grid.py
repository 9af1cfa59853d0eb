"""The Ray grid: the clients in worker processes, on all cores, GPUs and nodes.

The workers are actors that live as long as the grid (:mod:`.pool`, and
:mod:`.worker` for what they do). Of a cohort, a worker sends back plain values and
one sum of the models; or it keeps the models, and the server asks for what it needs of
them (:mod:`.rows`).
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import ray
from flwr.app import Message
from flwr.clientapp import ClientApp

from ...core.environment import set_for_a_while
from ...core.errors import ConfigurationError, EngineError, check_range
from ...core.signals import own_handlers
from ...core.threads import one_thread
from ...messages.dispatch import Cohort, Gathered, Replies
from ..grid import Nodes, RunConfig, answers_cohort, usable_plan
from ..plan import Plan
from ..workers.grid import PooledGrid
from ..workers.jobs import CohortBatch
from ..workers.pool import Pool
from . import watch
from .actors import Actors
from .rows import ShardedModels

log = logging.getLogger("fedweight")

NAMESPACE = "fedweight"

# Begins the name of a variable that is in the environment of one Ray's processes only.
MARK = "FEDWEIGHT_RAY_"

# Seconds. Under a timeout below this a worker is sent one list of clients at a time, so
# that a slow one takes no replies of others with it; else quick ones share a sending.
SHORT_TIMEOUT = 60.0


class RayGrid(PooledGrid):
    """Simulated clients in Ray worker processes.

    A Ray that is initialised already is used, and left running by :meth:`close`.
    Otherwise the grid starts one for itself, with what the clients print in Ray's log
    folder (on the terminal if the logger ``fedweight`` is at ``DEBUG``).

    Parameters
    ----------
    client_app : ClientApp
        What every client runs. It is sent to the workers once, with all it refers to;
        its NumPy arrays are shared between them, read-only.
    num_clients : int
        N, 1 or more.
    run_config : Mapping
        The run's settings, as the app reads them from its context.
    workers : int, optional
        By default one for each core that Ray has, or one for each share of a GPU.
    gpus_per_worker : float
        Share of a GPU that each worker gets: 0, a fraction, or a whole number.
    address : str, optional
        A running Ray cluster to join; ``"auto"`` finds one on this machine.
    plan : Plan, optional
        How our own app trains clients; one after another by default.
    show : bool
        Whether what clients print is on the terminal anyway, each line with a number.
    **nodes
        The other parameters of :class:`~fedweight.simulations.grid.Nodes`.

    Raises
    ------
    EngineError
        If Ray has no room for the workers, or the app cannot be sent to them.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_clients: int,
        run_config: RunConfig | None = None,
        *,
        workers: int | None = None,
        gpus_per_worker: float = 0.0,
        address: str | None = None,
        plan: Plan | None = None,
        show: bool = False,
        **nodes: Any,
    ) -> None:
        of_run = Nodes(num_clients, dict(run_config or {}), **nodes)
        self.plan = plan or Plan()
        if workers is not None:
            check_range("workers", workers, 1)
        check_range("gpus_per_worker", gpus_per_worker, 0)
        ours = _start_ray(workers, address, show)
        try:
            self._pool = Pool(Actors(*_resources(workers, gpus_per_worker)))
        except BaseException:
            ours.close()
            raise
        # Whatever becomes of the grid, no process may outlive it. When the interpreter
        # ends it has to be closed before Ray is: what is registered last runs first.
        self._guard = weakref.finalize(self, _end, self._pool, ours)
        self._guard.atexit = False
        atexit.register(self._guard)
        try:
            self._load(client_app, of_run)
        except BaseException:
            self.close()
            raise

    def _load(self, client_app: ClientApp, nodes: Nodes) -> None:
        # What a trial finds out here, and its warning, is not needed from each worker.
        usable_plan(self.plan, client_app, nodes.num_clients, nodes.run_config)
        super()._load(client_app, nodes)

    def close(self) -> None:
        """Stop the workers, and Ray too if the grid started it."""
        self._guard()
        atexit.unregister(self._guard)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Let the clients handle the messages; return the replies in their order."""
        if answers_cohort(messages, self.client_app):
            deadline = None if timeout is None else time.monotonic() + timeout
            return Replies.joined(messages, self._answer(messages.parts(), deadline))
        return super().send_and_receive(messages, timeout=timeout)

    def _answer(self, parts: Sequence[Cohort], deadline: float | None) -> list[Replies]:
        """Let our own app handle a cohort's parts, a list of clients at a time."""
        soon = deadline is not None and deadline - time.monotonic() < SHORT_TIMEOUT
        before, plan, why = self.plan, self._usable_plan(), ""
        cut = []
        for part in parts:
            clients = [self._checked_client(node) for node in part.nodes]
            cut.append(plan.cut(part, self.sizes_of(clients)))
        batched = plan.chunk > 1
        waiting = [
            self._push(part, lists, batched=batched, alone=soon)
            for part, lists in zip(parts, cut, strict=True)
        ]
        replies = []
        with one_thread():  # PyTorch's threads wait busily: on the workers' cores.
            for part, lists, pushed in zip(parts, cut, waiting, strict=True):
                gathered = Gathered(part, lists)
                models = ShardedModels(part, lists, self._pool)
                again: CohortBatch | None = pushed
                while again is not None:
                    too_many: list[int] = []
                    for answers, shard in self._pool.take(again, deadline):
                        if answers.were_too_many:
                            why = answers.were_too_many
                            too_many += [reply.node for reply in answers.replies]
                            continue
                        if shard is not None:
                            models.add(shard, answers.replies)
                        gathered.add(answers)
                        self.store.relieve()
                    todo, again = self._cut_smaller(part, lists, too_many), None
                    if todo:
                        batched = self.plan.chunk > 1
                        again = self._push(part, todo, batched=batched, alone=soon)
                replies.append(gathered.replies(models))
        self._tell_halved(before, why)
        return replies

    def _push(
        self,
        cohort: Cohort,
        lists: Sequence[Sequence[int]],
        *,
        batched: bool,
        alone: bool,
    ) -> CohortBatch:
        """Let lists of a cohort's clients wait for the workers."""
        work = []
        for nodes in lists:
            sizes = self.sizes_of([self.client_of(node) for node in nodes])
            known = sizes is not None and cohort.trains
            work.append(1.0 + sum(sizes) if known and sizes else float(len(nodes)))
        return self._pool.push_cohort(cohort, lists, work, batched=batched, alone=alone)


def _end(pool: Pool, ours: contextlib.ExitStack) -> None:
    """End a grid's workers, and Ray if it is the grid's own."""
    pool.close()
    ours.close()


# Starting Ray.


def _start_ray(
    workers: int | None, address: str | None, show: bool
) -> contextlib.ExitStack:
    """Make sure that Ray runs; return what ends as much of it as is ours.

    ``show`` says whether what clients print is shown.
    """
    ours = contextlib.ExitStack()
    if ray.is_initialized():
        if address is not None:
            raise EngineError(
                f"address is {address!r}, but Ray is initialised already. Leave the "
                "address out to use that Ray, or call ray.shutdown() first."
            )
        return ours
    debug = log.isEnabledFor(logging.DEBUG)
    options: dict[str, Any] = {
        "namespace": NAMESPACE,
        "log_to_driver": show or debug,
        "logging_level": logging.INFO if debug else logging.ERROR,
    }
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    watcher = None
    if address is None:
        # Its own, even where somebody has started a cluster on this machine.
        options |= {"address": "local", "num_cpus": workers, "include_dashboard": False}
        mark = MARK + uuid.uuid4().hex
        settings[mark] = "1"
        watcher = ours.enter_context(_watched(f"{mark}=1"))
    else:
        _check_address(address)
        options["address"] = address
    ours.callback(_shut_down)
    try:
        with _quiet(settings), own_handlers():
            context: Any = ray.init(**options)
    except BaseException as error:
        ray.shutdown()
        ours.close()
        if isinstance(error, Exception):
            if address == "auto" and isinstance(error, ConnectionError):
                raise EngineError(
                    "address is 'auto', but no Ray cluster runs on this machine. Start "
                    "one with 'ray start --head', or leave the address out."
                ) from error
            where = "start Ray" if address is None else f"join Ray at {address!r}"
            raise EngineError(f"cannot {where}: {error}") from error
        raise
    folder = context.address_info.get("session_dir") if context.address_info else None
    if watcher is not None and folder:
        watcher(folder)
    log.debug("Ray has started; what clients print is under %s/logs", folder)
    return ours


def _shut_down() -> None:
    if ray.is_initialized():
        ray.shutdown()


@contextlib.contextmanager
def _watched(mark: str) -> Iterator[Callable[[str], None] | None]:
    """Have the processes with a mark ended if this one is killed meanwhile.

    What it yields tells of the folder that they write to.
    """
    if not sys.platform.startswith("linux"):  # Elsewhere Ray does it itself.
        yield None
        return
    with subprocess.Popen(
        [sys.executable, "-I", "-S", watch.__file__, mark],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # What is sent to the driver's group is not for it.
        cwd="/",
    ) as process:
        assert process.stdin is not None
        stream = process.stdin

        def tell(text: str) -> None:
            with contextlib.suppress(BrokenPipeError):
                stream.write(os.fsencode(f"{text}\n"))
                stream.flush()

        try:
            yield tell
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.communicate(watch.CLOSED.encode())


def _check_address(address: str) -> None:
    """Raise if nobody listens at an address: Ray would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigurationError(
            "address must be 'auto' or the host:port of a Ray cluster's head, as 'ray "
            f"start --head' prints it, got {address!r}."
        )
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise EngineError(
            f"cannot join Ray at {address!r}: nobody answers there ({error}). Start a "
            "head with 'ray start --head', which prints its address."
        ) from error


@contextlib.contextmanager
def _quiet(settings: Mapping[str, str]) -> Iterator[None]:
    """Keep Ray from hints, and start it with some settings in the environment."""
    with set_for_a_while(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _resources(
    workers: int | None, gpus_per_worker: float
) -> tuple[int, dict[str, Any]]:
    """Return how many workers there will be, and what each asks Ray for."""
    resources = cast(Any, ray).cluster_resources()
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    options: dict[str, Any] = {}
    count = workers or max(1, int(cpus))
    if gpus_per_worker:
        if gpus_per_worker > 1 and gpus_per_worker != int(gpus_per_worker):
            raise EngineError(
                "gpus_per_worker must be a fraction below 1 or a whole number, got "
                f"{gpus_per_worker!r}."
            )
        # A share lies on one GPU: of three workers at 0.4, two fit on one.
        shares = int(1 / gpus_per_worker + 1e-9)
        fit = int(gpus) * shares if shares else int(gpus // gpus_per_worker)
        if fit < (workers or 1):
            raise EngineError(
                f"Ray has {gpus:g} GPUs: with gpus_per_worker = {gpus_per_worker:g} "
                f"there is room for {fit} workers, asked for {workers or 1}."
            )
        count = workers or fit
        options["num_gpus"] = gpus_per_worker
    # More workers than cores share them; Ray counts in steps of 1/10,000.
    options["num_cpus"] = min(1.0, int(10_000 * cpus / count) / 10_000)
    return count, options
