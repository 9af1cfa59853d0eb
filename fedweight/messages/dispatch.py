"""Messages to and from a whole cohort, without a message for each client.

A strategy of ours sends a :class:`Cohort`, a grid of ours answers it with
:class:`Replies`, and between them no message is made. Both are ordinary sequences of
Flower messages to whoever reads them as such (another grid, a wrapper, a user's code);
the messages are made at the first look.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np
import numpy.typing as npt
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)

from ..core.errors import AggregationError, ClientError, EngineError
from ..core.layout import FlatModel, Layout
from ..core.local_models import (
    HeldModels,
    JoinedModels,
    LocalModels,
    ModelSum,
    SummedModels,
)
from ..core.model_rows import Held, ModelRow, ModelRows
from ..core.pytorch import torch
from ..core.rows import changed_tensors
from . import keys
from ._flower import CLIENT_APP_RAISED_EXCEPTION, NO_REPLY, reason_of
from .arrays import FlatRecord, flatten
from .records import records_of

if TYPE_CHECKING:
    from torch import Tensor

# Begins the error of clients that were too many to train at once; why comes after it.
TOO_MANY = "too many clients at once: "


def only_arrays(content: RecordDict) -> ArrayRecord:
    """Return the one array record of a message to a client.

    Raises
    ------
    ClientError
        If there is none, or more than one.
    """
    records = records_of(content, ArrayRecord)
    if len(records) != 1:
        raise ClientError(
            f"the message has {len(records)} array records; exactly one, the global "
            "model, is expected."
        )
    return next(iter(records.values()))


class _Messages(Sequence[Message], ABC):
    """Messages that are made at the first look, each once."""

    def __init__(self) -> None:
        self._messages: dict[int, Message] = {}

    @abstractmethod
    def _make(self, index: int) -> Message:
        """Return a message that nobody has looked at yet."""

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index not in self._messages:
            self._messages[index] = self._make(index)
        return self._messages[index]

    def __iter__(self) -> Iterator[Message]:
        return (self[i] for i in range(len(self)))


class Cohort(_Messages):
    """The messages of one phase: what some clients receive.

    Parameters
    ----------
    content : RecordDict
        What every client receives.
    nodes : Sequence[int]
        The clients' nodes, in the order of the clients' numbers; none twice.
    message_type : str
        Flower's, such as ``"train"``.
    own : Mapping[int, ConfigRecord], optional
        For some nodes, the config that they receive instead of the shared one.
    config_key : str
        The name of the config record in ``content``.
    starts : Mapping[int, ArrayRecord], optional
        For some nodes, the model that they receive instead of the shared one.
    summed_by : str, optional
        A metric. A grid of ours may then add the models up as they come, each times
        this metric of its client, and keep none.
    left_out : Collection[int]
        Nodes whose models are not wanted in that sum.
    num_bytes : int, optional
        How many bytes each client receives, without Flower's headers.
    """

    def __init__(
        self,
        content: RecordDict,
        nodes: Sequence[int],
        message_type: str,
        own: Mapping[int, ConfigRecord] | None = None,
        config_key: str = keys.CONFIG,
        *,
        starts: Mapping[int, ArrayRecord] | None = None,
        summed_by: str | None = None,
        left_out: Collection[int] = (),
        num_bytes: int | None = None,
    ) -> None:
        self.content = content
        self.nodes = list(nodes)
        self.message_type = message_type
        self.own = dict(own or {})
        self.config_key = config_key
        self.starts = dict(starts or {})
        self.summed_by = summed_by
        self.left_out = frozenset(left_out)
        self.num_bytes = num_bytes
        super().__init__()

    @property
    def untouched(self) -> bool:
        """Whether nobody has had a message, which could have been changed since."""
        return not self._messages

    @property
    def trains(self) -> bool:
        """Whether clients train: in a round, or their own models after the last."""
        if not self.nodes or self.message_type == MessageType.TRAIN:
            return self.message_type == MessageType.TRAIN
        return bool(self.config(self.nodes[0]).get(keys.AFTER_ROUNDS))

    def config(self, node: int) -> ConfigRecord:
        """Return the config that one client receives."""
        own = self.own.get(node)
        return self._shared if own is None else own

    @cached_property
    def arrays(self) -> ArrayRecord:
        """The one array record that every client receives that has none of its own."""
        return only_arrays(self.content)

    def parts(self) -> list[Cohort]:
        """Return the messages by the model that they bring: each part has one."""
        if not self.starts:
            return [self]
        alike: dict[int, list[int]] = {}
        for node in self.nodes:
            alike.setdefault(id(self.starts.get(node, self.arrays)), []).append(node)
        return [
            Cohort(
                self._content_of(nodes[0]),
                nodes,
                self.message_type,
                {node: self.own[node] for node in nodes if node in self.own},
                self.config_key,
            )
            for nodes in alike.values()
        ]

    def _content_of(self, node: int) -> RecordDict:
        """Return what a client receives, but for a config of its own."""
        if node not in self.starts:
            return self.content
        [key] = records_of(self.content, ArrayRecord)
        return RecordDict({**dict(self.content), key: self.starts[node]})

    @cached_property
    def _shared(self) -> ConfigRecord:
        return cast(ConfigRecord, self.content[self.config_key])

    def node_of(self, message_id: str) -> int | None:
        """Return where the message with an id went, if it is one of these."""
        for index, message in self._messages.items():
            if message.metadata.message_id == message_id:
                return self.nodes[index]
        return None

    def __len__(self) -> int:
        return len(self.nodes)

    def _make(self, index: int) -> Message:
        node = self.nodes[index]
        content = self._content_of(node)
        if node in self.own:
            content = RecordDict({**dict(content), self.config_key: self.own[node]})
        return Message(content, dst_node_id=node, message_type=self.message_type)


@dataclass(slots=True)
class Reply:
    """What one client answered, as plain values.

    Attributes
    ----------
    node : int
        The client's node.
    model : FlatModel or Callable, optional
        What it trained; or what brings it, where it stayed elsewhere, as a
        :class:`~fedweight.core.model_rows.ModelRow` on a device.
    metrics : Mapping
        The reply's metric record.
    profile : Mapping
        The side data that it was asked for.
    error : str, optional
        Why there is nothing else.
    finite : bool, optional
        Whether all values of the model are; ``None`` if nobody has looked.
    summed : bool
        Whether the model went into the cohort's sum, and was not kept.
    lost : bool
        Whether the client did not answer, and the error is the SuperLink's.
    written : ArrayRecord, optional
        The model as a codec writes it, where it goes over a network so.
    """

    node: int
    model: FlatModel | Callable[[], FlatModel] | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    finite: bool | None = None
    summed: bool = False
    lost: bool = False
    written: ArrayRecord | None = None

    @classmethod
    def of(cls, message: Message, layout: Layout, arrays_key: str) -> Reply:
        """Read a reply as Flower brings it.

        Raises
        ------
        AggregationError
            If it is not an error, and not one metric record with, for a reply to a
            train message, a model of the layout; and whatever else it may be.
        """
        try:
            return cls._of(message, layout, arrays_key)
        except AggregationError:
            raise
        except Exception as error:  # Its bytes are a stranger's.
            raise AggregationError(
                f"its reply cannot be read: {type(error).__name__}: {error}"
            ) from error

    @classmethod
    def _of(cls, message: Message, layout: Layout, arrays_key: str) -> Reply:
        node = message.metadata.src_node_id
        if message.has_error():
            reason, lost = reason_of(message.error), message.error.code in NO_REPLY
            return cls(node, error=reason, lost=lost)
        content = message.content
        measured = [*records_of(content, MetricRecord).values()]
        if len(measured) != 1:
            raise AggregationError(
                f"its reply has {len(measured)} metric records, not 1"
            )
        (metrics,) = measured
        records = records_of(content, ArrayRecord)
        record = records.get(arrays_key)
        if record is None and len(records) == 1:  # Flower takes it by any name.
            record = next(iter(records.values()))
        model = None
        if record is not None:
            whose = {"given": "its model", "expected": "the global model"}
            model = flatten(record, layout, **whose)
        profile = records_of(content, ConfigRecord).get(keys.PROFILE) or ConfigRecord()
        return cls(node, model, metrics, profile)

    def is_finite(self) -> bool:
        """Tell whether all values of the model are finite; look if nobody has yet."""
        if self.finite is None and isinstance(self.model, Held):
            self.finite = self.model.is_finite()
        return self.finite is not False

    def brought(self) -> FlatModel | None:
        """Return the model, if there is one, in this process's memory."""
        return self.model() if callable(self.model) else self.model

    def message(self, reply_to: Message) -> Message:
        """Return the reply as Flower sends it."""
        if self.error is not None:
            code = CLIENT_APP_RAISED_EXCEPTION
            return Message(Error(code=code, reason=self.error), reply_to=reply_to)
        if self.summed:
            raise EngineError(
                "a client's reply was looked at whose model was added to the others' "
                "as it came. Give the strategy's 'accumulate' a value to keep models."
            )
        content = RecordDict({keys.METRICS: MetricRecord(dict(self.metrics))})
        model = self.brought()
        if self.written is not None:
            content[keys.ARRAYS] = self.written
        elif model is not None:
            content[keys.ARRAYS] = FlatRecord(model)
        if self.profile:
            content[keys.PROFILE] = ConfigRecord(dict(self.profile))
        return Message(content, reply_to=reply_to)


