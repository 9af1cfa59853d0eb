"""The Ray grid: the clients in worker processes, on all cores, GPUs and nodes.

The workers are actors that live as long as the grid. What is large travels once: the
app when the grid is made, the global model when a round begins, both into Ray's
shared memory. A worker is sent a list of clients, never a message at a time. Lists
are cut when a worker is free, from the clients that took longest the last time to
those that took least, so that all workers finish together.
"""

from __future__ import annotations

import atexit
import contextlib
import heapq
import inspect
import itertools
import logging
import os
import pickle
import threading
import time
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import ray
import torch
from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from ray.exceptions import RayActorError, RayError
from ray.util.check_serialize import inspect_serializability

from .. import _flower
from ..cohort import Cohort, Replies, Reply
from ..errors import EngineError, check_range
from ..parameters import FlatRecord
from .grid import (
    FIRST_NODE,
    RunConfig,
    SimulationGrid,
    answers_cohort,
    execute,
    make_context,
)
from .memory import keep_freed_memory
from .plan import Plan, sizes_of

log = logging.getLogger("fedweight")

# Seconds of work in a list. A task costs Ray about a millisecond, which a list should
# outweigh; but its replies arrive together, so a timeout can lose that much work.
SHORTEST_LIST = 0.02
LONGEST_LIST = 0.5

# An array record used by one message alone travels with it if it has at most so many
# bytes, and through shared memory otherwise.
INLINE_BYTES = 100_000

# Seconds to wait for the workers; a cluster where others work may have no room.
START_TIMEOUT = 120.0

# Seconds for a thread to notice that its worker was killed; it takes milliseconds.
THREAD_TIMEOUT = 5.0

NAMESPACE = "fedweight"


class RayGrid(SimulationGrid):
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
    ) -> None:
        super().__init__(num_clients)
        self.plan = plan or Plan()
        if workers is not None:
            check_range("workers", workers, 1)
        check_range("gpus_per_worker", gpus_per_worker, 0)
        self._pool = _Pool(workers, gpus_per_worker, address)
        # Whatever becomes of the grid, no process may outlive it. When the interpreter
        # ends it has to be closed before Ray is: what is registered last runs first.
        self._guard = weakref.finalize(self, self._pool.close)
        self._guard.atexit = False
        atexit.register(self._guard)
        try:
            self.load(client_app, num_clients, run_config)
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> int:
        """How many worker processes there are."""
        return len(self._pool.workers)

    def load(
        self,
        client_app: ClientApp,
        num_clients: int,
        run_config: RunConfig | None = None,
    ) -> None:
        """Begin anew with another app on the same workers, as a new grid would.

        Clients that are being handled are waited for, their replies and all clients'
        states are forgotten.
        """
        check_range("num_clients", num_clients, 1)
        self._pool.load(client_app, num_clients, dict(run_config or {}))
        self.client_app = client_app
        self.num_clients = num_clients
        self.run_config = dict(run_config or {})

    def close(self) -> None:
        """Stop the workers, and Ray too if the grid started it."""
        self._guard()
        atexit.unregister(self._guard)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages to the clients; return the messages' ids at once."""
        batch = self._addressed(messages)
        self._pool.push(batch)
        return [message.metadata.message_id for message in batch]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to some messages that are there by now, each once."""
        return self._pool.pull(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Let the clients handle the messages; return the replies in their order.

        What is not there after ``timeout`` seconds is missing. Clients that have not
        begun by then never do; what the others reply is dropped, but their states
        are kept.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if answers_cohort(messages, self.client_app):
            return self._answer(messages, deadline)
        batch = self._addressed(messages)
        pushed = self._pool.push(batch)
        try:
            self._pool.wait(pushed, deadline)
        finally:
            replies = self._pool.finish(pushed, batch)
        return replies

    def _answer(self, cohort: Cohort, deadline: float | None) -> Replies:
        """Let our own app handle a cohort, a list of clients at a time."""
        clients = [self._checked_client(node) for node in cohort.nodes]
        lists = self.plan.cut(cohort, sizes_of(self.client_app, clients))
        pushed = self._pool.push_cohort(cohort, lists, batched=self.plan.chunk > 1)
        try:
            self._pool.wait(pushed, deadline)
        finally:
            answers = self._pool.finish_cohort(pushed)
        return Replies(cohort, [answers[n] for n in cohort.nodes if n in answers])


@dataclass(eq=False)
class _Batch:
    """The messages of one push, or one cohort with its answers by node."""

    missing: int
    dropped: bool = False
    answers: dict[int, Reply] = field(default_factory=dict)


@dataclass(eq=False)
class _Job:
    """A client's messages of one push, in their order; or a cohort's clients at once.

    ``payloads`` are the messages as bytes; array records that travel apart are in
    ``arrays``, by the number that stands for them. ``seconds`` is what the clients
    took for such messages before, None if they never had one; ``expected`` is what the
    list that it is in reckons with; an ``alone`` job gets a list to itself.
    """

    batch: _Batch
    clients: tuple[int, ...]
    kind: str
    messages: list[Message] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)
    arrays: dict[int, Any] = field(default_factory=dict)
    seconds: float | None = None
    expected: float = 0.0
    order: tuple[float, float, int] = (0, 0, 0)
    alone: bool = False

    def __lt__(self, other: _Job) -> bool:
        return self.order < other.order


@dataclass(frozen=True)
class _Answer:
    """What a worker returns of one job, besides the client's state."""

    replies: list[Any]
    seconds: float
    has_state: list[bool]


