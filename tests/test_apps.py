"""The Flower App, without Flower's processes; those are in tests/deploy."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp import Grid
from safetensors.numpy import load_file

import fedweight
from fedweight import apps
from fedweight.core.errors import AggregationError, ConfigurationError, DataError
from fedweight.core.module import FlatModule
from fedweight.messages import _flower
from fedweight.messages.arrays import FlatRecord
from fedweight.simulations.local import LocalGrid
from fedweight.studies.configuration import Configuration
from fedweight.studies.tables import SCHEMA

ROOT = Path(__file__).parents[1]
APP = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["flwr"]["app"]

OWN_KEYS = {"settings": "", "out": "", "num-classes": 0}

QUICK = {
    "run.rounds": 2,
    "training.epochs": 1,
    "model.name": "softmax",
    "partition.clients": 4,
}


@pytest.fixture(autouse=True)
def _identity() -> Iterator[None]:
    with _flower.task_identity(run_id=0):
        yield


@pytest.fixture(autouse=True)
def _no_cache() -> Iterator[None]:
    yield
    apps._client_app.cache_clear()
    apps._shared_components.cache_clear()


def flat(tables: dict[str, Any]) -> dict[str, Any]:
    """Flatten tables as Flower does."""
    return {
        f"{name}.{key}" if isinstance(value, dict) else name: entry
        for name, value in tables.items()
        for key, entry in (value.items() if isinstance(value, dict) else [("", value)])
    }


class FlowerLikeGrid(Grid):
    """A grid whose node ids say nothing, in another order than the clients."""

    def __init__(self, inner: LocalGrid) -> None:
        self.inner = inner
        self.asked: list[str] = []

    def get_node_ids(self) -> Iterable[int]:
        return list(reversed(list(self.inner.get_node_ids())))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        messages = list(messages)
        self.asked += [m.metadata.message_type for m in messages]
        return list(reversed(list(self.inner.send_and_receive(messages))))

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any: ...

    def create_message(self, *args: Any, **kwargs: Any) -> Message: ...

    def push_messages(self, messages: Any) -> Any: ...

    def pull_messages(self, message_ids: Any) -> Any: ...


class DeviceGrid(LocalGrid):
    """Clients that are real nodes: each has its own node config."""

    def __init__(self, node_configs: list[dict[str, Any]], run_config: Any) -> None:
        super().__init__(apps.client_app, len(node_configs), run_config)
        self.node_configs = node_configs

    def context(self, client: int) -> Context:
        if client not in self.contexts:
            node = int(list(self.get_node_ids())[client])
            self.contexts[client] = Context(
                0, node, self.node_configs[client], RecordDict(), self.run_config
            )
        return self.contexts[client]


Start = Callable[..., Path]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Run the ServerApp on a grid; return the run's folder."""

    def start(grid: Grid, run_config: dict[str, Any]) -> Path:
        given = {"out": str(tmp_path / "flower"), **run_config}
        apps.server_app(grid, Context(7, 1, {}, RecordDict(), given))
        return tmp_path / "flower"

    return start


@pytest.fixture
def sites(tmp_path: Path) -> dict[str, str]:
    """Points of three classes: a CSV file, an NPZ file and a test file."""
    rng = np.random.default_rng(0)
    paths = {}
    for name, n in (("a.csv", 60), ("b.npz", 40), ("test.csv", 90)):
        y = np.arange(n) % 3
        x = (rng.normal(size=(n, 2)) + 3 * np.eye(3)[y, :2]).astype(np.float32)
        paths[name] = str(tmp_path / name)
        if name.endswith("npz"):
            np.savez(paths[name], x=x, y=y)
        else:
            lines = [f"{a},{b},{c}" for (a, b), c in zip(x, y, strict=True)]
            Path(paths[name]).write_text("\n".join(["left,right,class", *lines]))
    return paths


# ------------------------------------------------------------------ pyproject.toml


