"""What clients answer to strategies that are not ours, and keep no record of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from flwr.app import Message

from ..core.records import Status
from ..core.texts import TRACEBACK_LENGTH, own_name, plain_lines
from ..messages._flower import NO_REPLY, reason_of
from ..messages.arrays import FlatRecord
from ..metrics import Statistics
from ..server.known_errors import KnownErrors
from ..server.reported import OwnMetrics, measured, sort_metrics
from ..strategies import ClientRecord, RoundRecord


class Listener:
    """Records what clients answer to a strategy that keeps no history itself.

    Parameters
    ----------
    records : list[RoundRecord]
        Where the rounds go.
    client_of : Callable
        Gives the number of the client behind a node.
    name_of : Callable
        Gives what a client is called.
    """

    def __init__(
        self,
        records: list[RoundRecord],
        client_of: Callable[[int], int],
        name_of: Callable[[int], str] = str,
    ) -> None:
        self.records = records
        self.client_of = client_of
        self.name_of = name_of
        self._asked: list[Message] = []
        self._errors = KnownErrors()
        self._own_metrics = OwnMetrics()
        self.measured: dict[str, float] = {}  # Of the last evaluation, of all clients.

    @property
    def own_metrics(self) -> list[str]:
        """The names of the clients' own metrics that are recorded."""
        return self._own_metrics.names

    @own_metrics.setter
    def own_metrics(self, names: list[str]) -> None:
        self._own_metrics.restore(names)

    def asks(self, configure: Callable[..., Iterable[Message]]) -> Any:
        """Return ``configure_train`` that notes whom it asks."""

        def asking(*arguments: Any, **named: Any) -> Iterable[Message]:
            self._asked = list(configure(*arguments, **named))
            return self._asked

        return asking

    def hears(self, aggregate: Callable[..., Any]) -> Any:
        """Return ``aggregate_train`` that notes what it is given, and makes of it."""

        def hearing(server_round: int, replies: Iterable[Message]) -> Any:
            answers = list(replies)
            record = RoundRecord(server_round)
            self.records.append(record)
            record.clients = self._entries(answers)
            self._own_metrics.limit(record.clients)
            self._errors.tell(server_round, record.clients)
            result = aggregate(server_round, answers)
            if result[0] is None:
                record.status = "failed"
                record.reason = "the strategy kept the global model"
            return result

        return hearing

    def measures(self, statistics: Statistics, aggregate: Callable[..., Any]) -> Any:
        """Return ``aggregate_evaluate`` that notes what all clients' sums say."""

        def measuring(server_round: int, replies: Iterable[Message]) -> Any:
            answers = list(replies)
            reported = [
                {
                    name: value
                    for record in records.values()
                    for name, value in record.items()
                }
                for records in (
                    answer.content.metric_records
                    for answer in answers
                    if not answer.has_error()
                )
            ]
            self.measured = {}
            if reported:
                of_all, _, _ = measured(statistics, reported)
                self.measured = {f"evaluate-{name}": of_all[name] for name in of_all}
            return aggregate(server_round, answers)

        return measuring

    def _entries(self, answers: Sequence[Message]) -> list[ClientRecord]:
        asked = {m.metadata.dst_node_id: m.metadata.message_id for m in self._asked}
        down = {m.metadata.dst_node_id: _num_bytes(m) for m in self._asked}
        node_of = {message: node for node, message in asked.items() if message}
        entries = []
        for reply in answers:
            node = reply.metadata.src_node_id
            if node not in asked:  # The SuperLink answers for a node that is lost.
                node = node_of.get(reply.metadata.reply_to_message_id, node)
            asked.pop(node, None)
            entry = self._entry(node, "ok")
            entries.append(entry)
            entry.bytes_down = down.get(node, 0)
            if reply.has_error():
                lost = reply.error.code in NO_REPLY
                entry.status = "missing" if lost else "failed"
                entry.reason = plain_lines(reason_of(reply.error), TRACEBACK_LENGTH)
                continue
            entry.bytes_up = _num_bytes(reply)
            for metrics in reply.content.metric_records.values():
                known, own = sort_metrics(metrics)
                entry.metrics |= known
                entry.own_metrics = {**entry.own_metrics, **own}
        for node in asked:
            entry = self._entry(node, "missing", "no reply in time")
            entry.bytes_down = down.get(node, 0)
            entries.append(entry)
        return sorted(entries, key=lambda entry: entry.client)

    def _entry(self, node: int, status: Status, reason: str = "") -> ClientRecord:
        client = self.client_of(node)
        name = own_name(client, self.name_of(client))
        return ClientRecord(client, status, reason, name=name)


def _num_bytes(message: Message) -> int:
    """Return how many bytes the models in a message take, without Flower's headers."""
    found = 0
    for record in message.content.array_records.values():
        if isinstance(record, FlatRecord) and record.flat is not None:
            found += record.flat.layout.num_bytes
        else:
            found += sum(
                math.prod(array.shape) * np.dtype(array.dtype).itemsize
                for array in record.values()
            )
    return found