class _Worker:
    """What runs in a worker process."""

    def __init__(self) -> None:
        torch.set_num_threads(1)  # More would change the last bits of the results.
        keep_freed_memory()

    def load(self, app: ClientApp, num_clients: int, run_config: RunConfig) -> None:
        self.app = app
        self.num_clients = num_clients
        self.run_config = run_config

    def run(
        self,
        jobs: Sequence[tuple[Sequence[int], Sequence[bytes]]],
        arrays: Sequence[int],
        states: Sequence[int],
        *values: Any,
    ) -> list[Any]:
        """Handle the jobs of a list; return the answers and each client's state.

        ``values`` are the array records numbered ``arrays``, and then the states of
        the clients ``states``: Ray resolves references only as arguments.
        """
        records = dict(zip(arrays, values, strict=False))
        state_of = dict(zip(states, values[len(arrays) :], strict=True))
        answers, new_states = [], []
        for clients, payloads in jobs:
            began = time.perf_counter()
            contexts = {}
            for client in clients:
                context = make_context(client, self.num_clients, self.run_config)
                if client in state_of:
                    context.state = state_of[client]
                contexts[context.node_id] = context
            replies: list[Any] = []
            for payload in payloads:
                work = _unpack(payload, records)
                if isinstance(work, _Part):
                    app: Any = self.app
                    replies += app.answer(
                        work.cohort,
                        work.cohort.nodes,
                        contexts.__getitem__,
                        batched=work.batched,
                    )
                else:
                    (context,) = contexts.values()
                    replies.append(execute(self.app, work, context))
            kept = [context.state for context in contexts.values()]
            new_states += [state if len(state) else None for state in kept]
            has_state = [len(state) > 0 for state in kept]
            answers.append(_Answer(replies, time.perf_counter() - began, has_state))
        return [answers, *new_states]


@dataclass(frozen=True)
class _Part:
    """Some clients of a cohort, for one worker to handle at once."""

    cohort: Cohort
    batched: bool