def test_run_config_has_the_keys_and_defaults_of_a_simulation_file() -> None:
    expected: dict[str, Any] = {
        f"{table}.{key}": rule.default
        for table, rules in SCHEMA.items()
        for key, rule in rules.items()
        # Flower's run config has no lists; `settings` says such a key.
        if table != "engine" or key in ("device", "precision")
        if not isinstance(rule.default, list)
    }
    expected["run.metrics"] = ""  # But for names: a text has them between commas.
    given = flat(APP["config"])

    assert given == expected | OWN_KEYS
    for key, value in given.items():  # 1 == 1.0 == True, but not to who reads them
        assert type(value) is type((expected | OWN_KEYS)[key]), key
    assert apps._configuration(tuple(given.items())) == Configuration.of({})


def test_what_travels_is_there() -> None:
    for pattern in APP["fab-include"]:
        assert list(ROOT.glob(pattern)), f"Flower refuses {pattern}: it matches no file"
    assert APP["components"] == {
        "serverapp": f"{apps.__name__}:server_app",
        "clientapp": f"{apps.__name__}:client_app",
    }


def test_importing_the_apps_imports_neither_torch_nor_ray_nor_pandas() -> None:
    code = (
        "import sys, fedweight.apps; "
        "print([m for m in ('torch', 'ray', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


# ----------------------------------------------------------------- the same results


def test_app_gives_what_fedweight_run_gives(start: Start, tmp_path: Path) -> None:
    config = QUICK | {
        "run.seed": 3,
        "partition.clients": 20,  # the nodes decide: there are five
        "settings": "strategy.fraction-train=0.6 partition.alpha=0.2",
    }
    grid = FlowerLikeGrid(LocalGrid(apps.client_app, 5, config))
    folder = start(grid, config)
    ours = fedweight.run(
        seed=3,
        out=tmp_path / "ours",
        settings={
            **QUICK,
            "partition.clients": 5,
            "partition.alpha": 0.2,
            "strategy.fraction-train": 0.6,
            "engine.name": "local",
        },
    ).folder

    names = {path.name for path in ours.iterdir()}
    assert {path.name for path in folder.iterdir()} == names
    partition = "partition.csv"
    assert (folder / partition).read_bytes() == (ours / partition).read_bytes()
    # Our grid adds the models up as they come; Flower's brings each to the strategy.
    for name in ("rounds.csv", "clients.csv"):
        theirs, own = pd.read_csv(folder / name), pd.read_csv(ours / name)
        pd.testing.assert_frame_equal(theirs, own, rtol=1e-4, atol=1e-6)
    theirs, own = (load_file(path / "model.safetensors") for path in (folder, ours))
    for name, values in own.items():
        np.testing.assert_allclose(theirs[name], values, atol=1e-5)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["engine"]["name"] == "flower"
    assert 'name = "auto"' in (folder / "config.toml").read_text()
    assert "clients = 5\n" in (folder / "config.toml").read_text()
    assert grid.asked.count("query.identity") == 5  # each once


def test_an_app_stops_early_and_keeps_the_best_model(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = QUICK | {
        "run.rounds": 20,
        "run.stop-after": 2,
        "run.stop-delta": 0.05,
        "run.keep-best": "evaluate-loss",
    }
    grid = FlowerLikeGrid(LocalGrid(apps.client_app, 4, config))
    flowers = fedweight.Run(start(grid, config))
    settings = config | {"engine.name": "local"}
    ours = fedweight.run(out=tmp_path / "ours", settings=settings, report=False)
    assert flowers.complete
    assert flowers.rounds_done == ours.rounds_done < 20
    assert flowers.best_round == ours.best_round
    assert flowers.stopped == ours.stopped
    said = f"stopped early, after round {ours.rounds_done} of 20: evaluate-loss"
    assert said in capsys.readouterr().out


def test_an_app_refuses_to_stop_by_what_nobody_measures(
    start: Start, tmp_path: Path
) -> None:
    config = QUICK | {
        "run.stop-after": 2,
        "settings": "strategy.fraction-evaluate=0.0",
    }
    grid = FlowerLikeGrid(LocalGrid(apps.client_app, 4, config))
    with pytest.raises(
        ConfigurationError, match=r"run\.stop-metric is 'evaluate-loss'"
    ):
        start(grid, config)
    assert not (tmp_path / "flower").exists()


def test_app_runs_on_our_own_grids(start: Start) -> None:
    folder = start(LocalGrid(apps.client_app, 3, QUICK), QUICK)
    assert len((folder / "partition.csv").read_text().splitlines()) == 4


def test_a_simulated_client_has_one_thread_as_on_our_own_grids() -> None:
    import torch

    node = {"partition-id": 0, "num-partitions": 3}
    context = Context(0, 1001, node, RecordDict(), QUICK | OWN_KEYS)
    message = Message(RecordDict(), dst_node_id=1001, message_type="query.label_counts")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert not apps.client_app(message, context).has_error()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_folder_is_named_after_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = {"strategy.name": "mine.x:My", "run.name": "a/b", "run.seed": 4}
    assert apps._folder(tuple(config.items()), 99) == Path(
        "/home/somebody/fedweight-runs/a-b-my-seed4-99"
    )
    assert apps._folder((("out", "~/here"),), 99) == Path("/home/somebody/here")


def test_failed_rounds_fail_the_run(start: Start, tmp_path: Path) -> None:
    grid = LocalGrid(ClientApp(), 2, QUICK)  # answers nothing
    with pytest.raises(AggregationError, match="2 of 2 rounds failed") as error:
        start(grid, QUICK)
    assert "clients.csv" in str(error.value)
    assert (tmp_path / "flower" / "report.html").exists()


def test_what_a_reader_must_know_is_said_last(
    start: Start, sites: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = OWN | {"data.path": sites["test.csv"]}
    nodes = [{"data-path": sites["a.csv"]}, {"data-path": "/no/such.csv"}]
    folder = start(FlowerLikeGrid(DeviceGrid(nodes, config)), config)
    run = fedweight.Run(folder)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-len(run.warnings) :] == [f"warning: {w}" for w in run.warnings]
    node = run.clients["client"].max()
    assert run.warnings[0].startswith(f"client {node} failed in every round it was")
    assert "/no/such.csv" in run.warnings[0]
    assert run.environment["data"]["connected"] == sorted(set(run.clients["client"]))
    # The nodes' data are not here: nothing can be simulated with the server's alone.
    with pytest.raises(ConfigurationError, match="every node has data of its own"):
        fedweight.run(folder / "config.toml")


def test_a_node_that_comes_when_all_is_over_is_named(
    start: Start, sites: dict[str, str]
) -> None:
    class Late(FlowerLikeGrid):
        """A second node connects, and nobody asks it anything but who it is."""

        def get_node_ids(self) -> Iterable[int]:
            first, second = sorted(self.inner.get_node_ids())
            return [first, second] if self.asked.count("train") > 1 else [first]

    config = OWN | {"data.path": sites["test.csv"]}
    nodes = [{"data-path": sites["a.csv"]}, {"data-path": sites["b.npz"]}]
    folder = start(Late(DeviceGrid(nodes, config)), config)
    (line,) = fedweight.Run(folder).warnings
    assert "never took part: connected, but asked in no round" in line


def test_nothing_is_written_for_what_is_refused(start: Start, tmp_path: Path) -> None:
    config = QUICK | {"settings": "strategy.stragglers=0.5"}
    with pytest.raises(ConfigurationError, match=r"training\.epochs of 2 or more"):
        start(LocalGrid(apps.client_app, 2, config), config)
    assert not (tmp_path / "flower").exists()


@pytest.mark.parametrize("name", ["buffered", "deadline"])
def test_real_clients_are_waited_for(start: Start, tmp_path: Path, name: str) -> None:
    config = QUICK | {"settings": f"schedule.name={name}"}
    with pytest.raises(
        ConfigurationError, match=rf"schedule\.name: '{name}' is for simulated"
    ):
        start(FlowerLikeGrid(LocalGrid(apps.client_app, 2, config)), config)
    assert not (tmp_path / "flower").exists()


def test_a_flat_record_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through Ray by pickle, over HTTP by Flower's own serialisation."""
    from torch import nn

    record = FlatRecord(FlatModule(nn.Sequential(nn.Linear(3, 2))).save())

    pickled = pickle.loads(pickle.dumps(record))
    assert isinstance(pickled, FlatRecord)
    assert pickled.flat is not None
    assert pickled == record

    children = {child.object_id: child for child in record.children.values()}
    inflated = type(record.plain()).inflate(record.deflate(), children=children)
    assert dict(inflated) == dict(record.plain())


# ----------------------------------------------------------------- nodes' own data


OWN = {
    "num-classes": 3,
    "data.name": "csv",
    "model.name": "softmax",
    "run.rounds": 2,
    "training.epochs": 3,
}


def test_nodes_train_on_files_of_their_own(start: Start, sites: dict[str, str]) -> None:
    config = OWN | {"data.path": sites["test.csv"], "data.proxy": 0.1}
    nodes = [{"data-path": sites["a.csv"]}, {"data-path": sites["b.npz"]}]
    folder = start(FlowerLikeGrid(DeviceGrid(nodes, config)), config)

    run = fedweight.Run(folder)
    assert run.clients["examples"].tolist() == [48, 32] * 2
    assert run.clients["held_out_examples"].tolist() == [12, 8] * 2
    np.testing.assert_allclose(run.clients["weight"], [0.6, 0.4] * 2)
    assert run.summary()["test_accuracy"] > 0.6
    assert not (folder / "partition.csv").exists()
    assert "clients" not in run.environment["data"]


def test_proxy_and_test_examples_of_the_server_are_apart(sites: dict[str, str]) -> None:
    config = OWN | {"data.path": sites["test.csv"], "data.proxy": 0.1}
    data = apps._server_components(tuple(config.items())).data
    assert (len(data.proxy), len(data.test)) == (9, 81)
    rows = {row.tobytes() for row in data.test.x}
    assert not rows & {row.tobytes() for row in data.proxy.x}
    assert data.num_classes == 3


@pytest.mark.parametrize(
    ("node", "changes", "reason"),
    [
        ({"data-path": "a.csv"}, {"num-classes": 0}, "has a 'data-path'"),
        ({"partition-id": 0}, {}, "has no 'data-path'"),
        ({"data-path": "a.csv"}, {"num-classes": 2}, "label"),
        ({"data-path": "none.csv"}, {}, "does not exist"),
    ],
)
def test_node_that_does_not_fit_says_why(
    node: dict[str, Any], changes: dict[str, Any], reason: str, sites: dict[str, str]
) -> None:
    node = {k: sites.get(v, v) if k == "data-path" else v for k, v in node.items()}
    context = Context(0, 1001, node, RecordDict(), OWN | changes)
    message = Message(RecordDict(), dst_node_id=1001, message_type="query.label_counts")
    with pytest.raises((ConfigurationError, DataError), match=reason):
        apps.client_app(message, context)


def rewrite(path: str, columns: Callable[[list[str]], list[str]]) -> None:
    """Write a site's file with other columns."""
    rows = [line.split(",") for line in Path(path).read_text().splitlines()]
    Path(path).write_text("\n".join(",".join(columns(row)) for row in rows))


def test_a_node_puts_its_columns_in_the_servers_order(
    start: Start, sites: dict[str, str], tmp_path: Path
) -> None:
    config = OWN | {"data.path": sites["test.csv"]}
    nodes = [{"data-path": sites["a.csv"], "partition-id": 0}]
    folder = start(FlowerLikeGrid(DeviceGrid(nodes, config)), config)
    rewrite(sites["a.csv"], lambda row: [row[2], row[1], row[0]])
    config["out"] = str(tmp_path / "again")
    start(FlowerLikeGrid(DeviceGrid(nodes, config)), config)

    for name in ("rounds.csv", "clients.csv", "model.safetensors"):
        again = (tmp_path / "again" / name).read_bytes()
        assert again == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("columns", "differs"),
    [
        (
            lambda row: [row[0].replace("left", "port"), *row[1:]],
            "it lacks 'left'; it has 'port' besides",
        ),
        (lambda row: [*row[:2], row[0].replace("left", "up"), row[2]], "'up' besides"),
        (lambda row: row[1:], "it lacks 'left'"),
    ],
)
def test_a_node_with_other_columns_says_which(
    start: Start, sites: dict[str, str], columns: Any, differs: str
) -> None:
    rewrite(sites["a.csv"], columns)
    config = OWN | {"data.path": sites["test.csv"], "run.rounds": 1}
    nodes = [{"data-path": sites["a.csv"]}, {"data-path": sites["b.npz"]}]
    folder = start(FlowerLikeGrid(DeviceGrid(nodes, config)), config)

    clients = fedweight.Run(folder).clients
    bad = clients[clients["status"] == "failed"]
    assert len(bad) == 1
    (reason,) = bad["reason"]
    assert f"{sites['a.csv']} has other columns than test.csv" in reason
    assert differs in reason


def test_the_server_tells_its_columns_and_classes(sites: dict[str, str]) -> None:
    config = OWN | {"data.path": sites["test.csv"]}
    schema = apps._server_components(tuple(config.items())).schema
    assert schema is not None
    assert (schema.source, schema.label) == ("test.csv", "class")
    assert schema.columns == {"left": "number", "right": "number"}
    assert schema.classes == ("0", "1", "2")


def with_sex(path: str, names: tuple[str, str] = ("f", "m")) -> None:
    """Add a column of sex to a file, whose every third row is of the first."""
    header, *rows = Path(path).read_text().splitlines()
    rows = [f"{row},{names[bool(k % 4)]}" for k, row in enumerate(rows)]
    Path(path).write_text("\n".join([header + ",sex", *rows]) + "\n")


GROUPED = (
    'data.label="class" data.sensitive=["sex"] data.sensitive-features=false '
    "groups.positive=2"
)


def test_nodes_measure_by_the_groups_that_the_server_has(
    start: Start, sites: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "b.csv").write_bytes(Path(sites["a.csv"]).read_bytes())
    with_sex(sites["a.csv"])
    with_sex(str(tmp_path / "b.csv"), ("m", "m"))  # Its own values would be one code.
    with_sex(sites["test.csv"])
    config = OWN | {"data.path": sites["test.csv"], "settings": GROUPED}
    nodes = [{"data-path": sites["a.csv"]}, {"data-path": str(tmp_path / "b.csv")}]
    folder = start(FlowerLikeGrid(DeviceGrid(nodes, config)), config)

    groups = fedweight.Run(folder).groups
    last = groups[groups["round"] == groups["round"].max()]
    assert set(last["part"]) == {"held-out", "test"}
    own = last[last["client"].notna()]
    each = {c: rows["group"].tolist() for c, rows in own.groupby("client")}
    assert sorted(each.values()) == [["f", "m"], ["m"]]
    assert last["tpr"].notna().any()


def test_a_node_with_a_group_that_the_server_lacks_says_so(
    start: Start, sites: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "b.csv").write_bytes(Path(sites["a.csv"]).read_bytes())
    with_sex(sites["a.csv"], ("f", "x"))
    with_sex(str(tmp_path / "b.csv"))
    with_sex(sites["test.csv"])
    config = OWN | {"data.path": sites["test.csv"], "settings": GROUPED}
    config |= {"run.rounds": 1}
    nodes = [{"data-path": sites["a.csv"]}, {"data-path": str(tmp_path / "b.csv")}]
    folder = start(FlowerLikeGrid(DeviceGrid(nodes, config)), config)
    clients = fedweight.Run(folder).clients
    reasons = clients[clients["status"] == "failed"]["reason"]
    assert len(reasons) == 1
    assert all("'sex' holds 'x', which is none of 'f' and 'm'" in r for r in reasons)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"settings": 'data.classes=["a","b"]'}, "is 3, but data.classes lists 2"),
        ({"num-classes": 10**9}, "num-classes must be in"),
        ({"data.name": "digits"}, "needs a file of test examples"),
        ({"data.path": ""}, "needs a file of test examples"),
        ({"data.path": "test.csv"}, "data.path must be an absolute path"),
        ({"out": "here"}, "out must be an absolute path, got 'here'"),
        ({"num-classes": -1}, "num-classes must be a whole number"),
        ({"num-classes": "3"}, "num-classes must be a whole number"),
        ({"num-classes": 2}, "label"),
        ({"strategy.name": "fedavgg"}, "Did you mean"),
    ],
)
def test_server_says_what_it_cannot_use(
    changes: dict[str, Any], reason: str, sites: dict[str, str], start: Start
) -> None:
    config = OWN | {"data.path": sites["test.csv"]} | changes
    with pytest.raises((ConfigurationError, DataError), match=reason):
        start(DeviceGrid([{"data-path": sites["a.csv"]}], config), config)


