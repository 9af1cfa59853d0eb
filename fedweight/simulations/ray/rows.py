"""Local models that stay on the Ray nodes where they were trained.

The models of a share of a cohort are one object in the store of a node; Ray moves them
to disk where memory is short, and lets go of them with the last reference to the
round's replies. Where all are on the server's own node it reads them there, without a
copy. Otherwise the operations on them are sent to workers that share their memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import ActorUnschedulableError, RayActorError, RayError

from ...core.errors import AggregationError
from ...core.layout import FlatModel, Integers, as_tensor
from ...core.local_models import LocalModels, members
from ...core.pytorch import torch
from ...core.updates import Accumulate, StackedUpdates, Updates
from ...messages.arrays import flatten
from ...messages.dispatch import Cohort, Reply
from ..workers.worker import Place, Side, Value, as_array

if TYPE_CHECKING:
    from torch import Tensor

# The server maps the rows of its own node into its memory where they fill at most this
# share of the node's store: what is mapped cannot be moved to disk.
MAPPED_SHARE = 0.5

# An argument of more bytes travels once to each node, not once to each worker.
SHARED_BYTES = 100_000

# So many bytes of rows, and of weighted sums of them, are at most in one call where
# there are several: a call's rows are in memory at once, whatever the store holds.
CALL_BYTES = 256 << 20

# How Ray says that a worker is no more.
LOST = (RayActorError, ActorUnschedulableError)


class Workers(Protocol):
    """Workers that can be asked about the objects of their node."""

    def on(self, place: str) -> Sequence[Any]:
        """Return the workers on a Ray node."""

    def lost(self, worker: Any) -> None:
        """Take note that a worker is no more."""


@dataclass(frozen=True)
class Shard:
    """The models of a share of a cohort.

    Attributes
    ----------
    rows : ObjectRef
        A list of vectors.
    place : str
        The Ray node that they are on.
    side : Side
        Whose they are, and what the models have besides.
    """

    rows: Any
    place: str
    side: Side

    @property
    def num_bytes(self) -> int:
        """How much memory the rows take."""
        layout = self.side.layout
        if layout is None:
            return 0
        return len(self.side.nodes) * layout.num_parameters * layout.dtype.itemsize


class ShardedModels(LocalModels):
    """The models of a cohort, each where it was trained.

    Parameters
    ----------
    cohort : Cohort
        What was asked.
    lists : Sequence[Sequence[int]]
        The cohort's nodes, in the lists whose rows are added up first among
        themselves.
    workers : Workers
        Whom to ask.
    """

    def __init__(
        self, cohort: Cohort, lists: Sequence[Sequence[int]], workers: Workers
    ) -> None:
        self.cohort = cohort
        self.lists = lists
        self.workers = workers
        self._found: dict[int, tuple[Shard, int]] = {}

    def add(self, shard: Shard, replies: Sequence[Reply]) -> None:
        """Take in the models that some replies are about."""
        self._found |= {n: (shard, k) for k, n in enumerate(shard.side.nodes)}
        for reply in replies:
            if reply.node in self._found:
                reply.model = partial(self.model, reply.node)

    def model(self, node: int) -> FlatModel:
        """Bring one client's model here.

        Raises
        ------
        AggregationError
            If it is lost.
        """
        shard, k = self._found[node]
        layout = shard.side.layout
        assert layout is not None
        try:
            vector = ray.get(shard.rows)[k]
        except RayError as error:
            raise _lost([shard], error) from error
        buffers = as_tensor(shard.side.buffers[k])
        integers = shard.side.integers[k]
        frozen = flatten(self.cohort.arrays, layout).frozen  # Nobody trained it.
        return FlatModel(layout, as_tensor(vector), buffers, integers, frozen)

    def updates(  # noqa: D102
        self,
        nodes: Sequence[int],
        start: FlatModel,
        *,
        accumulate: Accumulate | None = None,
        threads: int | None = None,
    ) -> Updates:
        parts = members(self.lists, nodes)
        found = [self._found[node] for node in nodes]
        if self._are_here([shard for shard, _ in found]):
            return StackedUpdates(
                _mapped(found),
                start.parameters,
                start.layout.offsets,
                parts=parts,
                accumulate=accumulate,
                threads=threads,
            )
        return ShardedUpdates(
            parts,
            found,
            self.workers,
            start.parameters,
            start.layout.offsets,
            accumulate,
        )

    def buffers(self, nodes: Sequence[int], start: FlatModel) -> Updates:  # noqa: D102
        found = [self._found[node] for node in nodes]
        rows = [as_tensor(shard.side.buffers[k]) for shard, k in found]
        return StackedUpdates(rows, start.buffers)

    def integers(self, nodes: Sequence[int]) -> list[Integers]:  # noqa: D102
        found = [self._found[node] for node in nodes]
        return [shard.side.integers[k] for shard, k in found]

    def _are_here(self, shards: Sequence[Shard]) -> bool:
        """Tell whether all rows are on this node, and may be mapped at once."""
        here = ray.get_runtime_context().get_node_id()
        different = {id(shard): shard for shard in shards}.values()
        # What is small came with the answer, wherever it was trained.
        if any(s.place != here and s.num_bytes > SHARED_BYTES for s in different):
            return False
        room: float = sum(
            node["Resources"].get("object_store_memory", 0)
            for node in cast(Any, ray).nodes()
            if node["NodeID"] == here
        )
        return sum(s.num_bytes for s in different) <= room * MAPPED_SHARE


class ShardedUpdates(Updates):
    """Updates whose rows are on several Ray nodes, or too many for memory.

    Parameters
    ----------
    parts : Sequence[Sequence[int]]
        Which rows form a part.
    found : Sequence[tuple[Shard, int]]
        Where each row lies: the shard, and the place in it.
    workers : Workers
        Whom to ask.
    origin, offsets, accumulate
        As for :class:`~fedweight.core.updates.Updates`.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[int]],
        found: Sequence[tuple[Shard, int]],
        workers: Workers,
        origin: Tensor,
        offsets: Sequence[int] | None = None,
        accumulate: Accumulate | None = None,
    ) -> None:
        super().__init__(parts, origin, offsets, accumulate)
        self.parts = [[found[k] for k in rows] for rows in parts]
        self.workers = workers
        self._put: dict[tuple[int, int], Any] = {}

    def _ask(
        self, method: str, arguments: Sequence[tuple[Any, ...]]
    ) -> Iterator[Tensor]:
        put = dict(self._put)  # What is put here lasts as long as the call.
        # All is sent at once; the answers come as they are used.
        calls = {}
        for turn, numbers in enumerate(self._groups(method)):
            call = _Call(method, self.workers, turn)
            for part in numbers:
                call.add(
                    self.parts[part], [self._sent(a, put) for a in arguments[part]]
                )
                calls[part] = call
            call.send()
        for part in range(len(self.parts)):
            yield as_tensor(calls.pop(part).answer())

    def _groups(self, method: str) -> Iterable[list[int]]:
        """Yield the parts that are asked at once: of one node, each worker's."""
        by_place: dict[str, list[int]] = {}
        for number, part in enumerate(self.parts):
            by_place.setdefault(part[0][0].place, []).append(number)
        row = self.num_parameters * self.origin.itemsize
        for place, numbers in by_place.items():
            nbytes = row * sum(len(self.parts[number]) for number in numbers)
            if method == "combine":  # A vector of float64 for each part.
                nbytes = max(nbytes, 8 * self.num_parameters * len(numbers))
            count = max(len(self.workers.on(place)), math.ceil(nbytes / CALL_BYTES), 1)
            for some in np.array_split(numbers, min(count, len(numbers))):
                yield some.tolist()

    def _sent(self, argument: Any, put: dict[tuple[int, int], Any]) -> Any:
        """Return an argument as it travels: what is large is put, once."""
        if not isinstance(argument, torch.Tensor):
            return argument
        array = as_array(argument)
        if array.nbytes <= SHARED_BYTES:
            return array
        key = (argument.data_ptr(), argument.numel())
        if key not in put:
            put[key] = ray.put(array)
            first = self.origin.data_ptr()
            if first <= key[0] < first + self.origin.nbytes:
                self._put[key] = put[key]  # The origin is asked for again and again.
        return put[key]


