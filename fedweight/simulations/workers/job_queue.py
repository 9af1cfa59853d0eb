"""The jobs that wait: in which order, how many make a list, and how long they take.

Neither class has a lock of its own: the pool's is held by whoever calls them.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence

from .jobs import Job

# Seconds of work in a list. A list should outweigh what a task costs Ray; but its
# replies arrive together, so a timeout can lose that much work.
SHORTEST_LIST = 0.02
LONGEST_LIST = 0.5


class Paces:
    """How long jobs take, by what was measured before."""

    def __init__(self) -> None:
        # Seconds that a client's messages take, and a unit of work of a pace.
        self._measured: dict[tuple[str, tuple[int, ...]], float] = {}
        self._typical: dict[tuple[str, bool], float] = {}

    def learn(self, jobs: Sequence[Job], seconds: Iterable[float]) -> None:
        """Take note of how long some jobs took."""
        taken: dict[tuple[str, bool], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for job, own in zip(jobs, seconds, strict=True):
            total, work = taken[job.pace]
            taken[job.pace] = [total + own, work + job.work]
            if job.share is None:
                # The mean of now and before: one measurement of a quick client is
                # noise.
                key = (job.kind, job.clients)
                self._measured[key] = (self._measured.get(key, own) + own) / 2
        for pace, (total, work) in taken.items():
            if work:
                self._typical[pace] = total / work

    def took_before(self, job: Job) -> float | None:
        """Return how long a client's messages took before, if that was measured."""
        return None if job.share else self._measured.get((job.kind, job.clients))

    def expected(self, job: Job) -> float | None:
        """Return how long a job will take, or None if nothing like it ever ran."""
        if job.seconds is not None:
            return job.seconds
        typical = self._typical.get(job.pace)
        return None if typical is None else typical * job.work

    def typical(self, job: Job) -> float:
        """Return how long a unit of work like a job's takes; 0 if it is not known."""
        return self._typical.get(job.pace, 0.0)


class JobQueue:
    """The jobs that wait for a worker, and what is known of those that run.

    A client's jobs run one after another: while one runs, the others are put aside.

    Attributes
    ----------
    busy : set[int]
        The clients whose jobs run.
    paces : Paces
        What is known of how long jobs take.
    """

    def __init__(self) -> None:
        self.busy: set[int] = set()
        self._jobs: list[Job] = []  # a heap
        self._parked: dict[int, list[Job]] = defaultdict(list)
        self._numbers = itertools.count(1)
        self.paces = Paces()
        self._backlog = 0.0  # seconds of work that wait, as far as is known
        self._unknown = 0.0  # work that waits, of which it is not known
        self._running = 0.0

    def push(self, jobs: Sequence[Job]) -> None:
        """Let a push's jobs wait, behind those of earlier ones."""
        push = next(self._numbers)
        for job in jobs:
            job.seconds = self.paces.took_before(job)
            # Clients that took longest begin first; a cohort's lists keep their
            # order, in which they will be taken.
            first = 0.0 if job.share else -(self.paces.expected(job) or 0.0)
            job.order = (push, first, next(self._numbers))
            self.put_back(job)

    def put_back(self, job: Job) -> None:
        """Let a job wait at its place in the order."""
        heapq.heappush(self._jobs, job)
        if job.seconds is None:
            self._unknown += job.work
        else:
            self._backlog += job.seconds

    def give_up(self) -> None:
        """Drop the batches of all jobs that wait."""
        for job in itertools.chain(self._jobs, *self._parked.values()):
            job.batch.dropped = True

    def take(self, num_workers: int) -> list[Job]:
        """Take the next list for one of so many workers; empty if no job may begin."""
        jobs: list[Job] = []
        seconds, limit = 0.0, 0.0
        while self._front() is not None:
            job = self._jobs[0]
            expected = self.paces.expected(job)
            if not jobs:
                limit = self._limit(job, num_workers)
            elif job.alone or expected is None or seconds + expected / 2 > limit:
                break
            jobs.append(self._dequeue())
            self.busy.update(job.clients)
            job.expected = expected or 0.0
            seconds += job.expected
            if job.alone or expected is None:
                break
        self._running += seconds
        return jobs

    def release(self, jobs: Sequence[Job]) -> None:
        """Take note that a list has ended; what waited for its clients may go on."""
        self._running -= sum(job.expected for job in jobs)
        for job in jobs:
            self.busy.difference_update(job.clients)
        if not self.busy:
            self._running = 0.0
        if self._parked:
            for client in [client for job in jobs for client in job.clients]:
                for parked in self._parked.pop(client, []):
                    self.put_back(parked)

    def _front(self) -> Job | None:
        """Return the first job that may begin; put aside those that may not."""
        while self._jobs:
            job = self._jobs[0]
            busy = self.busy.intersection(job.clients)
            if not job.batch.dropped and not busy:
                return job
            self._dequeue()
            if not job.batch.dropped:
                self._parked[min(busy)].append(job)
        self._backlog = self._unknown = 0.0  # whatever rounding has left
        return None

    def _dequeue(self) -> Job:
        job = heapq.heappop(self._jobs)
        if job.seconds is None:
            self._unknown -= job.work
        else:
            self._backlog -= job.seconds
        return job

    def _limit(self, job: Job, num_workers: int) -> float:
        """Return how many seconds of work the next list may have.

        Half of a worker's share of what waits: lists become shorter towards the end.
        """
        waiting = self._backlog + self._unknown * self.paces.typical(job)
        share = (waiting + self._running) / num_workers
        return max(
            min(waiting / (2 * num_workers), LONGEST_LIST), min(share, SHORTEST_LIST)
        )