# --------------------------------------------------------------- the nodes' numbers


class ScriptedGrid(FlowerLikeGrid):
    """Nodes that answer with what is written here: a node config, or an error."""

    def __init__(self, nodes: dict[int, dict[str, Any] | None]) -> None:
        self.nodes = nodes
        self.asked = []

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        for message in messages:
            node = message.metadata.dst_node_id
            self.asked.append(str(node))
            config = self.nodes[node]
            if config is None:
                yield Message(Error(code=5, reason="gone"), reply_to=message)
            else:
                context = Context(0, node, config, RecordDict(), {})
                yield apps.client_app(message, context)


def test_nodes_are_known_by_their_partition_or_else_their_id() -> None:
    inner = ScriptedGrid({80: {"partition-id": 1}, 90: {}, 70: None})
    grid = apps.NumberedGrid(inner)
    assert grid.get_node_ids() == [80, 90, 70]
    assert [grid.client_of(node) for node in (80, 90, 70)] == [1, 90, 70]
    inner.nodes[60] = {"partition-id": 0}
    grid.get_node_ids()
    assert grid.client_of(60) == 0
    assert inner.asked == ["70", "80", "90", "60"]


def test_a_node_that_came_back_takes_its_number_when_its_ghost_is_gone() -> None:
    inner = ScriptedGrid({80: {"partition-id": 1}})
    grid = apps.NumberedGrid(inner)
    grid.get_node_ids()
    inner.nodes[50] = {"partition-id": 1}
    grid.get_node_ids()
    assert [grid.client_of(80), grid.client_of(50)] == [1, 50]
    del inner.nodes[80]
    grid.get_node_ids()
    assert grid.client_of(50) == 1


