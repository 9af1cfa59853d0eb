"""A phase before the rounds: what the server asks clients besides training."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from ..core.records import ClientRecord, RoundRecord, Status
from ..core.texts import TRACEBACK_LENGTH, own_name, plain_lines
from ..messages import keys
from ..messages._flower import NO_REPLY, reason_of
from ..messages.arrays import arrays_of
from ..messages.grids import name_of
from .known_errors import KnownErrors
from .sampling import numbered

ANSWER_SECONDS = 600.0

Arrays = Mapping[str, npt.NDArray[Any]]


class Question(NamedTuple):
    """What one client is asked: numbers and texts, and arrays by name."""

    told: Mapping[str, Any] = MappingProxyType({})
    arrays: Arrays = MappingProxyType({})


class Given(NamedTuple):
    """What one client answers: numbers or lists of them, and arrays, by name."""

    metrics: Mapping[str, Any]
    arrays: Arrays


class Population:
    """All clients, before the first round.

    Parameters
    ----------
    grid : Grid
        Where they are.
    seed : int
        The run's.

    Attributes
    ----------
    clients : tuple[int, ...]
        The clients' numbers, ascending; those known to have no examples left out.
    record : RoundRecord
        Of round 0: who did not answer which query, each of them once, and why.
    """

    def __init__(self, grid: Grid, seed: int) -> None:
        self.grid = grid
        self.seed = seed
        self.record = RoundRecord(0)
        self._node = numbered(grid)
        self.clients = tuple(self._node)
        self._name_of = name_of(grid)
        self._errors = KnownErrors()
        self._recorded: set[tuple[int, str]] = set()

    def ask(
        self,
        query: str,
        questions: Mapping[int, Question],
        timeout: float | None = ANSWER_SECONDS,
    ) -> dict[int, Given]:
        """Ask some clients, and return what those answered that could.

        Parameters
        ----------
        query : str
            A name of :data:`fedweight.clients.queries.QUERIES`, or of the strategy's
            own :attr:`~fedweight.strategies.WeightingStrategy.queries`.
        questions : Mapping[int, Question]
            By client.
        timeout : float, optional
            Seconds to wait; ten minutes by default. Who has not answered by then did
            not answer.
        """
        messages = [
            Message(
                RecordDict(
                    {
                        keys.CONFIG: ConfigRecord({**asked.told, keys.QUERY: query}),
                        keys.ARRAYS: ArrayRecord(
                            {n: Array(np.asarray(a)) for n, a in asked.arrays.items()}
                        ),
                    }
                ),
                dst_node_id=self._node[client],
                message_type="query.ask",
            )
            for client, asked in questions.items()
        ]
        replies = list(self.grid.send_and_receive(messages, timeout=timeout))
        client_of = {self._node[client]: client for client in questions}
        # A reply that the SuperLink writes for a lost client carries its own node.
        node_of = {
            m.metadata.message_id: m.metadata.dst_node_id
            for m in messages
            if m.metadata.message_id
        }
        answers: dict[int, Given] = {}
        lost: dict[int, tuple[Status, str]] = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            if node not in client_of:
                node = node_of.get(reply.metadata.reply_to_message_id, node)
            client = client_of.get(node)
            if client is None or client in answers or client in lost:
                continue  # It was not asked, or has answered already.
            if reply.has_error():
                missing = reply.error.code in NO_REPLY
                lost[client] = (
                    "missing" if missing else "failed",
                    reason_of(reply.error),
                )
                continue
            try:
                answers[client] = _given(reply)
            except Exception as error:  # Its bytes are a stranger's.
                lost[client] = "rejected", f"its reply cannot be read: {error}"
        for client in questions:
            if client not in answers and client not in lost:
                lost[client] = "missing", "no reply in time"
        self._note(query, lost)
        return dict(sorted(answers.items()))

    def _note(self, query: str, lost: Mapping[int, tuple[Status, str]]) -> None:
        """Record who did not answer a query, and log what is new."""
        new = [
            ClientRecord(
                client,
                status,
                plain_lines(f"query '{query}': {why}", TRACEBACK_LENGTH),
                name=own_name(client, self._name_of(client)),
            )
            for client, (status, why) in sorted(lost.items())
            if (client, query) not in self._recorded
        ]
        self._recorded.update((entry.client, query) for entry in new)
        self.record.clients += new
        self._errors.tell(0, new)


def _given(reply: Message) -> Given:
    metrics: dict[str, Any] = {}
    for record in reply.content.metric_records.values():
        metrics |= dict(record)
    return Given(metrics, arrays_of(reply.content))
