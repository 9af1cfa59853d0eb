"""What clients answer to strategies that are not ours, and keep no record of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flwr.app import Message

from ..strategies import ClientRecord, RoundRecord
from ..texts import cause

log = logging.getLogger("fedweight")


class Listener:
    """Records what clients answer to a strategy that keeps no history itself.

    Parameters
    ----------
    records : list[RoundRecord]
        Where the rounds go.
    client_of : Callable
        Gives the number of the client behind a node.
    """

    def __init__(
        self, records: list[RoundRecord], client_of: Callable[[int], int]
    ) -> None:
        self.records = records
        self.client_of = client_of
        self._asked: list[Message] = []
        self._known: set[str] = set()

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
            for entry in record.clients:
                self._tell(server_round, entry)
            result = aggregate(server_round, answers)
            if result[0] is None:
                record.status = "failed"
                record.reason = "the strategy kept the global model"
            return result

        return hearing

    def _entries(self, answers: Sequence[Message]) -> list[ClientRecord]:
        asked = {m.metadata.dst_node_id: m.metadata.message_id for m in self._asked}
        node_of = {message: node for node, message in asked.items() if message}
        entries = []
        for reply in answers:
            node = reply.metadata.src_node_id
            if node not in asked:  # The SuperLink answers for a node that is lost.
                node = node_of.get(reply.metadata.reply_to_message_id, node)
            asked.pop(node, None)
            entry = ClientRecord(self.client_of(node), "ok")
            entries.append(entry)
            if reply.has_error():
                entry.status = "failed"
                entry.reason = reply.error.reason or "an error without a reason"
                continue
            for metrics in reply.content.metric_records.values():
                entry.metrics |= {
                    name: float(value)
                    for name, value in metrics.items()
                    if not isinstance(value, list)
                }
        entries += [
            ClientRecord(self.client_of(node), "missing", "no reply in time")
            for node in asked
        ]
        return sorted(entries, key=lambda entry: entry.client)

    def _tell(self, number: int, entry: ClientRecord) -> None:
        """Log each error once; ``errors.log`` says whom else it happened to."""
        why = cause(entry.reason)
        if entry.status != "ok" and why not in self._known:
            self._known.add(why)
            log.warning(
                "round %d: client %d %s: %s", number, entry.client, entry.status, why
            )