def test_a_partition_id_that_is_no_number_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inner = ScriptedGrid({80: {"partition-id": -1}, 90: {"partition-id": 2}})
    grid = apps.NumberedGrid(inner)
    for _ in range(3):
        grid.get_node_ids()
    assert [grid.client_of(node) for node in (80, 90)] == [80, 2]
    assert grid.connected == {80, 2}
    inner.nodes[70] = {"partition-id": 2}
    for _ in range(3):
        grid.get_node_ids()
    assert [record.message for record in caplog.records] == [
        "node 80 has the partition-id -1, which is no number of a client; it goes by "
        "its node id",
        "node 70 says that it is client 2, which is still connected as another node; "
        "it goes by its node id while that lasts",
    ]


def test_the_nodes_say_how_many_clients_there_are() -> None:
    def count(*told: int | None) -> int | None:
        configs = [{"partition-id": i} for i, _ in enumerate(told)]
        for config, number in zip(configs, told, strict=True):
            if number is not None:
                config["num-partitions"] = number
        nodes: dict[int, dict[str, Any] | None] = dict(enumerate(configs, 10))
        return apps._num_partitions(apps.NumberedGrid(ScriptedGrid(nodes)))

    assert count(7, 7) == 7  # not all of them are there yet
    assert count(None) is None
    with pytest.raises(ConfigurationError, match="disagree on num-partitions"):
        count(7, 8)


