"""The workers of a grid, and the jobs that wait for them.

What is large travels once: the app when it is loaded, the global model when a round
begins. Of our own app a worker is sent a list of jobs; lists are cut when a worker is
free, shorter towards the end, so that all workers finish together. Any other app is
sent a client at a time: nobody's reply waits for another client.

The pool has the threads and their one lock. What it guards has none of its own: the
jobs that wait (:mod:`.job_queue`), the workers' slots (:class:`Crew`), the batches
(:mod:`.jobs`), and the replies until somebody takes them.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from flwr.app import Error, Message
from flwr.clientapp import ClientApp

from ...core.client_store import ClientRows, ClientStore
from ...core.errors import ClientError, EngineError, describe_failure
from ...core.local_models import ModelSum
from ...messages import _flower
from ...messages.dispatch import Answers, Cohort
from ..grid import Addressed, Nodes, expired, expires, numbered
from .job_queue import JobQueue
from .jobs import Arrived, Batch, CohortBatch, Job, jobs_of_cohort, jobs_of_messages
from .worker import Answer, Side, error_reply, unpacked

# Seconds for a thread to notice that its worker was killed.
THREAD_TIMEOUT = 5.0

# Seconds that a lock waits at most: it may not be asked to wait for ever.
LONGEST_WAIT = 100_000.0


class Sent(NamedTuple):
    """What came back of a list."""

    answers: list[Answer]
    rows: list[Any]  # what stands for the models of each share that keeps them
    states: list[Any]  # what stands for the state of each client that keeps one
    written: Mapping[str, ClientRows]  # what clients keep in the store


class Crew(Protocol):
    """The worker processes, each in a slot, which another takes over when it is lost.

    It has no lock of its own. The pool calls :meth:`replace` with its lock, and without
    it what waits for workers: :meth:`load`, :meth:`send` and :meth:`kill`.

    Attributes
    ----------
    LOST : tuple
        The exceptions that say that a worker is no more.
    handles : list
        The worker in each slot.
    places : list[str]
        Where each is.
    gone : set[int]
        Slots that nobody can take over.
    """

    LOST: tuple[type[Exception], ...]
    handles: list[Any]
    places: list[str]
    gone: set[int]

    @property
    def slots(self) -> list[int]:
        """The slots that have a worker."""

    def put(self, value: Any) -> Any:
        """Put a value where the workers find it; return what stands for it."""

    def get(self, references: Sequence[Any]) -> list[Any]:
        """Return the values that such references stand for."""

    def load(self, slots: Sequence[int], app: ClientApp, nodes: Nodes) -> None:
        """Send an app to the workers in some slots and wait until they have it."""

    def send(
        self,
        worker: Any,
        jobs: Sequence[Job],
        known: Mapping[int, Any],
        kept: Mapping[str, ClientRows] | None,
    ) -> Sent:
        """Send a list to a worker; wait for the answers.

        ``known`` stands for the states that clients have, ``kept`` is what they have
        in the store.
        """

    def shard(self, rows: Any, place: str, side: Side) -> Any:
        """Return what a share's models are, which stay with the workers."""

    def replace(self, lost: Any) -> None:
        """Start a worker anew where it was; give it up if that cannot be."""

    def kill(self) -> None:
        """End the workers."""