class _Call:
    """A method of some parts' rows, asked of one worker on the node they are on."""

    def __init__(self, method: str, workers: Workers, turn: int) -> None:
        self.method = method
        self.workers = workers
        self.turn = turn
        self.shards: list[Shard] = []
        self.parts: list[tuple[list[Place], list[Any]]] = []
        self.values: dict[int, tuple[int, Any]] = {}
        self._answers: Iterator[npt.NDArray[Any]] | None = None

    def add(self, part: Sequence[tuple[Shard, int]], arguments: Sequence[Any]) -> None:
        """Ask it of one more part."""
        places = [(self._number(shard.rows), k) for shard, k in part]
        own = [
            Value(self._number(a)) if isinstance(a, ray.ObjectRef) else a
            for a in arguments
        ]
        self.shards += [shard for shard, _ in part]
        self.parts.append((places, own))

    def _number(self, reference: Any) -> int:
        number, _ = self.values.setdefault(id(reference), (len(self.values), reference))
        return number

    def send(self) -> None:
        """Send it to the worker on the node whose turn it is."""
        workers = self.workers.on(self.shards[0].place)
        if not workers:
            raise _lost(self.shards, "no worker is left on their node")
        self.worker = workers[self.turn % len(workers)]
        values = [reference for _, reference in self.values.values()]
        self.sent = self.worker.ask.remote(self.method, self.parts, *values)

    def answer(self) -> npt.NDArray[Any]:
        """Wait for the answers; return the next part's."""
        if self._answers is None:
            self._answers = iter(self._wait())
        return next(self._answers)

    def _wait(self) -> list[npt.NDArray[Any]]:
        try:
            try:
                answers: list[npt.NDArray[Any]] = ray.get(self.sent)
            except LOST:
                # The rows outlive the process that made them: ask another.
                self.workers.lost(self.worker)
                self.send()
                answers = ray.get(self.sent)
        except RayError as error:
            raise _lost(self.shards, error) from error
        return answers


def _mapped(found: Sequence[tuple[Shard, int]]) -> list[Tensor]:
    """Return rows of this node, in the memory that they are in."""
    different = {id(shard): shard for shard, _ in found}
    try:
        vectors = ray.get([shard.rows for shard in different.values()])
    except RayError as error:
        raise _lost([*different.values()], error) from error
    of = dict(zip(different, vectors, strict=True))
    return [as_tensor(of[id(shard)][k]) for shard, k in found]


def _lost(shards: Sequence[Shard], why: Any) -> AggregationError:
    clients = sum(
        len(shard.side.nodes) for shard in {id(s): s for s in shards}.values()
    )
    return AggregationError(
        f"the models of {clients} clients cannot be reached on Ray node "
        f"{shards[0].place[:8]}: {why}"
    )
