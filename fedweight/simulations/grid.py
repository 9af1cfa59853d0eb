"""What the simulation grids share: Flower's ``Grid`` over a fixed set of clients.

A Flower ServerApp talks to clients through a ``Grid``. Ours are complete from the
start (no client connects later), give client k the node ``FIRST_NODE + k``, and run
the ClientApp themselves; how, is what the local grid and the Ray grid differ in.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import secrets
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeGuard

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
from .isolation import prefixed, seed_generators, undone
from .plan import Plan, sizes_of
from .seen import Seen

log = logging.getLogger("fedweight")

FIRST_NODE = 1000

RunConfig = Mapping[str, bool | float | int | str]


def new_seed() -> int:
    """Draw a seed from entropy."""
    return secrets.randbits(32)


def new_run_id() -> int:
    """Draw the number of a run, as Flower does."""
    return secrets.randbits(62) + 1


@dataclass(frozen=True)
class Nodes:
    """The simulated nodes of a run, and what their contexts hold.

    Parameters
    ----------
    num_clients : int
        N, 1 or more; the clients are numbered 0 to N - 1.
    run_config : Mapping
        The run's settings, as the app reads them from its context.
    node_config : Mapping[int, Mapping], optional
        By a client's number, what its ``node_config`` holds besides ``partition-id``
        and ``num-partitions``.
    seed : int
        With a client's number and that of its message, what the generators of its
        process begin from, for apps that are not ours; by default from entropy.
    run_id : int
        The run's number; by default drawn, as Flower's are.
    """

    num_clients: int
    run_config: RunConfig = field(default_factory=dict)
    node_config: Mapping[int, RunConfig] = field(default_factory=dict)
    seed: int = field(default_factory=new_seed)
    run_id: int = field(default_factory=new_run_id)

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range("num_clients", self.num_clients, 1)
        check_range("seed", self.seed, 0)

    @property
    def number_of(self) -> Callable[[int], int] | None:
        """What gives a node's client; ``None`` where nodes have their own settings."""
        return None if self.node_config else SimulationGrid.client_of

    def context(self, client: int, store: ClientStore | None = None) -> Context:
        """Return a client's Flower context before its first message."""
        return make_context(
            client,
            self.num_clients,
            self.run_config,
            store,
            own=self.node_config.get(client),
            run_id=self.run_id,
        )


class Addressed(NamedTuple):
    """A message that goes to a client, and which of the messages to it that is."""

    message: Message
    nth: int


class SimulationGrid(Grid):
    """A grid of simulated clients.

    Parameters
    ----------
    nodes : Nodes
        The simulated nodes.

    Attributes
    ----------
    complete : bool
        True: all clients are there from the start, waiting for more is in vain.
    sums_models : bool
        True: where a cohort allows it, local models are added up as they come.
    store : ClientStore
        What clients keep for our own app, such as personal models.
    seen : Seen
        What passed through it as messages, of apps that are not ours.
    plan : Plan
        How our own app trains clients. It is halved where the device turns out to have
        no room for so many at once, and stays so.
    why_halved : str
        What the device said then.
    tells : bool
        Whether a warning says so, too.
    """

    complete = True
    sums_models = True
    client_app: ClientApp
    plan = Plan()
    why_halved = ""
    tells = True

    def __init__(self, nodes: Nodes) -> None:
        self._begin(nodes)

    def _begin(self, nodes: Nodes) -> None:
        """Begin anew with some nodes."""
        self.nodes = nodes
        self.store = ClientStore()
        self._run = _flower.empty_run(nodes.run_id)
        self._told: Counter[int] = Counter()
        self.seen = Seen(self.client_of)

    @property
    def num_clients(self) -> int:
        """How many clients there are."""
        return self.nodes.num_clients

    @property
    def run_config(self) -> RunConfig:
        """The run's settings."""
        return self.nodes.run_config

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

    def _usable_plan(self) -> Plan:
        return usable_plan(
            self.plan, self.client_app, self.num_clients, self.run_config
        )

    def _cut_smaller(
        self, cohort: Cohort, lists: list[list[int]], too_many: Sequence[int]
    ) -> list[list[int]]:
        """Halve the plan, and return the lists of those who were too many at once.

        In ``lists`` they take the place of those that came to nothing. Where that is
        the first list of a round, as a rule, the round goes as with the halved plan.
        """
        if not too_many:
            return []
        failed = {*too_many}
        tried = max(len(nodes) for nodes in lists if nodes[0] in failed)
        self.plan = self.plan.halved(tried)
        nodes = [node for node in cohort.nodes if node in failed]
        sizes = self.sizes_of([self.client_of(node) for node in nodes])
        again = self.plan.cut(cohort, sizes, nodes)
        lists[:] = [part for part in lists if part[0] not in failed] + again
        return again

    def _tell_halved(self, before: Plan, why: str) -> None:
        """Say once that fewer clients train at once from now on."""
        if self.plan != before:
            self.why_halved = why
        if self.plan != before and self.tells:
            log.warning(
                "engine.plan: %s is too many clients at once for this device; from "
                "now on it is %s. (%s)",
                before,
                self.plan,
                why,
            )

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

    def _addressed(self, messages: Iterable[Message]) -> list[Addressed]:
        """Give each message its id, as the SuperLink does.

        One to a node that does not exist goes nowhere, and the log says so.
        """
        batch = []
        for message in messages:
            client = self.client_of(message.metadata.dst_node_id)
            if not 0 <= client < self.num_clients:
                log.error(
                    "%s It is not sent.", self._no_such(message.metadata.dst_node_id)
                )
                continue
            _flower.set_message_id(message, str(uuid.uuid4()))
            self._told[client] += 1
            self.seen.sent(message)
            batch.append(Addressed(message, self._told[client]))
        return batch

    def _checked_client(self, node: int) -> int:
        """Return the client behind a node; raise if there is none."""
        client = self.client_of(node)
        if not 0 <= client < self.num_clients:
            raise EngineError(self._no_such(node))
        return client

    def _no_such(self, node: int) -> str:
        return (
            f"a message goes to node {node}, which does not exist: get_node_ids() "
            f"gives {FIRST_NODE} to {FIRST_NODE + self.num_clients - 1}."
        )


