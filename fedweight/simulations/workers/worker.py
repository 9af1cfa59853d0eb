"""What runs in a worker process, and what travels to it and back."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from ...core.client_store import ClientRows, ClientStore
from ...core.layout import Integers, Layout, as_tensor
from ...core.local_models import ModelSum
from ...core.pytorch import is_imported, torch
from ...core.rows import Rows
from ...messages import _flower
from ...messages.arrays import FlatRecord
from ...messages.dispatch import Cohort, Reply
from ...messages.records import records_of
from ..allocator import keep_freed_memory
from ..grid import FIRST_NODE, Nodes, execute, is_stranger
from ..isolation import prefix_output

if TYPE_CHECKING:
    from torch import Tensor

# Where a row lies: in which of the objects that were sent along, and where in it.
Place = tuple[int, int]


@dataclass(frozen=True)
class Share:
    """Some clients of a cohort, for one worker to handle at once.

    Attributes
    ----------
    nodes : Sequence[int]
        The clients' nodes.
    content : Mapping[str, Any]
        The cohort's records; for an array record, the number that stands for it.
    own : Mapping[int, ConfigRecord]
        See :class:`~fedweight.messages.dispatch.Cohort`.
    batched : bool
        Whether they train at once.
    message_type, config_key, summed_by, left_out
        See :class:`~fedweight.messages.dispatch.Cohort`.
    """

    nodes: Sequence[int]
    content: Mapping[str, Any]
    own: Mapping[int, ConfigRecord]
    batched: bool
    message_type: str
    config_key: str
    summed_by: str | None
    left_out: frozenset[int]

    @classmethod
    def of(
        cls,
        cohort: Cohort,
        nodes: Sequence[int],
        content: Mapping[str, Any],
        batched: bool,
    ) -> Share:
        """Return what some nodes of a cohort are sent."""
        own = {node: cohort.own[node] for node in nodes if node in cohort.own}
        left_out = cohort.left_out.intersection(nodes)
        return cls(
            nodes,
            content,
            own,
            batched,
            cohort.message_type,
            cohort.config_key,
            cohort.summed_by,
            left_out,
        )

    @property
    def keeps_rows(self) -> bool:
        """Whether the models stay with the worker, as an object of their own."""
        return self.message_type == "train" and self.summed_by is None

    def split(self) -> Iterator[Share]:
        """Yield a share for each of the nodes."""
        for node in self.nodes:
            own = {node: self.own[node]} if node in self.own else {}
            yield replace(self, nodes=[node], own=own, batched=False)

    def cohort(self, records: Mapping[int, ArrayRecord]) -> Cohort:
        """Make the part of the cohort; the array records are shared."""
        return Cohort(
            _filled(self.content, records),
            self.nodes,
            self.message_type,
            self.own,
            self.config_key,
            summed_by=self.summed_by,
            left_out=self.left_out,
        )


@dataclass
class Side:
    """What the models of a share have besides their parameters, by value.

    Attributes
    ----------
    layout : Layout, optional
        The models'; ``None`` if there is none.
    nodes : list[int]
        Whose parameters are in the share's object, in its order.
    buffers : list[ndarray]
        Their floating buffers.
    integers : list[dict]
        Their integer tensors.
    """

    layout: Layout | None = None
    nodes: list[int] = field(default_factory=list)
    buffers: list[npt.NDArray[Any]] = field(default_factory=list)
    integers: list[Integers] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """What a worker returns of one job, besides models and the clients' states.

    ``replies`` are messages, or what :func:`unpacked` reads; ``seconds`` is how long
    they took; ``has_state`` says of each client whether it keeps something.
    """

    replies: list[Any]
    seconds: float
    has_state: list[bool]
    total: ModelSum | None = None
    side: Side | None = None


class Worker:
    """What runs in a worker process.

    Attributes
    ----------
    most_bytes : float
        Up to how many bytes the states of a list's clients come back with the answers.
    """

    most_bytes = float("inf")

    def __init__(self) -> None:
        # For PyTorch, whoever imports it: more would change the last bits of results.
        os.environ["OMP_NUM_THREADS"] = "1"
        keep_freed_memory()
        self._kept: list[RecordDict] = []

    def prepare(self, paths: Sequence[str], argv: Sequence[str]) -> None:
        """Be like the server's process, of which :func:`driver` tells.

        Modules are found where it finds them, besides.
        """
        sys.path += [path for path in paths if path not in sys.path]
        sys.argv = list(argv)
        prefix_output()

    def load(self, app: ClientApp, nodes: Nodes) -> str:
        """Take over an app; return where this process is."""
        self.app, self.nodes = app, nodes
        self._stranger = is_stranger(app)
        if is_imported():
            torch.set_num_threads(1)
        return ""

    def run(
        self,
        jobs: Sequence[tuple[Sequence[int], Share | Sequence[bytes]]],
        arrays: Sequence[int],
        states: Sequence[int],
        kept: Mapping[str, ClientRows] | None,
        *values: Any,
    ) -> Any:
        """Handle the jobs of a list.

        Parameters
        ----------
        jobs : Sequence[tuple]
            Clients, and their share of a cohort or their messages.
        arrays, states : Sequence[int]
            Numbers of array records, and clients.
        kept : Mapping[str, ClientRows], optional
            What clients have in the store; nothing where they never have.
        *values
            The array records, and then the clients' states, which may be bytes: as
            arguments, as Ray resolves references only there.

        Returns
        -------
        tuple
            Answers, what clients have written, and their states as bytes; ``None``
            where these are large, and :meth:`states` hands them over. Where shares keep
            models a tuple of this and those of each: separate results, which Ray leaves
            where they are.
        """
        store = None if kept is None else ClientStore.of(kept)
        records = dict(zip(arrays, values, strict=False))
        state_of = dict(zip(states, values[len(arrays) :], strict=True))
        self._kept = []
        answers: list[Answer] = []
        models: list[list[npt.NDArray[Any]]] = []
        for clients, work in jobs:
            began = time.perf_counter()
            contexts = {}
            for client in clients:
                context = self.nodes.context(client, store)
                if client in state_of:
                    context.state = as_state(state_of[client])
                contexts[context.node_id] = context
            replies: list[Any]
            total, side = None, None
            if isinstance(work, Share):
                replies, total = self._answer(work, records, contexts)
                if work.keeps_rows:
                    side, rows = _parted(replies)
                    models.append(rows)
                replies = packed(replies)
            else:
                (context,) = contexts.values()
                replies = [self._execute(payload, records, context) for payload in work]
            of_clients = [context.state for context in contexts.values()]
            self._kept += [state for state in of_clients if len(state)]
            has_state = [len(state) > 0 for state in of_clients]
            seconds = time.perf_counter() - began
            answers.append(Answer(replies, seconds, has_state, total, side))
        written = {} if store is None else store.written()
        first = answers, written, self._small_states()
        return (first, *models) if models else first

    def _execute(
        self, payload: bytes, records: Mapping[int, ArrayRecord], context: Context
    ) -> Message:
        metadata, nth, content = pickle.loads(payload)
        message = _flower.message_of(_filled(content, records), metadata)
        begin = (self.nodes.seed, nth) if self._stranger else None
        return execute(self.app, message, context, begin)

    def _answer(
        self,
        share: Share,
        records: Mapping[int, ArrayRecord],
        contexts: Mapping[int, Context],
    ) -> tuple[list[Reply], ModelSum | None]:
        app: Any = self.app
        cohort = share.cohort(records)
        answers = app.answer(
            cohort,
            cohort.nodes,
            contexts.__getitem__,
            batched=share.batched,
            number_of=self.nodes.number_of,
        )
        return answers.replies, answers.total if answers.total.coefficients else None

    def _small_states(self) -> list[bytes] | None:
        """Return what clients of the last list keep as bytes; ``None`` if many."""
        arrays = [records_of(state, ArrayRecord).values() for state in self._kept]
        if sum(num_bytes(r) for own in arrays for r in own) > self.most_bytes:
            return None
        small = [pickle.dumps(state, 5) for state in self._kept]
        if sum(map(len, small)) > self.most_bytes:
            return None
        self._kept = []
        return small

    def states(self) -> tuple[Any, ...]:
        """Hand over what clients of the last list keep, each by itself, after None."""
        kept, self._kept = self._kept, []
        return None, *kept

    def ask(
        self,
        method: str,
        parts: Sequence[tuple[Sequence[Place], Sequence[Any]]],
        *values: Any,
    ) -> list[npt.NDArray[Any]]:
        """Call a method of some parts' :class:`~fedweight.core.rows.Rows`.

        Parameters
        ----------
        method : str
            Its name.
        parts : Sequence[tuple]
            Where each part's rows lie among the values, and the arguments.
        *values
            Lists of models, and large arguments; a :class:`Value` stands for one.
        """
        answers = []
        for places, arguments in parts:
            rows = Rows([as_tensor(values[which][row]) for which, row in places])
            own = [_argument(argument, values) for argument in arguments]
            answers.append(getattr(rows, method)(*own).numpy())
        return answers


def as_state(state: Any) -> RecordDict:
    """Return a client's state, which may be bytes."""
    own: RecordDict = pickle.loads(state) if isinstance(state, bytes) else state
    return own


