"""A phase after the rounds: all clients make the last global model their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from ..core.errors import AggregationError
from ..core.layout import Layout
from ..core.records import ClientRecord, RoundRecord
from ..core.texts import TRACEBACK_LENGTH, own_name, plain_lines
from ..messages import keys
from ..messages.arrays import layout_of
from ..messages.dispatch import Cohort, Replies, Reply
from ..messages.grids import name_of, staged
from .admission import size_of
from .known_errors import KnownErrors
from .loop import ReadsAlone, ServerState, has_itself
from .reported import AcceptedReply, mean_metrics, recorded_metrics, sort_metrics
from .sampling import numbered


@runtime_checkable
class AsksAll(ReadsAlone, Protocol):
    """A strategy that knows from which global model each client starts."""

    def configure_last(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Write all clients their messages of the phase after the rounds."""
        ...


def after_rounds(
    strategy: Strategy, grid: Grid, state: ServerState, timeout: float | None = None
) -> RoundRecord:
    """Let all clients train personal models, and evaluate them.

    It costs a message to each client, with the global model, and back come numbers.
    What clients have made is kept when all have answered.

    Parameters
    ----------
    strategy : Strategy
        What ran the rounds.
    grid : Grid
        Where the clients are.
    state : ServerState
        After the last round.
    timeout : float, optional
        Seconds to wait for the answers.

    Returns
    -------
    RoundRecord
        With a line for each client, and the means by data size, under the names that
        evaluation has in a round.
    """
    node_of = numbered(grid)
    config = ConfigRecord(dict(state.evaluate_config))
    config[keys.ROUND], config[keys.AFTER_ROUNDS] = state.round, True
    messages: Iterable[Message]
    if has_itself(strategy, AsksAll, "configure_last"):
        last: Any = strategy
        with last.alone():
            messages = last.configure_last(state.round, state.arrays, config, grid)
    else:
        content = RecordDict({keys.ARRAYS: state.arrays, keys.CONFIG: config})
        messages = Cohort(content, [*node_of.values()], MessageType.EVALUATE)
    with staged(grid) as keep:
        replies = grid.send_and_receive(messages, timeout=timeout)
        size = messages.num_bytes if isinstance(messages, Cohort) else None
        record = _recorded(state, node_of, replies, grid, size)
        keep()
    return record


def _recorded(
    state: ServerState,
    node_of: dict[int, int],
    replies: Iterable[Message],
    grid: Grid,
    num_bytes: int | None,
) -> RoundRecord:
    """Sort what clients answered; each of them was sent so many bytes."""
    layout, names = layout_of(state.arrays), name_of(grid)
    client_of = {node: client for client, node in node_of.items()}
    accepted: dict[int, AcceptedReply] = {}
    record, errors = RoundRecord(state.round), KnownErrors()
    entries = {
        client: ClientRecord(
            client,
            "missing",
            "no reply in time",
            name=own_name(client, names(client)),
            bytes_down=layout.num_bytes if num_bytes is None else num_bytes,
        )
        for client in node_of
    }
    for node, reply in _read(replies, layout):
        client = client_of.get(node)
        if client is None or entries[client].status != "missing":
            continue  # It was not asked, or has answered already.
        entry = entries[client]
        try:
            if isinstance(reply, AggregationError):
                raise reply
            if reply.error is not None:
                entry.status = "missing" if reply.lost else "failed"
                entry.reason = plain_lines(reply.error, TRACEBACK_LENGTH)
                continue
            size = size_of(reply.metrics, keys.NUM_EXAMPLES)
        except AggregationError as error:
            entry.status = "rejected"
            entry.reason = plain_lines(str(error), TRACEBACK_LENGTH)
            continue
        known, own = sort_metrics(reply.metrics)
        entry.status, entry.reason = "evaluated", ""
        entry.metrics = {f"evaluate-{name}": value for name, value in known.items()}
        accepted[client] = AcceptedReply(client, reply, size, known, own)
    record.clients = [entries[client] for client in sorted(entries)]
    errors.tell(state.round, record.clients)
    if accepted:
        several = [accepted[client] for client in sorted(accepted)]
        means = mean_metrics(several, keys.NUM_EXAMPLES)
        record.metrics = recorded_metrics(means, "evaluate-")
    return record


def _read(
    replies: Iterable[Message], layout: Layout
) -> Iterator[tuple[int, Reply | AggregationError]]:
    """Yield what each node answered, or why that cannot be read."""
    plain = replies.plain if isinstance(replies, Replies) else None
    if plain is not None:
        yield from ((reply.node, reply) for reply in plain)
        return
    for message in replies:
        node = message.metadata.src_node_id
        try:
            yield node, Reply.of(message, layout, keys.ARRAYS)
        except AggregationError as error:
            yield node, error