# ------------------------------------------------------------------------- codecs


class WeighingGrid(FlowerLikeGrid):
    """Brings every message as bytes, as a network does, and weighs it."""

    def __init__(self, inner: LocalGrid) -> None:
        super().__init__(inner)
        self.down = self.up = 0

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        several = list(messages)
        kinds = {m.metadata.message_type for m in several}
        sent = [as_on_a_network(message) for message in several]
        replies = super().send_and_receive([m for m, _ in sent])
        come = [as_on_a_network(reply) for reply in replies]
        if kinds <= {"train", "evaluate"}:
            self.down += sum(size for _, size in sent)
            self.up += sum(size for _, size in come) if kinds == {"train"} else 0
        return [reply for reply, _ in come]


def as_on_a_network(message: Message) -> tuple[Message, int]:
    """Return a message as it arrives, and how many bytes its content took."""
    if message.has_error():
        return message, 0
    proto = recorddict_to_proto(message.content)
    content = recorddict_from_proto(proto)
    return _flower.message_of(content, message.metadata), proto.ByteSize()


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"codec.name": "bfloat16"},
        {"codec.name": "low-bits", "settings": "codec.bits=3"},
        {"strategy.name": "autoflip", "settings": "strategy.explorers=0.5"},
        {
            "strategy.name": "autoflip",
            "codec.name": "low-bits",
            "settings": "strategy.prune=0.8 codec.rounding=nearest",
        },
        {"strategy.name": "fedlex", "settings": "strategy.explore-epochs=1"},
    ],
)
def test_what_a_codec_writes_is_what_a_simulation_counts(
    start: Start, tmp_path: Path, more: dict[str, Any]
) -> None:
    wide = {"model.name": "mlp", "data.held-out": 0.1}
    config = QUICK | wide | more
    config["run.rounds"] = 1
    config["settings"] = f"{config.get('settings', '')} model.hidden=[512,128]".strip()
    grid = WeighingGrid(LocalGrid(apps.client_app, 4, config))
    folder = start(grid, config)
    local = {k: v for k, v in config.items() if k != "settings"}
    texts = [f"{key}={json.dumps(value)}" for key, value in local.items()]
    texts += str(config["settings"]).split()
    simulated = fedweight.run(
        settings=[*texts, "engine.plan=loop"],
        out=tmp_path / "simulated",
        report=False,
        progress=False,
    )
    flower = fedweight.Run(folder)
    assert flower.clients.status.tolist() == simulated.clients.status.tolist()
    # A level that is read otherwise would be much farther off than a sum's last bits.
    both = flower.folder, simulated.folder
    found, expected = (load_file(folder / "model.safetensors") for folder in both)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=3e-7)
    for column, carried in (("bytes_up", grid.up), ("bytes_down", grid.down)):
        assert flower.clients[column].tolist() == simulated.clients[column].tolist()
        assert flower.clients[column].sum() == pytest.approx(carried, rel=0.02)
