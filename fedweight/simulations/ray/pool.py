"""The Ray workers, and the jobs that wait for them.

What is large travels once: the app when it is loaded, the global model when a round
begins, both into Ray's shared memory. A worker is sent a list of jobs, never a message
at a time. Lists are cut when a worker is free, shorter towards the end, so that all
workers finish together.
"""

from __future__ import annotations

import contextlib
import heapq
import inspect
import itertools
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import ray
from flwr.app import ArrayRecord, Error, Message
from flwr.clientapp import ClientApp
from ray.exceptions import RayError
from ray.util.check_serialize import inspect_serializability
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ...core.errors import EngineError
from ...core.local_models import ModelSum
from ...messages import _flower
from ...messages.arrays import FlatRecord
from ...messages.dispatch import Answers, Cohort
from ..grid import RunConfig, SimulationGrid
from .rows import LOST, Shard
from .worker import Answer, Share, Worker, error_reply, pack, unpacked

# Seconds of work in a list. A list should outweigh what a task costs Ray; but its
# replies arrive together, so a timeout can lose that much work.
SHORTEST_LIST = 0.02
LONGEST_LIST = 0.5

# An array record used by one message alone travels with it if it has at most so many
# bytes, and through shared memory otherwise.
INLINE_BYTES = 100_000

# Seconds to wait for the workers; a cluster where others work may have no room.
START_TIMEOUT = 120.0

# Seconds for a thread to notice that its worker was killed.
THREAD_TIMEOUT = 5.0


@dataclass(eq=False)
class Batch:
    """The messages of one push: how many are not answered yet."""

    missing: int
    dropped: bool = False


class Arrived(NamedTuple):
    """What came of a list of a cohort's clients, or of one of them."""

    answers: Answers
    shard: Shard | None


class CohortBatch(Batch):
    """A cohort, and what came of it and waits to be taken in the lists' order.

    Parameters
    ----------
    lists : Sequence[Sequence[int]]
        The cohort's nodes.
    """

    def __init__(self, lists: Sequence[Sequence[int]]) -> None:
        super().__init__(sum(map(len, lists)))
        self._left = [len(nodes) for nodes in lists]
        self._next = 0
        # By list, and by place in it where its clients were tried each by itself.
        self._arrived: dict[tuple[int, int], Arrived] = {}

    def add(self, place: tuple[int, int], arrived: Arrived) -> None:
        """Take in what came of a job."""
        self._arrived[place] = arrived
        self._left[place[0]] -= len(arrived.answers.replies)

    def take(self, *, everything: bool = False) -> list[Arrived]:
        """Return what is next in order; or what is there, though others are missing."""
        first = self._next
        while self._next < len(self._left) and not self._left[self._next]:
            self._next += 1
        places = sorted(self._arrived) if everything or self._next > first else []
        ready = [p for p in places if everything or p[0] < self._next]
        return [self._arrived.pop(place) for place in ready]


@dataclass(eq=False)
class Job:
    """A client's messages of one push, in their order; or a cohort's clients at once.

    ``payloads`` are the messages as bytes, or ``share`` is what the cohort's clients
    are sent; array records that travel apart are in ``arrays``, by the number that
    stands for them. ``work`` says how much it is, in clients or examples; ``seconds``
    how long it will take by what was measured before, None if nothing was;
    ``expected`` is what the list that it is in reckons with; an ``alone`` job gets a
    list to itself. ``place`` is where a cohort's batch keeps what comes of it.
    """

    batch: Batch
    clients: tuple[int, ...]
    kind: str
    messages: list[Message] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)
    share: Share | None = None
    place: tuple[int, int] = (0, 0)
    arrays: dict[int, Any] = field(default_factory=dict)
    work: float = 1.0
    seconds: float | None = None
    expected: float = 0.0
    order: tuple[float, float, int] = (0, 0, 0)
    alone: bool = False

    def __lt__(self, other: Job) -> bool:
        return self.order < other.order

    @property
    def pace(self) -> tuple[str, bool]:
        """Jobs of one pace take alike, for the same amount of work."""
        return self.kind, self.share is not None


