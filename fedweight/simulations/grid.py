"""What the simulation grids share: Flower's ``Grid`` over a fixed set of clients.

A Flower ServerApp talks to clients through a ``Grid``. Ours are complete from the
start (no client connects later), give client k the node ``FIRST_NODE + k``, and run
the ClientApp themselves; how, is what the local grid and the Ray grid differ in.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from flwr.app import (
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from ..core.client_store import ClientStore
from ..core.errors import EngineError, check_range, describe_failure
from ..messages import _flower
from ..messages.dispatch import Cohort
from .plan import Plan, sizes_of

FIRST_NODE = 1000

RunConfig = Mapping[str, bool | float | int | str]


class SimulationGrid(Grid):
    """A grid of simulated clients.

    Parameters
    ----------
    num_clients : int
        N, 1 or more; the clients are numbered 0 to N - 1.

    Attributes
    ----------
    complete : bool
        True: all clients are there from the start, waiting for more is in vain.
    sums_models : bool
        True: where a cohort allows it, local models are added up as they come.
    store : ClientStore
        What clients keep for our own app, such as personal models.
    """

    complete = True
    sums_models = True
    client_app: ClientApp

    def __init__(self, num_clients: int) -> None:
        check_range("num_clients", num_clients, 1)
        self.num_clients = num_clients
        self.store = ClientStore()
        self._run = _flower.empty_run(0)
        self._ids = (f"message-{n}" for n in itertools.count(1))

    @staticmethod
    def client_of(node_id: int) -> int:
        """Return the number of the client behind a node."""
        return node_id - FIRST_NODE

    @property
    def name_of(self) -> Callable[[int], str] | None:
        """What gives a client's name; ``None`` where clients have only numbers."""
        return getattr(self.client_app, "name_of", None)

    def sizes_of(self, clients: Sequence[int]) -> list[int] | None:
        """Return how many examples some clients have, where the app knows."""
        return sizes_of(self.client_app, clients)

    @property
    def kept_tables(self) -> Mapping[str, Sequence[str]]:
        """The tables of the store that clients read, by the type of a message."""
        tables: Mapping[str, Sequence[str]]
        tables = getattr(self.client_app, "kept_tables", {})
        return tables

    def client_states(self) -> dict[int, RecordDict]:
        """Return what clients keep in their contexts, by number, of those that do."""
        raise NotImplementedError

    def restore_clients(self, states: Mapping[int, RecordDict]) -> None:
        """Let clients go on with what they kept in another run of the same."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what the grid holds; it cannot be used afterwards."""

    # Flower's interface.

    def set_run(self, run: Any) -> None:
        """Set the run that the grid belongs to."""
        self._run = run

    @property
    def run(self) -> Any:
        """The run that the grid belongs to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message (Flower's older way; ``Message(...)`` is the newer)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the clients' nodes, in the order of their numbers."""
        return range(FIRST_NODE, FIRST_NODE + self.num_clients)

    def _addressed(self, messages: Iterable[Message]) -> list[Message]:
        """Check where messages go and give each its id, as the SuperLink does."""
        batch = list(messages)
        for message in batch:
            self._checked_client(message.metadata.dst_node_id)
            _flower.set_message_id(message, next(self._ids))
        return batch

    def _checked_client(self, node: int) -> int:
        """Return the client behind a node; raise if there is none."""
        client = self.client_of(node)
        if not 0 <= client < self.num_clients:
            raise EngineError(
                f"a message goes to node {node}, which does not exist: "
                f"get_node_ids() gives {FIRST_NODE} to "
                f"{FIRST_NODE + self.num_clients - 1}."
            )
        return client


def answers_cohort(
    messages: Iterable[Message], client_app: ClientApp
) -> TypeGuard[Cohort]:
    """Tell whether an app handles these messages together, without making them."""
    ours = getattr(client_app, "answers_cohorts", False)
    return (
        ours
        and isinstance(messages, Cohort)
        and messages.message_type in (MessageType.TRAIN, MessageType.EVALUATE)
        and messages.untouched
    )


class SimulatedContext(Context):
    """The Flower context of a simulated client.

    Attributes
    ----------
    store : ClientStore, optional
        Where our own app puts what the client keeps.
    """

    store: ClientStore | None = None


def make_context(
    client: int,
    num_clients: int,
    run_config: RunConfig,
    store: ClientStore | None = None,
) -> Context:
    """Return a client's Flower context before its first message."""
    context = SimulatedContext(
        run_id=0,
        node_id=FIRST_NODE + client,
        node_config={"partition-id": client, "num-partitions": num_clients},
        state=RecordDict(),
        run_config=dict(run_config),
    )
    context.store = store
    return context


def usable_plan(
    plan: Plan, client_app: ClientApp, num_clients: int, run_config: RunConfig
) -> Plan:
    """Return a plan by which an app's clients train as each would train alone.

    Parameters
    ----------
    plan : Plan
        What is asked for.
    client_app : ClientApp
        Ours tells whether clients of its model may train at once.
    num_clients : int
        N.
    run_config : Mapping
        The run's settings.

    Returns
    -------
    Plan
        The same, or one after another.
    """
    ask = getattr(client_app, "trains_batched", None)
    if plan.chunk == 1 or ask is None:
        return plan
    return plan if ask(make_context(0, num_clients, run_config)) else Plan()


def isolated(message: Message) -> Message:
    """Return a message whose records its receiver may change.

    So may it change the metadata. Array data are immutable bytes (or vectors that
    nobody changes in place), so the big part is shared.
    """
    content = RecordDict()
    for name, record in message.content.items():
        if isinstance(record, MetricRecord | ConfigRecord):
            fresh = type(record)()
            for key, value in record.items():
                fresh[key] = list(value) if isinstance(value, list) else value  # type: ignore[assignment]
            content[name] = fresh
        else:
            content[name] = record.copy()
    return _flower.message_of(content, copy.copy(message.metadata))


def execute(client_app: ClientApp, message: Message, context: Context) -> Message:
    """Let a client handle a message; an exception becomes Flower's error reply."""
    try:
        reply = client_app(isolated(message), context)
        if not isinstance(reply, Message):
            raise TypeError(
                f"the ClientApp returned {type(reply).__name__}, not a Message"
            )
    except (Exception, SystemExit) as error:  # On a device only its process would end.
        client = SimulationGrid.client_of(message.metadata.dst_node_id)
        reason = describe_failure(client, message.metadata.message_type, error)
        reply = Message(
            Error(code=_flower.CLIENT_APP_RAISED_EXCEPTION, reason=reason),
            reply_to=message,
        )
    return reply
