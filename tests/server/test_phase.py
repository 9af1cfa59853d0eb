"""What the server asks clients before the rounds, and who does not answer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)

from fedweight.core.errors import AggregationError
from fedweight.core.records import ClientRecord
from fedweight.messages import _flower
from fedweight.server.phase import Population, Question, label_totals

NODES = {0: 1000, 1: 1001, 2: 1002, 3: 1003}


@pytest.fixture(autouse=True)
def _may_make_messages() -> Iterator[None]:
    with _flower.task_identity(1):
        yield


class Grid:
    """Four clients; ``replies`` says what comes back from some of them."""

    def __init__(self, replies: Any) -> None:
        self.replies = replies

    def client_of(self, node: int) -> int:
        return node - 1000

    def name_of(self, client: int) -> str:
        return "Bern" if client == 1 else str(client)

    def get_node_ids(self) -> list[int]:
        return list(NODES.values())

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            _flower.set_message_id(message, f"message-{node}")
            replies += self.replies(self.client_of(node), message)
        return replies


def answer(message: Message, **metrics: Any) -> Message:
    return Message(RecordDict({"m": MetricRecord(metrics)}), reply_to=message)


def lost(message: Message) -> Message:
    """What the SuperLink writes for a node that is gone, from its own node."""
    reply = Message(Error(code=_flower.NODE_UNAVAILABLE), reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = _flower.SERVER_NODE_ID
    return reply


def entry(record: ClientRecord) -> tuple[Any, ...]:
    return record.client, record.status, record.name, record.reason.split("\n")[0]


def mixed(client: int, message: Message) -> list[Message]:
    """Client 0 answers twice, 1 fails, 2 is lost, 3 never replies."""
    if client == 0:
        return [answer(message, n=1), answer(message, n=2)]
    if client == 1:
        reason = "client 1, query.ask: ValueError: no power\nTraceback: ..."
        return [Message(Error(code=2, reason=reason), reply_to=message)]
    return [lost(message)] if client == 2 else []


def test_who_does_not_answer_is_recorded_once_with_the_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    population: Any = Population(Grid(mixed), 0, ["label-counts"])
    questions = {client: Question() for client in population.clients}
    with caplog.at_level(logging.WARNING, "fedweight"):
        for _ in range(3):
            answers = population.ask("label-counts", questions)
    assert {c: dict(a.metrics) for c, a in answers.items()} == {0: {"n": 1}}
    named = "query 'label-counts': "
    assert [entry(one) for one in population.record.clients] == [
        (1, "failed", "Bern", f"{named}client 1, query.ask: ValueError: no power"),
        (2, "missing", "", f"{named}no reply: the node is not connected any more"),
        (3, "missing", "", f"{named}no reply in time"),
    ]
    assert population.record.number == 0
    assert "Traceback" in population.record.clients[0].reason
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3
    assert told[0] == (
        "before the first round: client 1 (Bern) failed: query 'label-counts': "
        "query.ask: ValueError: no power"
    )
    assert not any("\n" in line for line in told)


def test_an_answer_that_cannot_be_read_is_recorded() -> None:
    def odd(client: int, message: Message) -> list[Message]:
        array = Array(np.zeros(2))
        broken = Array(array.dtype, array.shape, array.stype, b"no array")
        content = RecordDict(
            {"a": ArrayRecord({"x": broken if client == 2 else array})}
        )
        return [Message(content, reply_to=message)]

    population: Any = Population(Grid(odd), 0, ["label-counts"])
    answers = population.ask("label-counts", {2: Question(), 3: Question()})
    assert list(answers) == [3]
    [record] = population.record.clients
    assert (record.client, record.status) == (2, "rejected")
    assert record.reason.startswith("query 'label-counts': its reply cannot be read: ")


def counting(client: int, message: Message) -> list[Message]:
    """Clients 0 and 1 have counts of three classes, 2 of one, 3 has others."""
    counts: Any = {0: [4, 0, 1], 1: [1, 2, 3], 2: [9], 3: [1, -1, 2]}[client]
    content = RecordDict({"profile": ConfigRecord({"label-counts": counts})})
    return [Message(content, reply_to=message)]


def test_class_totals_are_the_sum_of_what_most_clients_count() -> None:
    population: Any = Population(Grid(counting), 0, ["label-counts"])
    assert label_totals(population) == [5, 2, 4]
    assert [entry(one)[:2] for one in population.record.clients] == [
        (2, "rejected"),
        (3, "rejected"),
    ]
    assert "no 3 counts" in population.record.clients[0].reason
    nobody: Any = Population(Grid(lambda client, message: []), 0, ["label-counts"])
    with pytest.raises(AggregationError, match="no client told how many"):
        label_totals(nobody)