class _Sent(NamedTuple):
    """What came back of a list."""

    answers: list[Answer]
    rows: list[Any]  # references to the models, for each share that keeps them
    states: list[Any]  # references, for each client that keeps one


class Pool:
    """The workers, and the jobs that wait for them.

    A thread of this process stands behind each worker: it takes a list of jobs,
    sends it, and blocks until the answers are there.

    Parameters
    ----------
    count : int
        How many workers; Ray runs already.
    options : dict
        What each asks Ray for.
    """

    def __init__(self, count: int, options: dict[str, Any]) -> None:
        self._lock = threading.RLock()  # A finaliser may run in any thread.
        self._work = threading.Condition(self._lock)
        self._answers = threading.Condition(self._lock)
        self._closed = False
        self._failure: BaseException | None = None
        self._numbers = itertools.count(1)
        self._forget()
        self._options = {"max_restarts": 0, **options}
        actor = cast(Any, ray.remote(Worker)).options(**self._options)
        self.workers: list[Any] = [actor.remote() for _ in range(count)]
        self._places: list[str] = [""] * count  # the Ray node of each
        self._gone: set[int] = set()  # workers whose node is gone
        self._threads = [
            threading.Thread(target=self._serve, args=(slot,), daemon=True)
            for slot in range(count)
        ]

    def _forget(self) -> None:
        """Forget all jobs, replies and clients."""
        self._jobs: list[Job] = []  # a heap
        self._parked: dict[int, list[Job]] = defaultdict(list)
        self._busy: set[int] = set()
        self._replies: dict[str, Message] = {}
        self._states: dict[int, Any] = {}
        # Seconds that a client's messages take, and a unit of work of a pace.
        self._measured: dict[tuple[str, tuple[int, ...]], float] = {}
        self._typical: dict[tuple[str, bool], float] = {}
        self._backlog = 0.0  # seconds of work that wait, as far as is known
        self._unknown = 0.0  # work that waits, of which it is not known
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
            slots = [s for s in range(len(self.workers)) if s not in self._gone]
        try:
            self._app = (ray.put(app), num_clients, run_config)
        except Exception as error:
            raise EngineError(_unshippable(app, error)) from error
        loaded = [self.workers[slot].load.remote(*self._app) for slot in slots]
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
            self._places[slot] = place
        for thread in self._threads:
            if thread.ident is None:
                thread.start()

    def push(self, messages: Sequence[Message]) -> Batch:
        """Let the messages wait for the workers."""
        batch = Batch(missing=len(messages))
        with self._lock:
            self._check()
        self._push(self._pack(messages, batch))
        return batch

    def push_cohort(
        self,
        cohort: Cohort,
        lists: Sequence[Sequence[int]],
        sizes: Sequence[float],
        *,
        batched: bool,
    ) -> CohortBatch:
        """Let a cohort wait for the workers, in lists that are handled at once.

        ``sizes`` says how much work each list is.
        """
        batch = CohortBatch(lists)
        with self._lock:
            self._check()
        self._push(self._pack_cohort(cohort, lists, sizes, batched, batch))
        return batch

    def _push(self, jobs: Sequence[Job]) -> None:
        with self._lock:
            self._check()
            push = next(self._numbers)
            for job in jobs:
                job.seconds = self._took_before(job)
                # Clients that took longest begin first; a cohort's lists keep their
                # order, in which they will be taken.
                first = 0.0 if job.share else -(self._expected(job) or 0.0)
                job.order = (push, first, next(self._numbers))
                self._enqueue(job)
            self._work.notify_all()

    def wait(self, batch: Batch, deadline: float | None) -> None:
        """Wait until a batch is answered, or the deadline is there."""
        with self._lock:
            while batch.missing and self._wait(deadline):
                pass

    def _wait(self, deadline: float | None) -> bool:
        """Wait for something to be answered; return whether there is time left."""
        self._check()
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return False
        self._answers.wait(left)
        return True

    def finish(self, batch: Batch, messages: Sequence[Message]) -> list[Message]:
        """Return a batch's replies so far, and give up the others."""
        with self._lock:
            batch.dropped = True
            return self._hand_out(m.metadata.message_id for m in messages)

    def take(self, batch: CohortBatch, deadline: float | None) -> Iterator[Arrived]:
        """Yield what comes of a cohort, in the lists' order.

        At the deadline it yields what is there, and gives up the others.
        """
        time_left = True
        try:
            while time_left and batch.missing:
                with self._lock:
                    while not (ready := batch.take()) and batch.missing and time_left:
                        time_left = self._wait(deadline)
                yield from ready
        finally:
            with self._lock:
                batch.dropped = True
        yield from batch.take(everything=True)

    def pull(self, message_ids: Iterable[str]) -> list[Message]:
        """Hand out the replies that are there, once."""
        with self._lock:
            self._check()
            return self._hand_out(message_ids)

    def _hand_out(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def on(self, place: str) -> list[Any]:
        """Return the workers on a Ray node."""
        with self._lock:
            self._check()
            return [
                worker
                for slot, worker in enumerate(self.workers)
                if self._places[slot] == place and slot not in self._gone
            ]

    def lost(self, worker: Any) -> None:
        """Take note that a worker is no more; replace it if its node is there."""
        with self._lock:
            if worker in self.workers and not self._closed:
                self._replace(self.workers.index(worker))

    def close(self) -> None:
        """End the threads and the workers."""
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

    def _check(self) -> None:
        if self._closed:
            raise EngineError("the Ray grid is closed.")
        if self._failure is not None:
            raise EngineError(f"the Ray grid has failed: {self._failure}")

    # From messages to jobs.

    def _pack(self, messages: Sequence[Message], batch: Batch) -> list[Job]:
        """Turn messages into jobs; put what is large or shared into shared memory."""
        uses: dict[int, int] = defaultdict(int)
        for message in messages:
            for record in message.content.array_records.values():
                uses[id(record)] += 1
        put: dict[int, tuple[int, Any]] = {}
        jobs: dict[int, Job] = {}
        for message in messages:
            client = SimulationGrid.client_of(message.metadata.dst_node_id)
            kind = message.metadata.message_type
            job = jobs.setdefault(client, Job(batch, (client,), kind))
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
            job.payloads.append(pack(message, records))
        return list(jobs.values())

    def _pack_cohort(
        self,
        cohort: Cohort,
        lists: Sequence[Sequence[int]],
        sizes: Sequence[float],
        batched: bool,
        batch: CohortBatch,
    ) -> list[Job]:
        """Turn a cohort into jobs; its array records travel once."""
        content: dict[str, Any] = dict(cohort.content.items())
        arrays = {}
        for name, record in cohort.content.array_records.items():
            number = next(self._numbers)
            arrays[number] = ray.put(record)
            content[name] = number
        return [
            Job(
                batch,
                tuple(map(SimulationGrid.client_of, nodes)),
                cohort.message_type,
                share=Share.of(cohort, nodes, content, batched),
                place=(number, 0),
                arrays=arrays,
                work=size,
            )
            for number, (nodes, size) in enumerate(zip(lists, sizes, strict=True))
        ]

    def _enqueue(self, job: Job) -> None:
        heapq.heappush(self._jobs, job)
        if job.seconds is None:
            self._unknown += job.work
        else:
            self._backlog += job.seconds

    def _dequeue(self) -> Job:
        job = heapq.heappop(self._jobs)
        if job.seconds is None:
            self._unknown -= job.work
        else:
            self._backlog -= job.seconds
        return job

    # From jobs to lists.

    def _next_list(self, slot: int) -> list[Job]:
        """Wait for work and take a worker's next list of it; empty at the end."""
        with self._lock:
            while not self._closed and slot not in self._gone:
                jobs = self._take()
                if jobs:
                    return jobs
                self._work.wait()
            return []

    def _take(self) -> list[Job]:
        jobs: list[Job] = []
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

    def _front(self) -> Job | None:
        """Return the first job that may begin; put aside those that may not."""
        while self._jobs:
            job = self._jobs[0]
            busy = self._busy.intersection(job.clients)
            if not job.batch.dropped and not busy:
                return job
            self._dequeue()
            if not job.batch.dropped:
                self._parked[min(busy)].append(job)
        self._backlog = self._unknown = 0.0  # whatever rounding has left
        return None

    def _expected(self, job: Job) -> float | None:
        """Return how long a job will take, or None if nothing like it ever ran."""
        if job.seconds is not None:
            return job.seconds
        typical = self._typical.get(job.pace)
        return None if typical is None else typical * job.work

    def _took_before(self, job: Job) -> float | None:
        """Return how long a client's messages took before."""
        return None if job.share else self._measured.get((job.kind, job.clients))

    def _limit(self, job: Job) -> float:
        """Return how many seconds of work the next list may have.

        Half of a worker's share of what waits: lists become shorter towards the end.
        """
        waiting = self._backlog + self._unknown * self._typical.get(job.pace, 0.0)
        count = len(self.workers) - len(self._gone)
        share = (waiting + self._running) / count
        return max(min(waiting / (2 * count), LONGEST_LIST), min(share, SHORTEST_LIST))

    # From lists to replies, in the workers' threads.

    def client_states(self) -> dict[int, Any]:
        """Return what clients keep between rounds, by number."""
        clients = list(self._states)
        kept = ray.get([self._states[client] for client in clients])
        return dict(zip(clients, kept, strict=True))

    def restore_clients(self, states: Mapping[int, Any]) -> None:
        """Let clients go on with what they kept in another run."""
        self._states = {client: ray.put(state) for client, state in states.items()}

    def _serve(self, slot: int) -> None:
        try:
            while jobs := self._next_list(slot):
                self._handle(slot, jobs)
        except Exception as error:
            with self._lock:
                if not self._closed:
                    self._failure = error
                    self._answers.notify_all()

    def _handle(self, slot: int, jobs: list[Job]) -> None:
        worker, place = self.workers[slot], self._places[slot]
        try:
            sent = self._send(worker, jobs)
        except Exception as error:
            if self._closed:
                return
            if isinstance(error, LOST):
                self.lost(worker)
            if slot in self._gone:
                self._settle(jobs, partial(self._hand_back, jobs))
            else:
                self._settle(jobs, partial(self._blame, jobs, error))
        else:
            self._settle(jobs, partial(self._accept, jobs, sent, place))

    def _send(self, worker: Any, jobs: list[Job]) -> _Sent:
        """Send a list to a worker; wait for the answers."""
        arrays: dict[int, Any] = {}
        for job in jobs:
            arrays |= job.arrays
        known = self._states
        clients = [client for job in jobs for client in job.clients]
        states = {client: known[client] for client in clients if client in known}
        kept = sum(job.share is not None and job.share.keeps_rows for job in jobs)
        sent = worker.run.options(num_returns=1 + kept).remote(
            [(job.clients, job.share or job.payloads) for job in jobs],
            list(arrays),
            list(states),
            *arrays.values(),
            *states.values(),
        )
        first, *rows = sent if kept else [sent]
        # The only place where what clients reply comes into this process. Vectors stay
        # in shared memory, and last as long as somebody looks at them.
        answers: list[Answer] = ray.get(first)
        count = sum(sum(answer.has_state) for answer in answers)
        if not count:
            return _Sent(answers, rows, [])
        # Only now it is known how many there are. As results of a task they are this
        # process's own, and stay when the worker ends.
        done, *references = worker.states.options(num_returns=1 + count).remote()
        ray.get(done)  # Raises whatever went wrong.
        return _Sent(answers, rows, references)

    def _replace(self, slot: int) -> None:
        """Start a worker anew where it was; give it up if its node is gone."""
        place = self._places[slot]
        alive = {node["NodeID"] for node in cast(Any, ray).nodes() if node["Alive"]}
        if place not in alive:
            self._gone.add(slot)
            if len(self._gone) == len(self.workers):
                raise EngineError("the Ray nodes of all workers are gone.")
            return
        here = NodeAffinitySchedulingStrategy(place, soft=False)
        actor = cast(Any, ray.remote(Worker))
        worker = actor.options(**self._options, scheduling_strategy=here).remote()
        worker.load.remote(*self._app)
        self.workers[slot] = worker

    def _settle(self, jobs: list[Job], outcome: Callable[[], None]) -> None:
        """Note how a list ended, and let what waited for its clients go on."""
        with self._lock:
            self._running -= sum(job.expected for job in jobs)
            for job in jobs:
                self._busy.difference_update(job.clients)
            if not self._busy:
                self._running = 0.0
            outcome()
            if self._parked:
                for client in [client for job in jobs for client in job.clients]:
                    for parked in self._parked.pop(client, []):
                        self._enqueue(parked)
            self._work.notify_all()
            self._answers.notify_all()

    def _accept(self, jobs: list[Job], sent: _Sent, place: str) -> None:
        states, rows = iter(sent.states), iter(sent.rows)
        taken: dict[tuple[str, bool], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for job, answer in zip(jobs, sent.answers, strict=True):
            for client, has_state in zip(job.clients, answer.has_state, strict=True):
                if has_state:
                    self._states[client] = next(states)
                else:
                    self._states.pop(client, None)
            seconds, work = taken[job.pace]
            taken[job.pace] = [seconds + answer.seconds, work + job.work]
            if job.share is None:
                # The mean of now and before: one measurement of a quick client is
                # noise.
                key = (job.kind, job.clients)
                before = self._measured.get(key, answer.seconds)
                self._measured[key] = (before + answer.seconds) / 2
                self._reply(job, answer.replies)
            else:
                shard = None
                if answer.side is not None:
                    shard = Shard(next(rows), place, answer.side)
                self._arrive(job, answer.replies, answer.total, shard)
        for pace, (seconds, work) in taken.items():
            if work:
                self._typical[pace] = seconds / work

    def _hand_back(self, jobs: list[Job]) -> None:
        """Let others do what a worker has not done."""
        for job in jobs:
            self._enqueue(job)

    def _blame(self, jobs: list[Job], error: Exception) -> None:
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
            for single in _split(job):
                self._enqueue(single)
            return
        (client,) = job.clients
        died = isinstance(error, LOST)
        what = "its worker process died" if died else "its worker failed"
        reason = f"client {client}, {job.kind}: {what}: {error}"
        if job.share is not None:
            self._arrive(job, [error_reply(client, reason)], None, None)
            return
        code = _flower.CLIENT_APP_RAISED_EXCEPTION
        self._reply(
            job, [Message(Error(code, reason), reply_to=m) for m in job.messages]
        )

    def _reply(self, job: Job, replies: list[Message]) -> None:
        job.batch.missing -= len(replies)
        if not job.batch.dropped:
            for message, reply in zip(job.messages, replies, strict=True):
                self._replies[message.metadata.message_id] = reply

    def _arrive(
        self,
        job: Job,
        replies: list[tuple[Any, ...]],
        total: ModelSum | None,
        shard: Shard | None,
    ) -> None:
        job.batch.missing -= len(replies)
        if not job.batch.dropped:
            assert isinstance(job.batch, CohortBatch)
            answers = Answers(unpacked(replies), total or ModelSum())
            job.batch.add(job.place, Arrived(answers, shard))


def _split(job: Job) -> Iterator[Job]:
    """Yield a cohort's job as one job for each of its clients."""
    assert job.share is not None
    for number, (client, share) in enumerate(
        zip(job.clients, job.share.split(), strict=True)
    ):
        yield Job(
            job.batch,
            (client,),
            job.kind,
            share=share,
            place=(job.place[0], number),
            arrays=job.arrays,
            work=job.work / len(job.clients),
            alone=True,
        )


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
