"""Messages to and from a whole cohort, without a message for each client.

A strategy of ours sends a :class:`Cohort`, a grid of ours answers it with
:class:`Replies`, and between them a client costs a few microseconds. Both are ordinary
sequences of Flower messages to whoever reads them as such (another grid, a wrapper, a
user's code); the messages are made at the first look.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

from . import keys
from ._flower import CLIENT_APP_RAISED_EXCEPTION
from .errors import AggregationError
from .parameters import FlatModel, FlatRecord, Layout, flatten


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
    """The messages of one phase: the same content to each of some clients.

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
    """

    def __init__(
        self,
        content: RecordDict,
        nodes: Sequence[int],
        message_type: str,
        own: Mapping[int, ConfigRecord] | None = None,
        config_key: str = keys.CONFIG,
    ) -> None:
        self.content = content
        self.nodes = list(nodes)
        self.message_type = message_type
        self.own = dict(own or {})
        self.config_key = config_key
        super().__init__()

    @property
    def untouched(self) -> bool:
        """Whether nobody has had a message, which could have been changed since."""
        return not self._messages

    def config(self, node: int) -> ConfigRecord:
        """Return the config that one client receives."""
        if node in self.own:
            return self.own[node]
        return self.content.config_records[self.config_key]

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
        content = self.content
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
    model : FlatModel, optional
        What it trained.
    metrics : Mapping
        The reply's metric record.
    profile : Mapping
        The side data that it was asked for.
    error : str, optional
        Why there is nothing else.
    """

    node: int
    model: FlatModel | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    @classmethod
    def of(cls, message: Message, layout: Layout, arrays_key: str) -> Reply:
        """Read a reply as Flower brings it.

        Raises
        ------
        AggregationError
            If it is not an error, and not one metric record with, for a reply to a
            train message, a model of the layout.
        """
        node = message.metadata.src_node_id
        if message.has_error():
            return cls(node, error=message.error.reason or "an error without a reason")
        content = message.content
        if len(content.metric_records) != 1:
            raise AggregationError(
                f"its reply has {len(content.metric_records)} metric records, not 1"
            )
        metrics = next(iter(content.metric_records.values()))
        records = content.array_records
        record = records.get(arrays_key)
        if record is None and len(records) == 1:  # Flower takes it by any name.
            record = next(iter(records.values()))
        model = None if record is None else flatten(record, layout)
        profile = content.config_records.get(keys.PROFILE) or ConfigRecord()
        return cls(node, model, metrics, profile)

    def message(self, reply_to: Message) -> Message:
        """Return the reply as Flower sends it."""
        if self.error is not None:
            code = CLIENT_APP_RAISED_EXCEPTION
            return Message(Error(code=code, reason=self.error), reply_to=reply_to)
        content = RecordDict({keys.METRICS: MetricRecord(dict(self.metrics))})
        if self.model is not None:
            content[keys.ARRAYS] = FlatRecord(self.model)
        if self.profile:
            content[keys.PROFILE] = ConfigRecord(dict(self.profile))
        return Message(content, reply_to=reply_to)


class Replies(_Messages):
    """The replies to a cohort, in its order.

    Parameters
    ----------
    cohort : Cohort
        What was asked.
    replies : Sequence[Reply]
        The answers of some or all of its clients, in the cohort's order.
    """

    def __init__(self, cohort: Cohort, replies: Sequence[Reply]) -> None:
        self.cohort = cohort
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

    def __len__(self) -> int:
        return len(self._replies)

    def _make(self, index: int) -> Message:
        reply = self._replies[index]
        return reply.message(self.cohort[self._index[reply.node]])