@dataclass
class Answers:
    """What some clients of a cohort answered, from where they were handled.

    Attributes
    ----------
    replies : list[Reply]
        In any order.
    total : ModelSum
        Their models added up, where the cohort allows it.
    models : Sequence[FlatModel], optional
        The clients' models, in the order of the replies, which do not hold them yet.
    """

    replies: list[Reply]
    total: ModelSum = field(default_factory=ModelSum)
    models: Sequence[FlatModel] | None = None

    def hand_out(self, record: ArrayRecord | None = None) -> None:
        """Let the replies hold the models; in the layout of what clients received.

        Rows on a device stay there, where they have that layout.
        """
        if self.models is not None:
            models: Sequence[Held] = self.models
            layout = None if record is None else layout_as_sent(record)
            if isinstance(models, ModelRows) and layout in (None, models.layout):
                models = models if models.is_cpu else models.there()
            for reply, model in zip(self.replies, models, strict=True):
                reply.model = model
            self.models = None
        if record is not None:
            lay_out_as_sent(record, self.replies)

    def bring(self) -> None:
        """Let the replies hold models in this process's memory."""
        for reply in self.replies:
            reply.model = reply.brought()

    @classmethod
    def too_many(cls, nodes: Sequence[int], why: str) -> Answers:
        """Return that some clients have to train fewer at once."""
        return cls([Reply(node, error=TOO_MANY + why) for node in nodes])

    @property
    def were_too_many(self) -> str:
        """Why the clients have to train fewer at once; empty if they need not."""
        error = self.replies[0].error if self.replies else None
        return error[len(TOO_MANY) :] if error and error.startswith(TOO_MANY) else ""

    def sum_up(self, cohort: Cohort) -> None:
        """Add up the models of those who trained, and let go of all."""
        assert cohort.summed_by is not None
        rows = self.models
        layout = layout_as_sent(cohort.arrays)
        if not isinstance(rows, ModelRows) or layout not in (None, rows.layout):
            self.hand_out(cohort.arrays)
            holding = [reply for reply, _ in _trained(self.replies)]
            models: Sequence[FlatModel] = [model for _, model in _trained(self.replies)]
        else:
            holding, models, self.models = self.replies, rows, None
        good = [
            k
            for k, reply in enumerate(holding)
            if reply.node not in cohort.left_out
            and reply.metrics.get(keys.NUM_STEPS) != 0
        ]
        self.total = _sum(holding, models, good, cohort.summed_by)
        if not self.total.is_finite():  # Some model is not, or their sum is too large.
            good = [k for k in good if _is_finite(models, k)]
            self.total = _sum(holding, models, good, cohort.summed_by, torch.float64)
        if good:
            rest = models if isinstance(models, ModelRows) else models[good[0]]
            layout = rest.layout
            start = flatten(cohort.arrays, layout).parameters
            self.total.changed = _changed(models, good, start, layout.offsets)
        summed = set(good)
        for k, reply in enumerate(holding):
            if k not in summed:
                reply.finite = _is_finite(models, k)
            reply.model, reply.summed = None, True


