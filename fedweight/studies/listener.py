"""What clients answer to strategies that are not ours, and keep no record of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord

from ..core.records import Status
from ..core.texts import TRACEBACK_LENGTH, own_name, plain_lines
from ..messages._flower import NO_REPLY, reason_of
from ..messages.arrays import FlatRecord
from ..messages.records import records_of
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
        """Return ``aggregate_evaluate`` that notes what clients' sums say.

        The strategy is given all replies; whose sums cannot be is noted with them. What
        the sums say of all is added to what the strategy returns of them, if it does.
        """

        def measuring(server_round: int, replies: Iterable[Message]) -> Any:
            answers = list(replies)
            reported: dict[int, dict[str, Any]] = {}
            for answer in answers:
                if answer.has_error():
                    continue
                client = self.client_of(answer.metadata.src_node_id)
                records = records_of(answer.content, MetricRecord).values()
                reported.setdefault(client, {n: r[n] for r in records for n in r})
            self.measured, whole = {}, dict[str, float]()
            if reported:
                whole = self._measure(server_round, statistics, reported)
            result = aggregate(server_round, answers)
            if isinstance(result, MetricRecord) and whole:
                return MetricRecord({**result, **whole})
            return result

        return measuring

    def _measure(
        self,
        round: int,
        statistics: Statistics,
        reported: Mapping[int, Mapping[str, Any]],
    ) -> dict[str, float]:
        """Write down what clients' sums say of each, and return what they say of all.

        Whose sums cannot be is written down, too.
        """
        whole, each, odd, by_group = measured(statistics, reported)
        self.measured = {f"evaluate-{name}": whole[name] for name in whole}
        if not (self.records and self.records[-1].number == round):
            self.records.append(RoundRecord(round))
        self.records[-1].by_group = by_group
        rows = self.records[-1].clients
        entries: dict[int, ClientRecord] = {}
        for row in rows:
            entries.setdefault(row.client, row)
        bad = []
        for client in reported:
            if client not in entries:
                entries[client] = self._entry(client, "evaluated")
                rows.append(entries[client])
            entry, own = entries[client], each.get(client, {})
            entry.metrics |= {f"evaluate-{name}": own[name] for name in own}
            if client in odd:
                note = f"evaluation: {odd[client]}"
                entry.reason = f"{entry.reason}; {note}" if entry.reason else note
                bad.append(self._entry(client, "failed", note))
        rows.sort(key=lambda entry: entry.client)
        self._errors.tell(round, bad)
        if each:
            self._errors.left_out(round, set(statistics.besides) - whole.keys())
        return whole

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
            entry = self._entry(self.client_of(node), "ok")
            entries.append(entry)
            entry.bytes_down = down.get(node, 0)
            if reply.has_error():
                lost = reply.error.code in NO_REPLY
                entry.status = "missing" if lost else "failed"
                entry.reason = plain_lines(reason_of(reply.error), TRACEBACK_LENGTH)
                continue
            entry.bytes_up = _num_bytes(reply)
            for metrics in records_of(reply.content, MetricRecord).values():
                known, own = sort_metrics(metrics)
                entry.metrics |= known
                entry.own_metrics = {**entry.own_metrics, **own}
        for node in asked:
            client = self.client_of(node)
            entry = self._entry(client, "missing", "no reply in time")
            entry.bytes_down = down.get(node, 0)
            entries.append(entry)
        return sorted(entries, key=lambda entry: entry.client)

    def _entry(self, client: int, status: Status, reason: str = "") -> ClientRecord:
        name = own_name(client, self.name_of(client))
        return ClientRecord(client, status, reason, name=name)


def _num_bytes(message: Message) -> int:
    """Return how many bytes the models in a message take, without Flower's headers."""
    found = 0
    for record in records_of(message.content, ArrayRecord).values():
        if isinstance(record, FlatRecord) and record.flat is not None:
            found += record.flat.layout.num_bytes
        else:
            found += sum(
                math.prod(array.shape) * np.dtype(array.dtype).itemsize
                for array in record.values()
            )
    return found