def is_stranger(client_app: ClientApp) -> bool:
    """Tell whether an app is to be kept from whatever else its process does.

    Ours is not, nor one that says that it is ``thread_safe``.
    """
    ours = hasattr(type(client_app), "answers_cohorts")
    return not ours and not getattr(client_app, "thread_safe", False)


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
    *,
    own: RunConfig | None = None,
    run_id: int = 0,
) -> Context:
    """Return a client's Flower context before its first message."""
    given = {"partition-id": client, "num-partitions": num_clients}
    context = SimulatedContext(
        run_id=run_id,
        node_id=FIRST_NODE + client,
        node_config={**given, **(own or {})},
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
    """Return a message whose records its receiver may change, and the metadata."""
    fresh = _flower.message_of(copied(message.content), copy.copy(message.metadata))
    fresh.metadata.delivered_at = datetime.now(UTC).isoformat()
    return fresh


def expires(message: Message) -> float:
    """Return when a message expires, in seconds since 1970, as ``time.time()``."""
    return message.metadata.created_at + message.metadata.ttl


def expired(message: Message) -> Message:
    """Return Flower's reply to a message that was not answered before it expired."""
    code = _flower.MESSAGE_UNAVAILABLE
    reply = Message(Error(code, _flower.NO_REPLY[code]), reply_to=message)
    return numbered(reply)


def numbered(reply: Message) -> Message:
    """Give a reply an id, and say that it has been delivered."""
    _flower.set_message_id(reply, str(uuid.uuid4()))
    reply.metadata.delivered_at = datetime.now(UTC).isoformat()
    return reply


def copied(content: RecordDict) -> RecordDict:
    """Return records that may be changed without the originals.

    Array data are immutable bytes (or vectors that nobody changes in place), so the
    big part is shared.
    """
    result = RecordDict()
    for name, record in content.items():
        if isinstance(record, MetricRecord | ConfigRecord):
            fresh = type(record)()
            for key, value in record.items():
                fresh[key] = list(value) if isinstance(value, list) else value  # type: ignore[assignment]
            result[name] = fresh
        else:
            result[name] = record.copy()
    return result


def execute(
    client_app: ClientApp,
    message: Message,
    context: Context,
    begin: tuple[int, int] | None = None,
) -> Message:
    """Let a client handle a message; an exception becomes Flower's error reply.

    As on Flower, what it has changed of its state is kept unless it raises, and what
    it has changed of its configuration never is.

    Parameters
    ----------
    client_app : ClientApp
        The app.
    message : Message
        What the client receives.
    context : Context
        The client's.
    begin : tuple[int, int], optional
        For an app that is not ours: the run's seed and which of the client's messages
        this is. The process's generators begin there, and what the client does to the
        process is undone.
    """
    if expires(message) <= time.time():
        return expired(message)
    client = SimulationGrid.client_of(message.metadata.dst_node_id)
    state = copied(context.state)
    configs = dict(context.run_config), dict(context.node_config)
    try:
        with contextlib.ExitStack() as around:
            if begin is not None:
                seed, nth = begin
                around.enter_context(undone())
                around.enter_context(prefixed(f"(client {client}) "))
                seed_generators(seed, client, nth)
            reply = client_app(isolated(message), context)
        if not isinstance(reply, Message):
            raise TypeError(
                f"the ClientApp returned {type(reply).__name__}, not a Message"
            )
    except BaseException as error:  # On a device only its process would end.
        if isinstance(error, KeyboardInterrupt):
            raise  # Somebody wants this process to end.
        context.state = state
        reason = describe_failure(client, message.metadata.message_type, error)
        reply = Message(
            Error(code=_flower.CLIENT_APP_RAISED_EXCEPTION, reason=reason),
            reply_to=message,
        )
    finally:
        context.run_config, context.node_config = configs
    return numbered(reply)