def _changed(
    models: Sequence[FlatModel],
    good: Sequence[int],
    start: Tensor,
    offsets: Sequence[int],
) -> npt.NDArray[np.bool_]:
    """Return which named tensors some of the models change, ``[T]``."""
    if isinstance(models, ModelRows):
        if not models.is_cpu:
            return models.changed(good, start, offsets)
        # Nearly always the first one tells.
        found = changed_tensors([models.parameters[good[0]]], start, offsets)
        if found.all():
            return found
    moved = (models[k].parameters for k in good)
    return changed_tensors([*moved], start, offsets)


def _is_finite(models: Sequence[FlatModel], k: int) -> bool:
    if isinstance(models, ModelRows):
        return models.is_finite(k)
    return models[k].is_finite()


def _sum(
    replies: Sequence[Reply],
    models: Sequence[FlatModel],
    good: Sequence[int],
    by: str,
    dtype: torch.dtype | None = None,
) -> ModelSum:
    """Add up some of the models, each times what its client says of itself."""
    counts = {replies[k].node: float(replies[k].metrics[by]) for k in good}
    if isinstance(models, ModelRows):
        return ModelSum.of_rows(models, good, counts, dtype)
    own = {node: models[k] for node, k in zip(counts, good, strict=True)}
    return ModelSum.of({n: (model, counts[n]) for n, model in own.items()}, dtype)


