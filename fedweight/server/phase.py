"""A phase before the rounds: what the server asks clients besides training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from ..core.annotations import plain_value
from ..core.errors import AggregationError, ConfigurationError, closest
from ..core.records import ClientRecord, RoundRecord, Status
from ..core.texts import TRACEBACK_LENGTH, own_name, plain, plain_lines, shown
from ..messages import keys
from ..messages._flower import NO_REPLY, reason_of
from ..messages.arrays import arrays_of
from ..messages.grids import name_of
from ..messages.records import check_side_data, records_of
from .known_errors import KnownErrors
from .reported import is_count
from .sampling import numbered

ANSWER_SECONDS = 600.0

# A feature whose deviation is no larger a share of its mean is the same everywhere.
ROUNDING = 1e-12

Arrays = Mapping[str, npt.NDArray[Any]]


class Question(NamedTuple):
    """What one client is asked: numbers and texts, and arrays by name."""

    told: Mapping[str, Any] = MappingProxyType({})
    arrays: Arrays = MappingProxyType({})


class Given(NamedTuple):
    """What one client answers, by name: numbers or lists of them, arrays, side data.

    The lists of side data are finite numbers; everything else is as the client sent it,
    and may be anything.
    """

    metrics: Mapping[str, Any]
    arrays: Arrays
    profile: Mapping[str, Any] = MappingProxyType({})


class Population:
    """All clients, before the first round.

    Parameters
    ----------
    grid : Grid
        Where they are.
    seed : int
        The run's.
    queries : Iterable[str]
        The names of those that there are.
    explore : Callable, optional
        Lets clients train, for :meth:`train`.

    Attributes
    ----------
    clients : tuple[int, ...]
        The clients' numbers, ascending; those known to have no examples left out.
    record : RoundRecord
        Of round 0: who did not answer which query, each of them once, and why.
    """

    def __init__(
        self,
        grid: Grid,
        seed: int,
        queries: Iterable[str],
        explore: Callable[..., Any] | None = None,
    ) -> None:
        self.grid = grid
        self.seed = seed
        self.queries = sorted(queries)
        self._explore = explore
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
            A name of :data:`fedweight.clients.registries.QUERIES`, or of the
            strategy's own :attr:`~fedweight.strategies.WeightingStrategy.queries`.
        questions : Mapping[int, Question]
            By client.
        timeout : float, optional
            Seconds to wait, above 0; ten minutes by default. Who has not answered by
            then did not answer.

        Raises
        ------
        ConfigurationError
            If there is no such query or client, or what is asked fits no message.
        """
        questions = self._checked(query, questions, timeout)
        messages = [
            Message(
                _content(query, client, asked),
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

    def train(
        self,
        clients: Sequence[int],
        *,
        epochs: int,
        start: Tensor | None = None,
        told: Callable[[int], Mapping[str, Tensor]] | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Let some clients train before the first round, and return what they made.

        Nothing becomes of it but what the method makes of it: the global model stays,
        and so does what clients keep. Who trained is in round 0 of the log, with the
        bytes.

        Parameters
        ----------
        clients : Sequence[int]
            Some of :attr:`clients`, each once.
        epochs : int
            1 or more; passes over their data.
        start : Tensor, optional
            ``[P]``: the parameters that they begin with; by default the global model's.
        told : Callable, optional
            Returns, for P, what they are told of each parameter meanwhile, by name:
            what the method's objective hears, ``"mask"`` included.
        timeout : float, optional
            Seconds to wait; as long as it takes by default.

        Returns
        -------
        fedweight.strategies.Round
            Its number is 0; of the clients whose replies were good, one or more.

        Raises
        ------
        ConfigurationError
            If there is no such client.
        AggregationError
            If fewer good replies come than the strategy's ``min_replies``; of fewer
            clients than that all must answer.
        """
        known = [int(c) for c in clients if c in self._node]
        if not known or len(known) != len(clients) or len({*known}) != len(known):
            raise ConfigurationError(
                "population.train: clients must be some of population.clients, each "
                f"once, got {shown(clients)}."
            )
        if self._explore is None:
            raise ConfigurationError("population.train: nobody trains here.")
        nodes = {client: self._node[client] for client in sorted(known)}
        return self._explore(self.record, nodes, epochs, start, told, timeout)

    def _checked(self, query: Any, questions: Any, timeout: Any) -> dict[int, Question]:
        """Return the questions by the clients' numbers, or refuse what is no such."""
        if query not in self.queries:
            raise ConfigurationError(
                f"population.ask: there is no query {shown(query)}."
                f"{closest(str(query), self.queries)} There are "
                f"{', '.join(self.queries)}; a function of your own is one of the "
                "strategy's `queries`."
            )
        waits = isinstance(timeout, int | float) and not isinstance(timeout, bool)
        if timeout is not None and not (waits and timeout > 0):
            raise ConfigurationError(
                "population.ask: timeout must be a number of seconds above 0, or None, "
                f"got {shown(timeout)}."
            )
        if not isinstance(questions, Mapping):
            raise ConfigurationError(
                "population.ask: questions must be a dictionary of Question by client, "
                f"got {shown(questions)}."
            )
        for client, asked in questions.items():
            if client not in self._node:
                raise ConfigurationError(
                    f"population.ask: there is no client {shown(client)} with "
                    "examples. population.clients has those that there are."
                )
            if not isinstance(asked, Question):
                raise ConfigurationError(
                    "population.ask: each client is asked a Question, got "
                    f"{shown(asked)} for client {client}."
                )
        return {int(client): asked for client, asked in questions.items()}

    def reject(self, query: str, client: int, why: str) -> None:
        """Record that a client's answer to a query cannot be used, and why."""
        self._note(query, {client: ("rejected", why)})

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


def _content(query: str, client: int, asked: Question) -> RecordDict:
    """Return a question as the content of a message."""
    whose = f"population.ask: the Question to client {client}"
    told = plain_value(asked.told)
    if not isinstance(told, Mapping) or keys.QUERY in told:
        raise ConfigurationError(
            f"{whose} must tell a dictionary without the name '{keys.QUERY}', got "
            f"{shown(told)}."
        )
    try:
        arrays = {n: Array(np.asarray(a)) for n, a in asked.arrays.items()}
        record = ConfigRecord({**told, keys.QUERY: query})
        return RecordDict({keys.CONFIG: record, keys.ARRAYS: ArrayRecord(arrays)})
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigurationError(
            f"{whose} fits no message: {plain(error).rstrip('.')}. Tell numbers, texts "
            "and lists of them by name, and give arrays of numbers by name."
        ) from None


def label_totals(population: Population) -> list[int]:
    """Return how many training examples of each class all clients have together.

    A client whose counts are none, or are of another length than most clients', does
    not count.

    Raises
    ------
    AggregationError
        If nobody's do.
    """
    questions = dict.fromkeys(population.clients, Question())
    answers = population.ask(keys.LABEL_COUNTS, questions)
    counts = {
        client: [int(n) for n in own]
        for client, given in answers.items()
        if (own := _label_counts(given))
    }
    if not counts:
        raise AggregationError(
            "class totals: no client told how many examples of each class it has."
        )
    lengths = Counter(map(len, counts.values()))
    most = max(lengths, key=lambda length: (lengths[length], length))
    for client in answers:
        own = counts.get(client, [])
        if len(own) != most:
            why = f"its '{keys.LABEL_COUNTS}' are no {most} counts"
            population.reject(keys.LABEL_COUNTS, client, why)
    whole = [own for own in counts.values() if len(own) == most]
    return [sum(of_class) for of_class in zip(*whole, strict=True)]


def feature_moments(
    population: Population,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the mean and the deviation of each feature over all clients, ``[d]``.

    Of sums that clients are asked for twice: the deviation of a feature that is the
    same everywhere, but for rounding, is 1. A client whose sums are none, or are of
    another length than most clients', does not count.

    Raises
    ------
    ConfigurationError
        If nobody's do.
    """
    everybody = population.clients
    first = population.ask(keys.FEATURE_SUMS, dict.fromkeys(everybody, Question()))
    total, n = _sums(population, first)
    mean = total / n
    again = dict.fromkeys(everybody, Question(arrays={"mean": mean}))
    given = population.ask(keys.FEATURE_SUMS, again)
    squares, n = _sums(population, given, len(mean))
    deviation = np.sqrt(squares / n)
    apart = deviation > ROUNDING * np.abs(mean)
    return mean, np.where(apart, deviation, 1.0)


def _sums(
    population: Population, answers: Mapping[int, Given], width: int = 0
) -> tuple[npt.NDArray[np.float64], int]:
    """Return the sums of features that fit, added up, and of how many examples."""
    good: dict[int, tuple[npt.NDArray[np.float64], int]] = {}
    for client, given in answers.items():
        own, n = given.arrays.get("sums"), given.metrics.get(keys.NUM_EXAMPLES)
        if n == 0:
            continue
        number = own is not None and own.dtype == np.float64 and own.ndim == 1
        if own is not None and number and np.isfinite(own).all() and is_count(n):
            good[client] = own, int(n or 0)
        else:
            why = "it gave no finite sums of its features"
            population.reject(keys.FEATURE_SUMS, client, why)
    lengths = Counter(len(own) for own, _ in good.values())
    most = width or max(lengths, key=lambda d: (lengths[d], d), default=0)
    whole = [(own, n) for own, n in good.values() if len(own) == most]
    for client, (own, _) in good.items():
        if len(own) != most:
            why = f"it has {len(own)} features, and most have {most}"
            population.reject(keys.FEATURE_SUMS, client, why)
    if not whole:
        raise ConfigurationError(
            "features: no client told the sums of its features; the log says why."
        )
    return np.sum([own for own, _ in whole], axis=0), sum(n for _, n in whole)


def _label_counts(given: Given) -> list[int]:
    """Return a client's counts of labels, if they are counts."""
    own = given.profile.get(keys.LABEL_COUNTS)
    return own if isinstance(own, list) and all(map(is_count, own)) else []


def _given(reply: Message) -> Given:
    metrics: dict[str, Any] = {}
    for record in records_of(reply.content, MetricRecord).values():
        metrics |= dict(record)
    profile = dict(records_of(reply.content, ConfigRecord).get(keys.PROFILE) or {})
    for name, value in profile.items():
        check_side_data(name, value)
    return Given(metrics, arrays_of(reply.content), profile)
