"""The Flower App that this folder is: what ``flwr run .`` and real nodes start.

The run config holds the keys of a simulation file, dotted (``strategy.name``), and
three of its own: ``settings`` for the options beside them (``"strategy.a=0.2"``),
``out`` for the run's folder, and ``num-classes`` where every node has data of its own.

Only Flower is imported here. A node starts a process for each message, and what a
message does not need it should not wait for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from .core.errors import AggregationError, ConfigurationError, check_range
from .core.extras import require
from .core.texts import NAME_LENGTH, plain, shown
from .messages import keys
from .messages.records import records_of

if TYPE_CHECKING:
    from .core.layout import Base
    from .data import Schema
    from .messages.bases import BaseSender
    from .messages.codecs import Codec
    from .messages.wire import Wire
    from .studies.components import Components
    from .studies.configuration import Configuration

log = logging.getLogger("fedweight")

# Keys of the run config that no simulation file has.
OUT = "out"
NUM_CLASSES = "num-classes"

# What the nodes are asked once, and the record they answer with.
IDENTITY = "identity"

# How long they have for that.
ANSWER_SECONDS = 120

# The key of a node's config that names it.
CLIENT_NAME = "client-name"

Frozen = tuple[tuple[str, bool | float | int | str], ...]

server_app = ServerApp()
client_app = ClientApp()


# --------------------------------------------------------------------- the server


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the strategy on Flower's grid, and write the run's folder."""
    require("a server that writes a run's folder", "studies", "pandas")
    run_config = _frozen(context)
    folder = _folder(run_config, context.run_id)
    numbered = grid if hasattr(grid, "client_of") else NumberedGrid(grid)
    if _num_classes(run_config):
        components = _server_components(run_config)
    else:
        components = _shared_components(run_config, _num_partitions(numbered))

    from .core.paths import address
    from .studies.folder import cannot_repeat, new_folder
    from .studies.pages import report_or_say
    from .studies.recorder import Recorder
    from .studies.result import Run
    from .studies.runner import make_ready, serve

    own_data, preface = bool(_num_classes(run_config)), ""
    if own_data:
        preface = cannot_repeat(
            "every node has data of its own",
            "run the app on the nodes (docs/flower.md)",
        )
    strategy, _, initial = make_ready(components, simulated=False)
    with new_folder(folder, folder.name):
        recorder = Recorder(folder, components, strategy)
        print(f"results go to {folder}", flush=True)
        with recorder.recording({"name": "flower"}, own_data=own_data, preface=preface):
            serve(numbered, components, strategy, initial, recorder)
        run = Run(folder)
        reported = report_or_say(run)
    summary = run.summary()
    if summary["test_accuracy"] is not None:
        print(f"test accuracy {summary['test_accuracy']:.4f}")
    if summary["stopped"]:
        print(f"stopped early, {summary['stopped']}")
    print(f"results in {folder}", flush=True)
    if reported:
        print(f"report     {address(folder / 'report.html')}", flush=True)
    for warning in summary["warnings"]:
        print(f"warning: {warning}", flush=True)
    if summary["failed_rounds"]:
        raise AggregationError(
            f"{summary['failed_rounds']} of {summary['rounds']} rounds failed; "
            f"{folder / 'clients.csv'} says why."
        )