class _Pool:
    """The workers, and the jobs that wait for them.

    A thread of this process stands behind each worker: it takes a list of jobs,
    sends it, and blocks until the answers are there.
    """

    def __init__(
        self, workers: int | None, gpus_per_worker: float, address: str | None
    ) -> None:
        self._lock = threading.RLock()  # A finaliser may run in any thread.
        self._work = threading.Condition(self._lock)
        self._answers = threading.Condition(self._lock)
        self._closed = False
        self._failure: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self.workers: list[Any] = []
        self._numbers = itertools.count(1)
        self._forget()
        self._owns_ray = _start_ray(workers, address)
        try:
            count, options = _room(workers, gpus_per_worker)
            self._actor: Any = ray.remote(_Worker).options(max_restarts=0, **options)
            self.workers = [self._actor.remote() for _ in range(count)]
        except BaseException:
            self.close()
            raise
        self._threads = [
            threading.Thread(target=self._serve, args=(slot,), daemon=True)
            for slot in range(count)
        ]

    def _forget(self) -> None:
        """Forget all jobs, replies and clients."""
        self._jobs: list[_Job] = []  # a heap
        self._parked: dict[int, list[_Job]] = defaultdict(list)
        self._busy: set[int] = set()
        self._replies: dict[str, Message] = {}
        self._states: dict[int, Any] = {}
        self._measured: dict[tuple[str, int], float] = {}
        self._typical: dict[str, float] = {}
        self._backlog = 0.0  # seconds of work that wait, as far as is known
        self._unknown = 0  # jobs that wait, of which it is not known
        self._running = 0.0

    # What the grid calls.

    def load(self, app: ClientApp, num_clients: int, run_config: RunConfig) -> None:
        """Send an app to the workers and wait until they have it."""
        with self._lock:
            self._check()
            for job in itertools.chain(self._jobs, *self._parked.values()):
                job.batch.dropped = True
            while self._busy:
                self._answers.wait()
                self._check()
            self._forget()
        try:
            self._app = (ray.put(app), num_clients, run_config)
        except Exception as error:
            raise EngineError(_unshippable(app, error)) from error
        loaded = [worker.load.remote(*self._app) for worker in self.workers]
        ready, late = ray.wait(loaded, num_returns=len(loaded), timeout=START_TIMEOUT)
        if late:
            raise EngineError(
                f"{len(ready)} of {len(loaded)} Ray workers started within "
                f"{START_TIMEOUT:g} s. Others may be using the cluster: ask for fewer "
                "workers, or try again later."
            )
        try:
            ray.get(loaded)
        except RayError as error:
            raise EngineError(
                "a Ray worker cannot load the ClientApp. The modules that it comes "
                f"from must be importable there: {getattr(error, 'cause', '') or error}"
            ) from error
        for thread in self._threads:
            if thread.ident is None:
                thread.start()

    def push(self, messages: Sequence[Message]) -> _Batch:
        """Let the messages wait for the workers."""
        batch = _Batch(missing=len(messages))
        with self._lock:
            self._check()
        return self._push(batch, self._pack(messages, batch))

    def push_cohort(
        self, cohort: Cohort, lists: Sequence[Sequence[int]], *, batched: bool
    ) -> _Batch:
        """Let a cohort wait for the workers, in lists that are handled at once."""
        batch = _Batch(missing=len(cohort))
        with self._lock:
            self._check()
        return self._push(batch, self._pack_cohort(cohort, lists, batched, batch))

    def _push(self, batch: _Batch, jobs: Sequence[_Job]) -> _Batch:
        with self._lock:
            self._check()
            push = next(self._numbers)
            for job in jobs:
                job.seconds = self._took_before(job)
                expected = self._expected(job) or 0.0
                job.order = (push, -expected, next(self._numbers))
                self._enqueue(job)
            self._work.notify_all()
        return batch

    def wait(self, batch: _Batch, deadline: float | None) -> None:
        """Wait until a batch is answered, or the deadline is there."""
        with self._lock:
            while batch.missing:
                self._check()
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return
                self._answers.wait(left)

    def finish(self, batch: _Batch, messages: Sequence[Message]) -> list[Message]:
        """Return a batch's replies so far, and give up the others."""
        with self._lock:
            batch.dropped = True
            return self._hand_out(m.metadata.message_id for m in messages)

    def finish_cohort(self, batch: _Batch) -> dict[int, Reply]:
        """Return a cohort's answers so far, and give up the others."""
        with self._lock:
            batch.dropped = True
            return batch.answers

    def pull(self, message_ids: Iterable[str]) -> list[Message]:
        """Hand out the replies that are there, once."""
        with self._lock:
            self._check()
            return self._hand_out(message_ids)

    def _hand_out(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def close(self) -> None:
        """End the threads, the workers and, if it is ours, Ray."""
        with self._lock:
            self._closed = True
            self._work.notify_all()
            self._answers.notify_all()
        # Somebody may have ended Ray, when ``kill`` would start it, or begun another.
        if ray.is_initialized():
            for worker in self.workers:
                with contextlib.suppress(Exception):
                    ray.kill(worker)
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(THREAD_TIMEOUT)
        self._forget()
        self.workers = []
        if self._owns_ray and ray.is_initialized():
            ray.shutdown()

    def _check(self) -> None:
        if self._closed:
            raise EngineError("the Ray grid is closed.")
        if self._failure is not None:
            raise EngineError(f"the Ray grid has failed: {self._failure}")

    # From messages to jobs.

    def _pack(self, messages: Sequence[Message], batch: _Batch) -> list[_Job]:
        """Turn messages into jobs; put what is large or shared into shared memory."""
        uses: dict[int, int] = defaultdict(int)
        for message in messages:
            for record in message.content.array_records.values():
                uses[id(record)] += 1
        put: dict[int, tuple[int, Any]] = {}
        jobs: dict[int, _Job] = {}
        for message in messages:
            client = SimulationGrid.client_of(message.metadata.dst_node_id)
            kind = message.metadata.message_type
            job = jobs.setdefault(client, _Job(batch, (client,), kind))
            records: dict[str, Any] = dict(message.content.items())
            for name, record in message.content.array_records.items():
                key = id(record)
                if uses[key] == 1 and _num_bytes(record) <= INLINE_BYTES:
                    continue
                if key not in put:
                    put[key] = next(self._numbers), ray.put(record)
                number, reference = put[key]
                records[name] = number
                job.arrays[number] = reference
            job.messages.append(message)
            # As bytes now: the server may change its records once they are pushed.
            job.payloads.append(pickle.dumps((message.metadata, records), 5))
        return list(jobs.values())

    def _pack_cohort(
        self,
        cohort: Cohort,
        lists: Sequence[Sequence[int]],
        batched: bool,
        batch: _Batch,
    ) -> list[_Job]:
        """Turn a cohort into jobs; its array records travel once."""
        shared: dict[str, Any] = dict(cohort.content.items())
        arrays = {}
        for name, record in cohort.content.array_records.items():
            number = next(self._numbers)
            arrays[number] = ray.put(record)
            shared[name] = number
        jobs = []
        for nodes in lists:
            own = {node: cohort.own[node] for node in nodes if node in cohort.own}
            parts = (nodes, cohort.message_type, own, cohort.config_key, batched)
            clients = tuple(SimulationGrid.client_of(node) for node in nodes)
            job = _Job(batch, clients, cohort.message_type)
            job.payloads.append(pickle.dumps((parts, shared), 5))
            job.arrays = arrays
            jobs.append(job)
        return jobs

    def _enqueue(self, job: _Job) -> None:
        heapq.heappush(self._jobs, job)
        if job.seconds is None:
            self._unknown += 1
        else:
            self._backlog += job.seconds

    def _dequeue(self) -> _Job:
        job = heapq.heappop(self._jobs)
        if job.seconds is None:
            self._unknown -= 1
        else:
            self._backlog -= job.seconds
        return job

    # From jobs to lists.

    def _next_list(self) -> list[_Job]:
        """Wait for work and take a worker's next list of it; empty at the end."""
        with self._lock:
            while not self._closed:
                jobs = self._take()
                if jobs:
                    return jobs
                self._work.wait()
            return []

    def _take(self) -> list[_Job]:
        jobs: list[_Job] = []
        seconds, limit = 0.0, 0.0
        while self._front() is not None:
            job = self._jobs[0]
            expected = self._expected(job)
            if not jobs:
                limit = self._limit(job)
            elif job.alone or expected is None or seconds + expected / 2 > limit:
                break
            jobs.append(self._dequeue())
            self._busy.update(job.clients)
            job.expected = expected or 0.0
            seconds += job.expected
            if job.alone or expected is None:
                break
        self._running += seconds
        return jobs

    def _front(self) -> _Job | None:
        """Return the first job that may begin; put aside those that may not."""
        while self._jobs:
            job = self._jobs[0]
            busy = self._busy.intersection(job.clients)
            if not job.batch.dropped and not busy:
                return job
            self._dequeue()
            if not job.batch.dropped:
                self._parked[min(busy)].append(job)
        self._backlog = 0.0  # whatever rounding has left
        return None

    def _expected(self, job: _Job) -> float | None:
        """Return how long a job will take, or None if nothing like it ever ran."""
        if job.seconds is not None:
            return job.seconds
        typical = self._typical.get(job.kind)
        return None if typical is None else typical * len(job.clients)

    def _took_before(self, job: _Job) -> float | None:
        """Return how long a job's clients took before, if each has been measured."""
        before = [self._measured.get((job.kind, client)) for client in job.clients]
        known = [seconds for seconds in before if seconds is not None]
        return sum(known) if len(known) == len(before) else None

    def _limit(self, job: _Job) -> float:
        """Return how many seconds of work the next list may have.

        Half of a worker's share of what waits: lists become shorter towards the end.
        """
        waiting = self._backlog + self._unknown * self._typical.get(job.kind, 0.0)
        count = len(self.workers)
        share = (waiting + self._running) / count
        return max(min(waiting / (2 * count), LONGEST_LIST), min(share, SHORTEST_LIST))

    # From lists to replies, in the workers' threads.

    def _serve(self, slot: int) -> None:
        try:
            while jobs := self._next_list():
                self._handle(slot, jobs)
        except Exception as error:
            with self._lock:
                if not self._closed:
                    self._failure = error
                    self._answers.notify_all()

    def _handle(self, slot: int, jobs: list[_Job]) -> None:
        try:
            answers, states = self._send(self.workers[slot], jobs)
        except Exception as error:
            if self._closed:
                return
            if isinstance(error, RayActorError):
                self.workers[slot] = self._replacement()
            self._settle(jobs, partial(self._blame, jobs, error))
        else:
            self._settle(jobs, partial(self._accept, jobs, answers, states))

    def _send(self, worker: Any, jobs: list[_Job]) -> tuple[list[_Answer], list[Any]]:
        """Send a list to a worker; return the answers and references to the states."""
        arrays: dict[int, Any] = {}
        for job in jobs:
            arrays |= job.arrays
        known = self._states
        clients = [client for job in jobs for client in job.clients]
        states = {client: known[client] for client in clients if client in known}
        first, *rest = worker.run.options(num_returns=1 + len(clients)).remote(
            [(job.clients, job.payloads) for job in jobs],
            list(arrays),
            list(states),
            *arrays.values(),
            *states.values(),
        )
        # The only place where what clients reply comes into this process. Vectors stay
        # in shared memory, and last as long as somebody looks at them.
        answers: list[_Answer] = ray.get(first)
        return answers, rest

    def _replacement(self) -> Any:
        worker = self._actor.remote()
        worker.load.remote(*self._app)
        return worker

    def _settle(self, jobs: list[_Job], outcome: Callable[[], None]) -> None:
        """Note how a list ended, and let what waited for its clients go on."""
        with self._lock:
            self._running -= sum(job.expected for job in jobs)
            for job in jobs:
                self._busy.difference_update(job.clients)
            if not self._busy:
                self._running = 0.0
            outcome()
            for client in [client for job in jobs for client in job.clients]:
                for parked in self._parked.pop(client, []):
                    self._enqueue(parked)
            self._work.notify_all()
            self._answers.notify_all()

    def _accept(
        self, jobs: list[_Job], answers: list[_Answer], states: list[Any]
    ) -> None:
        kept = iter(states)
        for job, answer in zip(jobs, answers, strict=True):
            for client, has_state in zip(job.clients, answer.has_state, strict=True):
                state = next(kept)
                if has_state:
                    self._states[client] = state
                else:
                    self._states.pop(client, None)
                # The mean of now and before: one measurement of a quick client is
                # noise.
                seconds = answer.seconds / len(job.clients)
                before = self._measured.get((job.kind, client), seconds)
                self._measured[job.kind, client] = (before + seconds) / 2
            self._reply(job, answer.replies)
        for kind in {job.kind for job in jobs}:
            taken = [
                answer.seconds / len(job.clients)
                for job, answer in zip(jobs, answers, strict=True)
                if job.kind == kind
            ]
            self._typical[kind] = sum(taken) / len(taken)

    def _blame(self, jobs: list[_Job], error: Exception) -> None:
        """Find the client because of which a list was lost: try each by itself.

        No state of the list's clients has changed, so they can begin again.
        """
        if len(jobs) > 1:
            for job in jobs:
                job.alone = True
                self._enqueue(job)
            return
        (job,) = jobs
        if len(job.clients) > 1:
            for single in self._split(job):
                self._enqueue(single)
            return
        (client,) = job.clients
        died = isinstance(error, RayActorError)
        what = "its worker process died" if died else "its worker failed"
        reason = f"client {client}, {job.kind}: {what}: {error}"
        if not job.messages:
            self._reply(job, [Reply(FIRST_NODE + client, error=reason)])
            return
        code = _flower.CLIENT_APP_RAISED_EXCEPTION
        self._reply(
            job, [Message(Error(code, reason), reply_to=m) for m in job.messages]
        )

    def _split(self, job: _Job) -> list[_Job]:
        """Return a cohort's job as one job for each of its clients."""
        (nodes, kind, own, config_key, _), shared = pickle.loads(job.payloads[0])
        singles = []
        for node, client in zip(nodes, job.clients, strict=True):
            mine = {node: own[node]} if node in own else {}
            parts = ([node], kind, mine, config_key, False)
            single = _Job(job.batch, (client,), job.kind, arrays=job.arrays)
            single.payloads.append(pickle.dumps((parts, shared), 5))
            single.alone = True
            singles.append(single)
        return singles

    def _reply(self, job: _Job, replies: list[Any]) -> None:
        job.batch.missing -= len(replies)
        if job.batch.dropped:
            return
        if not job.messages:
            job.batch.answers |= {reply.node: reply for reply in replies}
            return
        for message, reply in zip(job.messages, replies, strict=True):
            self._replies[message.metadata.message_id] = reply


def _unpack(payload: bytes, records: dict[int, ArrayRecord]) -> Message | _Part:
    """Make what the server sent; the array records are shared."""
    head, content = pickle.loads(payload)
    filled = RecordDict(
        {n: records[r] if isinstance(r, int) else r for n, r in content.items()}
    )
    if isinstance(head, tuple):
        nodes, message_type, own, config_key, batched = head
        return _Part(Cohort(filled, nodes, message_type, own, config_key), batched)
    return _flower.message_of(filled, head)


def _num_bytes(record: ArrayRecord) -> int:
    if isinstance(record, FlatRecord) and record.flat is not None:
        vectors = (record.flat.parameters, record.flat.buffers)
        return sum(vector.numel() * vector.element_size() for vector in vectors)
    return sum(len(array.data) for array in record.values())


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
                    f"'{failure.name}' ({type(failure.obj).__name__})"
                    for failure in failures
                    if not inspect.isroutine(failure.obj)
                }
    because = f", because of {', '.join(sorted(found))}" if found else ""
    return (
        f"the ClientApp cannot be sent to Ray workers{because}: "
        f"{error.__cause__ or error}. Make such objects inside the client's functions, "
        "or use engine = 'local'."
    )