def _trained(replies: Sequence[Reply]) -> Iterator[tuple[Reply, FlatModel]]:
    """Yield the replies that hold a model, with it."""
    for reply in replies:
        if isinstance(reply.model, FlatModel):
            yield reply, reply.model


def lay_out_as_sent(record: ArrayRecord, replies: Sequence[Reply]) -> None:
    """Bring trained models into the layout of the record that they began with.

    A server that was not told what is frozen, or a buffer, lays the tensors out
    otherwise than the clients' module; what it adds up must be in its own layout.
    """
    layout = layout_as_sent(record)
    for reply, model in _trained(replies):
        if layout is None or model.layout == layout:
            return
        reply.model = model.laid_out(layout)


def layout_as_sent(record: ArrayRecord) -> Layout | None:
    """Return the layout of a record that was sent, where it says it."""
    flat = record.flat if isinstance(record, FlatRecord) else None
    return None if flat is None else flat.layout


class Replies(_Messages):
    """The replies to a cohort, in its order.

    Parameters
    ----------
    cohort : Cohort
        What was asked.
    replies : Sequence[Reply]
        The answers of some or all of its clients, in the cohort's order.
    models : LocalModels, optional
        What the clients trained; by default what the replies hold.
    """

    def __init__(
        self,
        cohort: Cohort,
        replies: Sequence[Reply],
        models: LocalModels | None = None,
    ) -> None:
        self.cohort = cohort
        self.models = models or held_models(replies)
        self._replies = list(replies)
        self._index = {node: i for i, node in enumerate(cohort.nodes)}
        super().__init__()

    @property
    def plain(self) -> Sequence[Reply] | None:
        """The answers as plain values; ``None`` once somebody has had a message.

        A message may have been changed (a differential-privacy wrapper does so); from
        then on the messages are what counts.
        """
        return None if self._messages else self._replies

    @classmethod
    def joined(cls, cohort: Cohort, parts: Sequence[Replies]) -> Replies:
        """Return the replies to a cohort's :meth:`~Cohort.parts` as one."""
        if len(parts) == 1:
            return parts[0]
        answers = {reply.node: reply for part in parts for reply in part._replies}
        replies = [answers[node] for node in cohort.nodes if node in answers]
        models = JoinedModels([(part.cohort.nodes, part.models) for part in parts])
        return cls(cohort, replies, models)

    def forget(self) -> None:
        """Let go of the models, which Flower would hold until the next round's come."""
        self.models = held_models([])
        for reply in self._replies:
            reply.model = None

    def __len__(self) -> int:
        return len(self._replies)

    def _make(self, index: int) -> Message:
        reply = self._replies[index]
        return reply.message(self.cohort[self._index[reply.node]])


def held_models(
    replies: Sequence[Reply], parts: Sequence[Sequence[int]] | None = None
) -> HeldModels:
    """Return the models that some replies hold; see :class:`HeldModels`."""
    models = {r.node: r.model for r in replies if isinstance(r.model, Held)}
    return HeldModels(models, parts)


class Gathered:
    """What comes in from a cohort, a list of its clients at a time.

    Parameters
    ----------
    cohort : Cohort
        What was asked.
    lists : Sequence[Sequence[int]]
        Its nodes in the lists that are handled at once. Models are added up list by
        list in this order, so it says which bits a sum has.
    """

    def __init__(self, cohort: Cohort, lists: Sequence[Sequence[int]]) -> None:
        self.cohort = cohort
        self.lists = lists
        self._answers: dict[int, Reply] = {}
        self._total = ModelSum()

    def add(self, answers: Answers) -> None:
        """Take in the answers of the next list; its rows may stay on a device."""
        first = next(iter(answers.replies), None)
        row = None if first is None else first.model
        if isinstance(row, ModelRow) and not row.rows.may_stay(len(self.cohort)):
            answers.bring()
        self._answers |= {reply.node: reply for reply in answers.replies}
        self._total.join(answers.total)

    def make_room(self) -> None:
        """Bring what lies on a device, which has no room for clients to train."""
        Answers([*self._answers.values()]).bring()

    def replies(self, models: LocalModels | None = None) -> Replies:
        """Return all that came, in the cohort's order.

        ``models`` are the clients', where the replies do not hold them.
        """
        nodes = self.cohort.nodes
        replies = [self._answers[node] for node in nodes if node in self._answers]
        if self.cohort.summed_by is not None:
            models = SummedModels(self._total)
        models = models or held_models(replies, self.lists)
        return Replies(self.cohort, replies, models)