class NumberedGrid(Grid):
    """A Flower grid that knows the nodes' client numbers.

    Flower gives a node a random id; its client number is its ``partition-id``. In the
    order of these numbers clients are sampled and summed, so with them a run does not
    depend on the ids, and the weight log says who is who. A node without a
    ``partition-id`` is known by its id.

    Parameters
    ----------
    grid : Grid
        What carries the messages.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.identities: dict[int, ConfigRecord] = {}  # in the order nodes came
        self._numbers: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._told: set[tuple[int, str]] = set()
        self._sender: BaseSender | None = None
        self._wire: Wire | None = None

    def get_node_ids(self) -> list[int]:
        """Return the nodes that are connected, and ask new ones who they are."""
        nodes = list(self.grid.get_node_ids())
        new = sorted(node for node in nodes if node not in self.identities)
        if new:
            self._ask(new)
        if self._sender is not None:
            self._sender.send(nodes)
        numbers: dict[int, int] = {}
        taken: set[int] = set()
        connected = set(nodes)
        for node, identity in self.identities.items():
            number = _number(identity)
            if node not in connected or number is None:
                continue
            if number in taken:
                self._warn(
                    node,
                    f"says that it is client {number}, which is still connected as "
                    "another node; it goes by its node id while that lasts",
                )
                continue
            numbers[node] = number
            taken.add(number)
        self._numbers = numbers
        self._names = {
            numbers.get(node, node): plain(str(identity[CLIENT_NAME]), NAME_LENGTH)
            for node, identity in self.identities.items()
            if CLIENT_NAME in identity
        }
        return nodes

    def client_of(self, node: int) -> int:
        """Return a node's client number."""
        return self._numbers.get(node, node)

    def name_of(self, client: int) -> str:
        """Return what a node calls itself, or its client number."""
        return self._names.get(client, str(client))

    @property
    def connected(self) -> set[int]:
        """The client numbers of all nodes that were ever connected."""
        numbers = {node: _number(i) for node, i in self.identities.items()}
        return {node if n is None else n for node, n in numbers.items()}

    def _ask(self, nodes: list[int]) -> None:
        messages = [
            Message(RecordDict(), dst_node_id=node, message_type=f"query.{IDENTITY}")
            for node in nodes
        ]
        replies = {
            reply.metadata.src_node_id: reply.content.get(IDENTITY)
            for reply in self.grid.send_and_receive(messages, timeout=ANSWER_SECONDS)
            if not reply.has_error()
        }
        for node in nodes:
            identity = replies.get(node)
            if not isinstance(identity, ConfigRecord):
                log.warning("node %d did not say which client it is", node)
                identity = ConfigRecord()
            self.identities[node] = identity
            if identity.get("partition-id") is not None and _number(identity) is None:
                self._warn(
                    node,
                    f"has the partition-id {shown(identity['partition-id'])}, which is "
                    "no number of a client; it goes by its node id",
                )

    def _warn(self, node: int, what: str) -> None:
        if (node, what) not in self._told:
            self._told.add((node, what))
            log.warning("node %d %s", node, what)

    def bring(self, base: Base) -> None:
        """Send a model's frozen tensors, from now on, to nodes that lack them."""
        from .messages.bases import BaseSender

        self._sender = BaseSender(base, self.grid, ANSWER_SECONDS)

    def read_by(self, codec: Codec) -> None:
        """Have clients write models with a codec, from now on, and read them by it."""
        from .messages.wire import Wire

        self._wire = Wire(codec)

    def _written(self, messages: Iterable[Message]) -> Iterable[Message]:
        return messages if self._wire is None else self._wire.write(messages)

    def _watched(self, replies: Iterable[Message]) -> Iterable[Message]:
        if self._wire is not None:
            replies = self._wire.read(replies)
        return replies if self._sender is None else self._sender.watched(replies)

    # The rest of a grid, as it is.

    def set_run(self, run: Any) -> None:
        """Pass on."""
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        """Pass on."""
        return self.grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Pass on."""
        return self.grid.create_message(*args, **kwargs)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on."""
        return self.grid.push_messages(self._written(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on."""
        return self._watched(self.grid.pull_messages(message_ids))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Pass on."""
        sent = self._written(messages)
        return self._watched(self.grid.send_and_receive(sent, timeout=timeout))


def _number(identity: ConfigRecord) -> int | None:
    """Return the client number that a node gives itself, if it is one."""
    number = identity.get("partition-id")
    return number if isinstance(number, int) and number >= 0 else None


def _num_partitions(grid: Grid) -> int | None:
    """Return among how many clients the nodes divide the data, as they were told."""
    nodes = list(grid.get_node_ids())
    while not nodes:
        log.info("waiting for a node")
        time.sleep(1)  # Flower's Grid offers no event for a node that connects.
        nodes = list(grid.get_node_ids())
    if not isinstance(grid, NumberedGrid):
        return len(nodes)
    told: dict[int, list[int]] = {}
    for node, identity in grid.identities.items():
        number = identity.get("num-partitions")
        if isinstance(number, int):
            told.setdefault(number, []).append(node)
    if len(told) > 1:
        each = "; ".join(
            f"{number} on {len(told[number])}, such as {told[number][0]}"
            for number in sorted(told)
        )
        raise ConfigurationError(
            f"the nodes disagree on num-partitions ({each}). Start every SuperNode "
            "with the same."
        )
    return next(iter(told), None)


def _folder(run_config: Frozen, run_id: int) -> Path:
    """Return where the run's folder goes.

    An app runs where the SuperLink was started, which for ``flwr run .`` is wherever
    the first one was typed. So nothing here is relative to the working directory.
    """
    out = str(dict(run_config).get(OUT, ""))
    if not out:
        values = dict(run_config)
        name = values.get("run.name", "run")
        strategy = str(values.get("strategy.name", "")).rsplit(":", 1)[-1].lower()
        label = f"{name}-{strategy}-seed{values.get('run.seed', 0)}-{run_id}"
        return Path.home() / "fedweight-runs" / label.replace("/", "-")
    return _absolute(OUT, out)


# -------------------------------------------------------------------- the clients


def _handle(message: Message, context: Context) -> Message:
    """Train, evaluate or count labels: on a part of the data, or on a node's own."""
    run_config = _frozen(context)
    path = context.node_config.get("data-path")
    num_classes = _num_classes(run_config)
    if bool(num_classes) != (path is not None):
        raise ConfigurationError(
            f"this node has {'no' if path is None else 'a'} 'data-path', but the run "
            f"config's {NUM_CLASSES} is {num_classes}. It is the number of classes "
            "where every node has a file of its own, and 0 where they share the data."
        )
    if path is not None:
        return _own_client_app(message, context)(message, context)
    import torch

    torch.set_num_threads(1)  # As in our own grids: more would change the last bits.
    clients = context.node_config.get("num-partitions")
    app = _client_app(run_config, None if clients is None else int(clients))
    return app(message, context)


client_app.train()(_handle)
client_app.evaluate()(_handle)
client_app.query("ask")(_handle)
client_app.query("label_counts")(_handle)
client_app.query(keys.BASE)(_handle)


@client_app.query(IDENTITY)
def _identity(message: Message, context: Context) -> Message:
    """Say which client this node is, of how many; nothing about its data."""
    told = context.node_config
    names = ("partition-id", "num-partitions")
    identity = ConfigRecord({name: int(told[name]) for name in names if name in told})
    if CLIENT_NAME in told:
        identity[CLIENT_NAME] = str(told[CLIENT_NAME])
    return Message(RecordDict({IDENTITY: identity}), reply_to=message)


@lru_cache(maxsize=2)
def _client_app(run_config: Frozen, num_clients: int | None) -> ClientApp:
    """Make a process's ClientApp once, however many messages it handles."""
    return _shared_components(run_config, num_clients).client_app()


def _own_client_app(message: Message, context: Context) -> ClientApp:
    """Make the ClientApp of a node that has a file of its own."""
    import numpy as np

    from .data import DataSet, FederatedData, check
    from .studies.components import Components, client_data

    run_config = _frozen(context)
    configuration = _configuration(run_config)
    _check_task(configuration)
    schema = _schema(message)
    if schema is None:  # Nobody knows the groups, and nobody asks for them now.
        configuration = configuration.without("groups")
    own = client_data(configuration, context, None, schema)
    name, classes = str(context.node_config["data-path"]), _num_classes(run_config)
    dataset = DataSet(
        name,
        own.train,
        own.held_out,
        classes,
        attribute_names={} if schema is None else schema.groups,
    )
    dataset = check(dataset)
    everything = np.arange(len(own.train))
    data = FederatedData(dataset, [everything], held_out=0)
    app = Components(configuration, data).client_app()
    app.data = lambda context: own
    return app


def _schema(message: Message) -> Schema | None:
    """Return the server's columns, where it tells them; to count labels it need not."""
    from .data import Schema

    for record in records_of(message.content, ConfigRecord).values():
        if keys.SCHEMA in record:
            return Schema.read(str(record[keys.SCHEMA]), "what the server tells")
    return None


# ---------------------------------------------------------------- what both sides do


def _frozen(context: Context) -> Frozen:
    """Return the run config in a form that can be a key."""
    return tuple(sorted(context.run_config.items()))


def _num_classes(run_config: Frozen) -> int:
    """Return C where every node has data of its own, or 0."""
    value = dict(run_config).get(NUM_CLASSES, 0)
    if not isinstance(value, int) or value < 0:
        raise ConfigurationError(
            f"{NUM_CLASSES} must be a whole number, 0 or more, got {value!r}."
        )
    return int(value)


def _absolute(key: str, path: str) -> Path:
    from .core.paths import clean_path

    whole = clean_path(f"run config: {key}", path)
    if not whole.is_absolute():
        raise ConfigurationError(
            f"run config: {key} must be an absolute path, got '{path}'. An app does "
            "not run in the folder where flwr run was typed."
        )
    return whole


def _configuration(run_config: Frozen) -> Configuration:
    """Read the keys that a simulation file has."""
    from .studies.configuration import Configuration

    flat = {k: v for k, v in run_config if k not in (OUT, NUM_CLASSES)}
    configuration = Configuration.unflatten(flat)
    if configuration["data"]["path"]:
        _absolute("data.path", configuration["data"]["path"])
    if configuration["model"]["weights"]:
        _absolute("model.weights", configuration["model"]["weights"])
    return configuration


@lru_cache(maxsize=2)
def _shared_components(run_config: Frozen, num_clients: int | None) -> Components:
    """Divide the configuration's data among the nodes, alike on every side."""
    from .studies.components import prepare
    from .studies.configuration import Configuration

    configuration = _configuration(run_config)
    if num_clients is not None:
        # What config.toml says must be what happened.
        partition = {**configuration["partition"], "clients": num_clients}
        configuration = Configuration({**configuration.tables, "partition": partition})
    return prepare(configuration, num_clients=num_clients)


def _check_task(configuration: Configuration) -> None:
    """Refuse another task where nodes have files of their own, which have classes."""
    task = configuration["data"].get("task", "classification")
    if task != "classification":
        raise ConfigurationError(
            f"data.task is '{task}', but {NUM_CLASSES} is above 0: nodes that have "
            "files of their own train on classes. Set data.task = 'classification'."
        )


def _server_components(run_config: Frozen) -> Components:
    """Read the server's own file, where the nodes have theirs: test and proxy set.

    It is read as a node's is, its values as they stand. ``data.proxy`` of it becomes
    the proxy set, and the rest is for testing.
    """
    import numpy as np

    from .core.options import options_of
    from .core.rng import Purpose, generator
    from .data import DataSet, FederatedData, check, take_proxy
    from .data.examples import MOST_CLASSES
    from .data.files import load_one, load_one_csv
    from .data.groups import name_groups
    from .studies.components import Components

    configuration = _configuration(run_config)
    _check_task(configuration)
    data, seed = configuration["data"], configuration.seed("partition")
    if data["validation"]:
        raise ConfigurationError(
            f"data.validation is {data['validation']:g}, but {NUM_CLASSES} is above 0: "
            "a share of the training data is not the server's to take. Leave it at 0."
        )
    if data["name"] not in ("csv", "npz") or not data["path"]:
        raise ConfigurationError(
            f"with {NUM_CLASSES} above 0 the nodes have the data, and the server needs "
            "a file of test examples: data.name='csv' (or 'npz') and data.path."
        )
    takes = options_of(load_one_csv) if data["name"] == "csv" else {}
    options = {k: v for k, v in configuration.options("data").items() if k in takes}
    num_classes = _num_classes(run_config)
    check_range(NUM_CLASSES, num_classes, 1, MOST_CLASSES)
    classes = options.get("classes") or range(num_classes)
    if len(classes) != num_classes:
        raise ConfigurationError(
            f"{NUM_CLASSES} is {num_classes}, but data.classes lists {len(classes)}. "
            "Make them equal."
        )
    examples, schema = load_one(data["path"], **options)
    schema = replace(schema, classes=tuple(map(str, classes)))
    rows = take_proxy(examples.y, data["proxy"], generator(seed, Purpose.PROXY))
    test = examples.take(np.setdiff1d(np.arange(len(examples)), rows))
    name = Path(data["path"]).stem
    dataset = name_groups(check(DataSet(name, examples, test, num_classes)))
    schema = replace(schema, groups=dataset.attribute_names)
    nobody = [np.empty(0, np.int64)]
    federated = FederatedData(dataset, nobody, proxy=data["proxy"], seed=seed)
    return Components(configuration, federated, schema)