def driver() -> tuple[list[str], list[str]]:
    """Return what :meth:`Worker.prepare` is told, in the server's process."""
    return [os.path.abspath(path) for path in sys.path], sys.argv


@dataclass(frozen=True, slots=True)
class Value:
    """Stands for an argument that travels apart, by its number."""

    number: int


def _argument(argument: Any, values: Sequence[Any]) -> Any:
    if isinstance(argument, Value):
        argument = values[argument.number]
    return as_tensor(argument) if isinstance(argument, np.ndarray) else argument


def as_array(tensor: Tensor) -> npt.NDArray[Any]:
    """Return a tensor as what Ray shares between processes without a copy."""
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return array


def _parted(replies: Sequence[Reply]) -> tuple[Side, list[npt.NDArray[Any]]]:
    """Take the models out of replies: their parameters, and what they have besides."""
    side, rows = Side(), []
    for reply in replies:
        model, reply.model = reply.brought(), None
        if model is not None:
            side.layout = model.layout
            side.nodes.append(reply.node)
            side.buffers.append(as_array(model.buffers))
            side.integers.append(model.integers)
            rows.append(as_array(model.parameters))
    return side, rows


def packed(replies: Sequence[Reply]) -> list[tuple[Any, ...]]:
    """Return replies without models as tuples: an object each takes longer to send."""
    return [
        (r.node, None, r.metrics, r.profile, r.error, r.finite, r.summed)
        for r in replies
    ]


def unpacked(replies: Sequence[tuple[Any, ...]]) -> list[Reply]:
    """Return what :func:`packed` was given."""
    return [Reply(*fields) for fields in replies]


def num_bytes(record: ArrayRecord) -> int:
    """Return how many bytes an array record's values take."""
    if isinstance(record, FlatRecord) and record.flat is not None:
        vectors = (record.flat.parameters, record.flat.buffers)
        return sum(vector.numel() * vector.element_size() for vector in vectors)
    return sum(len(array.data) for array in record.values())


def pack(message: Message, nth: int, records: Mapping[str, Any]) -> bytes:
    """Return a message as bytes, with numbers for records that travel apart.

    ``nth`` says which of its client's messages it is.
    """
    return pickle.dumps((message.metadata, nth, dict(records)), 5)


def _filled(
    content: Mapping[str, Any], records: Mapping[int, ArrayRecord]
) -> RecordDict:
    return RecordDict(
        {n: records[r] if isinstance(r, int) else r for n, r in content.items()}
    )


def error_reply(client: int, reason: str) -> tuple[Any, ...]:
    """Return a packed reply of a client that its worker could not handle."""
    return packed([Reply(FIRST_NODE + client, error=reason)])[0]
