"""Jobs: what a worker is given to do, made of messages or of a cohort.

A job is a client's messages of one push, or some clients of a cohort at once; those of
one push are a batch. An array record that is large, or that several messages have,
travels apart from the jobs, and a number stands for it in them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, Message

from ...messages.dispatch import Answers, Cohort
from ...messages.records import records_of
from ..grid import Addressed, SimulationGrid
from .worker import Share, num_bytes, pack

# An array record travels with its message if it has at most so many bytes, and apart
# otherwise: where several messages have it, and where one alone has.
SHARED_BYTES = 4_000
INLINE_BYTES = 100_000


@dataclass(eq=False)
class Batch:
    """The messages of one push: how many are not answered yet."""

    missing: int
    dropped: bool = False


class Arrived(NamedTuple):
    """What came of a list of a cohort's clients, or of one of them."""

    answers: Answers
    shard: Any  # where models stay with the workers: Ray's


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

    def split(self) -> Iterator[Job]:
        """Yield a cohort's job as one job for each of its clients."""
        assert self.share is not None
        for number, (client, share) in enumerate(
            zip(self.clients, self.share.split(), strict=True)
        ):
            yield Job(
                self.batch,
                (client,),
                self.kind,
                share=share,
                place=(self.place[0], number),
                arrays=self.arrays,
                work=self.work / len(self.clients),
                alone=True,
            )


def jobs_of_messages(
    messages: Sequence[Addressed],
    batch: Batch,
    numbers: Iterator[int],
    put: Callable[[Any], Any],
) -> list[Job]:
    """Turn messages into jobs; put what is large or shared where workers find it.

    ``numbers`` gives those that stand for array records.
    """
    uses: dict[int, int] = defaultdict(int)
    for message, _ in messages:
        for record in records_of(message.content, ArrayRecord).values():
            uses[id(record)] += 1
    apart: dict[int, tuple[int, Any]] = {}
    jobs: dict[int, Job] = {}
    for message, nth in messages:
        client = SimulationGrid.client_of(message.metadata.dst_node_id)
        kind = message.metadata.message_type
        job = jobs.setdefault(client, Job(batch, (client,), kind, alone=True))
        records: dict[str, Any] = dict(message.content.items())
        for name, record in records_of(message.content, ArrayRecord).items():
            key = id(record)
            most = INLINE_BYTES if uses[key] == 1 else SHARED_BYTES
            if num_bytes(record) <= most:
                continue
            if key not in apart:
                apart[key] = next(numbers), put(record)
            number, reference = apart[key]
            records[name] = number
            job.arrays[number] = reference
        job.messages.append(message)
        # As bytes now: the server may change its records once they are pushed.
        job.payloads.append(pack(message, nth, records))
    return list(jobs.values())


def jobs_of_cohort(
    cohort: Cohort,
    lists: Sequence[Sequence[int]],
    sizes: Sequence[float],
    batched: bool,
    alone: bool,
    batch: CohortBatch,
    numbers: Iterator[int],
    put: Callable[[Any], Any],
) -> list[Job]:
    """Turn a cohort into jobs; its array records travel once.

    ``sizes`` says how much work each list is, ``alone`` whether a worker is sent one
    at a time; ``numbers`` and ``put`` are as for :func:`jobs_of_messages`.
    """
    content: dict[str, Any] = dict(cohort.content.items())
    arrays = {}
    for name, record in records_of(cohort.content, ArrayRecord).items():
        number = next(numbers)
        arrays[number] = put(record)
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
            alone=alone,
        )
        for number, (nodes, size) in enumerate(zip(lists, sizes, strict=True))
    ]
