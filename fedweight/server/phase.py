"""A phase before the rounds: what the server asks clients besides training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from ..core.errors import AggregationError
from ..core.texts import clients_called, plain_lines
from ..messages import keys
from ..messages._flower import reason_of
from ..messages.arrays import arrays_of
from .sampling import numbered

log = logging.getLogger("fedweight")

ANSWER_SECONDS = 600.0

Arrays = Mapping[str, npt.NDArray[Any]]


class Question(NamedTuple):
    """What one client is asked: numbers and texts, and arrays by name."""

    told: Mapping[str, Any] = MappingProxyType({})
    arrays: Arrays = MappingProxyType({})


class Given(NamedTuple):
    """What one client answers: numbers, texts or lists, and arrays, by name."""

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
    """

    def __init__(self, grid: Grid, seed: int) -> None:
        self.grid = grid
        self.seed = seed
        self._node = numbered(grid)
        self.clients = tuple(self._node)

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
        clients = {self._node[client]: client for client in questions}
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
        answers = {}
        for reply in self.grid.send_and_receive(messages, timeout=timeout):
            client = clients.get(reply.metadata.src_node_id)
            if client is None:
                continue
            if reply.has_error():
                why = reason_of(reply.error)
            else:
                try:
                    answers[client] = _given(reply)
                    continue
                except Exception as error:  # Its bytes are a stranger's.
                    why = f"its reply cannot be read: {error}"
            log.warning(
                "%s did not answer '%s': %s",
                clients_called([client]),
                query,
                plain_lines(why, 200),
            )
        return dict(sorted(answers.items()))


def label_totals(population: Population) -> list[int]:
    """Return how many training examples of each class all clients have together.

    Raises
    ------
    AggregationError
        If nobody answers, or the answers are of different lengths.
    """
    questions = dict.fromkeys(population.clients, Question())
    answers = population.ask(keys.LABEL_COUNTS, questions)
    found = [given.metrics.get(keys.LABEL_COUNTS) for given in answers.values()]
    counts = [own if isinstance(own, list) else [] for own in found]
    lengths = {len(own) for own in counts}
    if len(lengths) != 1 or 0 in lengths:
        raise AggregationError(
            "class totals: the clients' counts of classes have "
            f"{', '.join(map(str, sorted(lengths))) or 'no'} entries. All need one for "
            "each class."
        )
    if not all(type(n) is int and n >= 0 for own in counts for n in own):
        raise AggregationError(
            "class totals: a client's counts of classes are not whole numbers from 0."
        )
    return [sum(of_class) for of_class in zip(*counts, strict=True)]


def _given(reply: Message) -> Given:
    metrics: dict[str, Any] = {}
    records = reply.content.metric_records, reply.content.config_records
    for record in [record for some in records for record in some.values()]:
        metrics |= dict(record)
    return Given(metrics, arrays_of(reply.content))