# Starting Ray.


def _start_ray(workers: int | None, address: str | None) -> bool:
    """Make sure that Ray runs; return whether it is ours to end."""
    if ray.is_initialized():
        if address is not None:
            raise EngineError(
                f"address is {address!r}, but Ray is initialised already. Leave the "
                "address out to use that Ray, or call ray.shutdown() first."
            )
        return False
    show = log.isEnabledFor(logging.DEBUG)
    options: dict[str, Any] = {
        "namespace": NAMESPACE,
        "log_to_driver": show,
        "logging_level": logging.INFO if show else logging.ERROR,
    }
    if address is None:
        options |= {"include_dashboard": False, "num_cpus": workers}
    else:
        options["address"] = address
    try:
        with _quiet():
            context: Any = ray.init(**options)
    except BaseException as error:
        ray.shutdown()
        if isinstance(error, Exception):
            where = "start Ray" if address is None else f"join Ray at {address!r}"
            raise EngineError(f"cannot {where}: {error}") from error
        raise
    folder = context.address_info.get("session_dir") if context.address_info else None
    log.debug("Ray has started; what clients print is under %s/logs", folder)
    return True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray from telling others, from hints, and from environments of its own."""
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    added = [name for name in settings if name not in os.environ]
    os.environ.update({name: settings[name] for name in added})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _room(workers: int | None, gpus_per_worker: float) -> tuple[int, dict[str, Any]]:
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