class Pool:
    """The workers, and the jobs that wait for them.

    A thread of this process stands behind each worker: it takes a list of jobs,
    sends it, and blocks until the answers are there.

    Parameters
    ----------
    crew : Crew
        The workers.
    """

    def __init__(self, crew: Crew) -> None:
        self._lock = threading.RLock()  # A finaliser may run in any thread.
        self._work = threading.Condition(self._lock)
        self._answers = threading.Condition(self._lock)
        self._closed = False
        self._failure: BaseException | None = None
        self._numbers = itertools.count(1)
        self._forget()
        self.crew = crew
        self._threads = [
            threading.Thread(target=self._serve, args=(slot,), daemon=True)
            for slot in range(len(crew.handles))
        ]

    def _forget(self) -> None:
        """Forget all jobs, replies and clients."""
        self._queue = JobQueue()
        self._replies: dict[str, Message] = {}
        # Those that nobody has answered, in the order in which they expire.
        self._open: dict[str, tuple[Message, Batch]] = {}
        self._expiries: list[tuple[float, str]] = []
        self._states: dict[int, Any] = {}

    # What the grid calls.

    def load(
        self,
        app: ClientApp,
        nodes: Nodes,
        store: ClientStore,
        tables: Mapping[str, Sequence[str]],
    ) -> None:
        """Send an app to the workers and wait until they have it.

        What clients keep is in ``store``; they read ``tables`` of it by a message's
        type.
        """
        with self._lock:
            self._check()
            self._queue.give_up()
            while self._queue.busy:
                self._answers.wait()
                self._check()
            self._forget()
            self._store, self._tables = store, dict(tables)
            slots = self.crew.slots
        self.crew.load(slots, app, nodes)
        for thread in self._threads:
            if thread.ident is None:
                thread.start()

    def push(self, messages: Sequence[Addressed]) -> Batch:
        """Let the messages wait for the workers."""
        batch = Batch(missing=len(messages))
        with self._lock:
            self._check()
        jobs = jobs_of_messages(messages, batch, self._numbers, self.crew.put)
        with self._lock:
            for message, _ in messages:
                name = message.metadata.message_id
                self._open[name] = message, batch
                heapq.heappush(self._expiries, (expires(message), name))
        self._push(jobs)
        return batch

    def push_cohort(
        self,
        cohort: Cohort,
        lists: Sequence[Sequence[int]],
        sizes: Sequence[float],
        *,
        batched: bool,
        alone: bool = False,
    ) -> CohortBatch:
        """Let a cohort wait for the workers, in lists that are handled at once.

        ``sizes`` says how much work each list is. ``alone`` sends a worker one list at
        a time, however short: replies of one sending come together, and at a deadline
        a slow client would take those of others with it.
        """
        batch = CohortBatch(lists)
        with self._lock:
            self._check()
        numbers, put = self._numbers, self.crew.put
        jobs = jobs_of_cohort(cohort, lists, sizes, batched, alone, batch, numbers, put)
        self._push(jobs)
        return batch

    def _push(self, jobs: Sequence[Job]) -> None:
        with self._lock:
            self._check()
            self._queue.push(jobs)
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
        if self._expiries:
            soon = max(self._expiries[0][0] - time.time(), 0.0)
            # Longer than some days no lock waits.
            left = min(soon if left is None else min(soon, left), LONGEST_WAIT)
        self._answers.wait(left)
        self._expire()
        return True

    def _expire(self) -> None:
        """Answer messages that have expired, as the SuperLink does."""
        while self._expiries and self._expiries[0][0] <= time.time():
            _, name = heapq.heappop(self._expiries)
            if name in self._open:
                message, _ = self._open[name]
                self._answer(name, expired(message))

    def _answer(self, name: str, reply: Message) -> None:
        """Take in a reply, unless there is one already."""
        if name in self._open:
            _, batch = self._open.pop(name)
            self._tidy()
            batch.missing -= 1
            if not batch.dropped:
                self._replies[name] = reply

    def _tidy(self) -> None:
        """Forget when messages expire that are answered, now and then."""
        if len(self._expiries) > 2 * len(self._open) + 1000:
            self._expiries = [e for e in self._expiries if e[1] in self._open]
            heapq.heapify(self._expiries)

    def finish(self, batch: Batch, messages: Sequence[Addressed]) -> list[Message]:
        """Return a batch's replies so far, and give up the others."""
        with self._lock:
            batch.dropped = True
            for message, _ in messages:
                self._open.pop(message.metadata.message_id, None)
            self._tidy()
            return self._hand_out(m.metadata.message_id for m, _ in messages)

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
            self._expire()
            return self._hand_out(message_ids)

    def _hand_out(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def on(self, place: str) -> list[Any]:
        """Return the workers at a place."""
        with self._lock:
            self._check()
            crew = self.crew
            return [crew.handles[k] for k in crew.slots if crew.places[k] == place]

    def lost(self, worker: Any) -> None:
        """Take note that a worker is no more; replace it if its node is there."""
        with self._lock:
            if not self._closed:
                self.crew.replace(worker)

    def client_states(self) -> dict[int, Any]:
        """Return what clients keep between rounds, by number."""
        clients = list(self._states)
        kept = self.crew.get([self._states[client] for client in clients])
        return dict(zip(clients, kept, strict=True))

    def restore_clients(self, states: Mapping[int, Any]) -> None:
        """Let clients go on with what they kept in another run."""
        self._states = {k: self.crew.put(state) for k, state in states.items()}

    def close(self) -> None:
        """End the threads and the workers."""
        with self._lock:
            self._closed = True
            self._work.notify_all()
            self._answers.notify_all()
        self.crew.kill()
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(THREAD_TIMEOUT)
        self._forget()
        self.crew.handles = []

    def _check(self) -> None:
        if self._closed:
            raise EngineError("the grid is closed.")
        if self._failure is not None:
            raise EngineError(f"the workers have failed: {self._failure}")

    # What the threads do: from lists to replies.

    def _serve(self, slot: int) -> None:
        try:
            while jobs := self._next_list(slot):
                self._handle(slot, jobs)
        except Exception as error:
            with self._lock:
                if not self._closed:
                    self._failure = error
                    self._answers.notify_all()

    def _next_list(self, slot: int) -> list[Job]:
        """Wait for work and take a worker's next list of it; empty at the end."""
        with self._lock:
            while not self._closed and slot not in self.crew.gone:
                jobs = self._queue.take(len(self.crew.slots))
                if jobs:
                    return jobs
                self._work.wait()
            return []

    def _handle(self, slot: int, jobs: list[Job]) -> None:
        worker, place = self.crew.handles[slot], self.crew.places[slot]
        kept = self._rows_of(jobs)
        try:
            sent = self.crew.send(worker, jobs, self._states, kept)
        except BaseException as error:  # A client's own: no signal comes to a thread.
            if self._closed:
                return
            if isinstance(error, self.crew.LOST):
                self.lost(worker)
            if slot in self.crew.gone:
                self._settle(jobs, partial(self._hand_back, jobs))
            else:
                self._settle(jobs, partial(self._blame, jobs, error))
        else:
            self._settle(jobs, partial(self._accept, jobs, sent, place))

    def _rows_of(self, jobs: Sequence[Job]) -> dict[str, ClientRows] | None:
        """Return what a list's clients keep and read; ``None`` where they never do."""
        clients: dict[str, list[int]] = {}
        for job in jobs:
            for table in self._tables.get(job.kind, ()):
                clients.setdefault(table, []).extend(job.clients)
        return {
            table: self._store.read(table, np.unique(some))
            for table, some in clients.items()
        } or None

    def _settle(self, jobs: list[Job], outcome: Callable[[], None]) -> None:
        """Note how a list ended, and let what waited for its clients go on."""
        with self._lock:
            self._queue.release(jobs)
            outcome()
            self._work.notify_all()
            self._answers.notify_all()

    def _accept(self, jobs: list[Job], sent: Sent, place: str) -> None:
        written = sent.written
        if any(job.batch.dropped for job in jobs):  # Their round is over.
            waited = [k for job in jobs if not job.batch.dropped for k in job.clients]
            written = {table: own.only(waited) for table, own in written.items()}
        try:
            self._store.write_all(written)
        except ClientError as error:  # The workers cannot know what others keep.
            self._blame(jobs, error)
            return
        states, rows = iter(sent.states), iter(sent.rows)
        self._queue.paces.learn(jobs, [answer.seconds for answer in sent.answers])
        for job, answer in zip(jobs, sent.answers, strict=True):
            for client, has_state in zip(job.clients, answer.has_state, strict=True):
                if has_state:
                    self._states[client] = next(states)
                else:
                    self._states.pop(client, None)
            if job.share is None:
                self._reply(job, answer.replies)
            else:
                shard = None
                if answer.side is not None:
                    shard = self.crew.shard(next(rows), place, answer.side)
                self._arrive(job, answer.replies, answer.total, shard)

    def _hand_back(self, jobs: list[Job]) -> None:
        """Let others do what a worker has not done."""
        for job in jobs:
            self._queue.put_back(job)

    def _blame(self, jobs: list[Job], error: BaseException) -> None:
        """Find the client because of which a list came to nothing: try each by itself.

        No state of the list's clients has changed, so they can begin again.
        """
        if len(jobs) > 1:
            for job in jobs:
                job.alone = True
                self._queue.put_back(job)
            return
        (job,) = jobs
        if len(job.clients) > 1:
            for single in job.split():
                self._queue.put_back(single)
            return
        (client,) = job.clients
        reason = self._reason(client, job.kind, error)
        if job.share is not None:
            self._arrive(job, [error_reply(client, reason)], None, None)
            return
        code = _flower.CLIENT_APP_RAISED_EXCEPTION
        self._reply(
            job,
            [numbered(Message(Error(code, reason), reply_to=m)) for m in job.messages],
        )

    def _reply(self, job: Job, replies: list[Message]) -> None:
        for message, reply in zip(job.messages, replies, strict=True):
            self._answer(message.metadata.message_id, reply)

    def _arrive(
        self,
        job: Job,
        replies: list[tuple[Any, ...]],
        total: ModelSum | None,
        shard: Any,
    ) -> None:
        job.batch.missing -= len(replies)
        if not job.batch.dropped:
            assert isinstance(job.batch, CohortBatch)
            answers = Answers(unpacked(replies), total or ModelSum())
            job.batch.add(job.place, Arrived(answers, shard))

    def _reason(self, client: int, kind: str, error: BaseException) -> str:
        """Return why a client failed that was tried by itself."""
        if isinstance(error, ClientError):
            return describe_failure(client, kind, error)
        if isinstance(error, self.crew.LOST):
            return f"client {client}, {kind}: its worker process died: {error}"
        cause = f"{type(error).__name__}: {error}"
        return f"client {client}, {kind}: its worker failed: {cause}"
