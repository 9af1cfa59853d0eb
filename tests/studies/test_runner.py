"""Whole runs, quickly: a few clients, a round or two, a small model."""

from __future__ import annotations

import csv
import json
import os
import random
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import (
    ArrayRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from safetensors.torch import load_file

from fedweight import Run, run
from fedweight.clients import TrainingApp
from fedweight.core.errors import (
    ConfigurationError,
    DataError,
    EngineError,
    FedweightError,
    OutputError,
)
from fedweight.data import DataSet, Examples
from fedweight.messages import _flower
from fedweight.simulations import Plan
from fedweight.simulations.planner import Choice
from fedweight.strategies import STRATEGIES
from fedweight.studies import choosing, components, recorder
from fedweight.studies import folder as folder_module
from fedweight.studies import report as report_module
from fedweight.studies.components import client_data
from fedweight.studies.configuration import Configuration
from fedweight.studies.listener import Listener
from fedweight.studies.runner import prepare

QUICK: dict[str, Any] = {
    "run.rounds": 2,
    "partition.clients": 4,
    "training.epochs": 1,
    "model.name": "softmax",
    "engine.name": "local",
}


def small_data(n: int = 120, clients: int | None = None) -> DataSet:
    """Three classes of points in the plane."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % 3
    x = (rng.normal(size=(n, 2)) + 3 * np.eye(3)[y, :2]).astype(np.float32)
    train, test = Examples(x[:-30], y[:-30]), Examples(x[-30:], y[-30:])
    natural = None if clients is None else np.arange(len(train)) % clients
    return DataSet("points", train, test, 3, natural, ("a", "b", "c"))


@pytest.fixture(scope="session")
def points() -> Callable[..., DataSet]:
    return small_data


@pytest.fixture
def quick(tmp_path: Path) -> Callable[..., Run]:
    """Run, quickly, into ``tmp_path / out``."""

    def start(out: str = "run", **arguments: Any) -> Run:
        basis = {} if "file" in arguments else QUICK
        settings = {**basis, **arguments.pop("settings", {})}
        arguments.setdefault("dataset", small_data())
        arguments.setdefault("report", False)
        return run(settings=settings, out=tmp_path / out, **arguments)

    return start


@pytest.fixture(scope="session")
def rows() -> Callable[[Path], list[dict[str, str]]]:
    """Read a CSV file."""

    def read(path: Path) -> list[dict[str, str]]:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    return read


@pytest.fixture
def own_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's, found in the working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    name = f"own_{abs(hash(str(tmp_path)))}"
    (folder / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(folder)
    yield name
    sys.modules.pop(name, None)
    if str(folder) in sys.path:
        sys.path.remove(str(folder))


OWN = '''
import math
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from fedweight.clients import Objective
from fedweight.data import DataSet, Examples
from fedweight.strategies.base import WeightingStrategy


def load(seed, *, n=60):
    y = np.arange(n) % 2
    x = np.stack([y, 1 - y], 1).astype(np.float32)
    return DataSet("own", Examples(x, y), Examples(x, y), 2)


def split(dataset, num_clients, rng, *, first=5):
    rows = rng.permutation(len(dataset.train))
    return [rows[:first], *np.array_split(rows[first:], num_clients - 1)]


def net(input_shape, num_classes, activation=nn.ReLU, width=4):
    size = math.prod(input_shape)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(size, width),
        activation(),
        nn.Linear(width, num_classes),
    )


class Scaled(Objective):
    def __init__(self, factor=2.0):
        self.factor = factor

    def batch_loss(self, outputs, batch, facts):
        return self.factor * F.cross_entropy(outputs, batch.y)


class First(WeightingStrategy):
    """Only the first client counts, by a share."""

    share: float = 1.0

    def weights(self, round):
        weights = torch.zeros(round.num_clients, dtype=torch.float64)
        weights[0] = self.share
        return weights


class Sometimes(Objective):
    """Breaks for a client whose examples are all of class 1, or for all clients."""

    def __init__(self, how="raise", everybody=False):
        self.how, self.everybody = how, everybody

    def batch_loss(self, outputs, batch, facts):
        loss = F.cross_entropy(outputs, batch.y)
        if not self.everybody and int((batch.y == 1).sum()) != len(batch.y):
            return loss
        if self.how == "raise":
            raise ValueError('it has, as they say, "no way",\\nand no second line')
        return loss * math.nan
'''


SAME = ("rounds.csv", "clients.csv", "partition.csv", "config.toml")
SAME += ("model.safetensors",)


def content(result):
    return {name: (result.folder / name).read_bytes() for name in SAME}


def test_the_folder_has_what_the_design_says(quick):
    result = quick()
    names = {path.name for path in result.folder.iterdir()}
    assert names == {*SAME, "environment.json", "timings.csv"}
    assert result.summary()["rounds"] == 2
    environment = json.loads((result.folder / "environment.json").read_text())
    assert environment["engine"]["name"] == "local"
    assert environment["data"]["name"] == "points"
    assert environment["model"]["parameters"] == 9


def test_the_report_is_written_where_it_is_wanted(quick):
    folder = quick(report=True).folder
    assert (folder / "report.html").stat().st_size > 1000
    # What may be removed to make room for another run.
    assert {path.name for path in folder.iterdir()} <= set(folder_module.FILES)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(quick):
    first = content(quick("a", seed=3))
    assert content(quick("b", seed=3)) == first
    other = content(quick("c", seed=4))
    for name in SAME:
        assert other[name] != first[name], name


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_bit(quick, threads):
    settings = {"partition.clients": 7}
    one = content(quick("one", settings={**settings, "engine.threads": 1}))
    more = content(quick("more", settings={**settings, "engine.threads": threads}))
    del one["config.toml"], more["config.toml"]
    assert one == more


def test_the_written_configuration_repeats_the_run(tmp_path):
    settings = ["run.rounds=1", "training.epochs=1", "partition.clients=3"]
    first = run(settings=settings, strategy="ida", out=tmp_path / "a", report=False)
    again = run(first.folder / "config.toml", out=tmp_path / "b", report=False)
    assert content(first) == content(again)


def test_the_tables_say_what_happened(quick, rows):
    result = quick(settings={"run.rounds": 3})
    rounds, clients = (
        rows(result.folder / "rounds.csv"),
        rows(result.folder / "clients.csv"),
    )
    partition = rows(result.folder / "partition.csv")
    assert [row["round"] for row in rounds] == ["0", "1", "2", "3"]
    assert [row["ok"] for row in rounds] == ["0", "4", "4", "4"]
    assert all(row["status"] == "ok" for row in rounds)
    assert len(clients) == 3 * 4
    for number in (1, 2, 3):
        part = [row for row in clients if row["round"] == str(number)]
        sizes = np.array([int(row["examples"]) for row in part])
        weights = [float(row["weight"]) for row in part]
        np.testing.assert_allclose(weights, sizes / sizes.sum(), atol=1e-12)
        assert sizes.tolist() == [int(row["train_examples"]) for row in partition]
        accuracies = [float(row["accuracy"]) for row in part]
        assert float(rounds[number]["client_accuracy_mean"]) == pytest.approx(
            np.mean(accuracies)
        )
        assert rounds[number]["bytes_up"] == str(4 * 9 * 4)
    for row in partition:
        labels = [int(row[f"label_{c}"]) for c in range(3)]
        assert sum(labels) == int(row["train_examples"])


def test_the_model_on_disk_is_the_one_that_was_tested(quick, points, rows):
    result = quick()
    state = load_file(result.folder / "model.safetensors")
    test = points().test
    logits = torch.from_numpy(test.x) @ state["linear.weight"].T + state["linear.bias"]
    accuracy = float((logits.argmax(1) == torch.from_numpy(test.y)).double().mean())
    assert float(rows(result.folder / "rounds.csv")[-1]["test_accuracy"]) == accuracy


def test_progress_is_told_after_every_round(quick):
    seen = []
    result = quick(progress=seen.append, settings={"run.evaluate-every": 2})
    assert [(p.round, p.rounds) for p in seen] == [(0, 2), (1, 2), (2, 2)]
    assert [np.isnan(p.accuracy) for p in seen] == [False, True, False]
    assert seen[-1].accuracy == result.summary()["test_accuracy"]
    assert seen[0].seconds <= seen[1].seconds <= seen[2].seconds


def test_evaluate_every_includes_the_last_round(quick, rows):
    result = quick(settings={"run.rounds": 5, "run.evaluate-every": 3})
    tested = [
        row["round"]
        for row in rows(result.folder / "rounds.csv")
        if row["test_accuracy"]
    ]
    assert tested == ["0", "3", "5"]


def test_an_interrupted_run_can_be_read(quick, tmp_path):
    def stop(progress):
        if progress.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick(progress=stop, settings={"run.rounds": 4})
    whole = quick("whole", settings={"run.rounds": 2})
    stopped = Run(tmp_path / "run")
    assert stopped.rounds_done == 2
    assert not stopped.complete
    for name in ("rounds.csv", "clients.csv", "partition.csv", "model.safetensors"):
        assert (stopped.folder / name).read_bytes() == (
            whole.folder / name
        ).read_bytes()
    assert not list(stopped.folder.glob("*.part"))
    assert not list(stopped.folder.glob(".*"))


def test_a_folder_with_something_in_it_is_refused(quick, tmp_path):
    (tmp_path / "run").mkdir()
    quick()  # an empty one is taken
    before = content(Run(tmp_path / "run"))
    with pytest.raises(ConfigurationError, match="not an empty folder"):
        quick(seed=9)
    assert content(Run(tmp_path / "run")) == before


def test_a_run_is_replaced_where_that_is_asked_for(quick, tmp_path):
    before = content(quick())
    (tmp_path / "run" / "errors.log").write_text("of the former run")
    after = quick(seed=9, overwrite=True)
    assert content(after) != before
    assert not (tmp_path / "run" / "errors.log").exists()
    assert content(quick(seed=9, out="other", overwrite=True)) == content(after)
    (tmp_path / "run" / "mine.txt").touch()
    with pytest.raises(
        ConfigurationError, match=r"has mine\.txt\. Nothing was removed"
    ):
        quick(overwrite=True)
    assert after.complete


def test_a_refused_run_removes_nothing(quick, tmp_path):
    before = content(quick())
    with pytest.raises(ConfigurationError):
        quick(overwrite=True, settings={"strategy.name": "nope"})
    assert content(Run(tmp_path / "run")) == before


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="looks at open files")
@pytest.mark.parametrize("table", ["clients.csv", "environment.json", "config.toml"])
def test_a_full_disk_leaves_whole_files(quick, tmp_path, monkeypatch, table):
    sync, opened = os.fsync, Path.open

    def full(descriptor):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        if name == f".{table}.part" and table != "clients.csv":
            raise OSError(28, "No space left on device")
        sync(descriptor)

    def full_where_it_grows(path, mode="r", *given, **named):
        if mode == "ab" and path.name == table:
            raise OSError(28, "No space left on device")
        return opened(path, mode, *given, **named)

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(Path, "open", full_where_it_grows)
    with pytest.raises(OutputError, match=f"{table} cannot be written: No space left"):
        quick()
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not [name for name in left if name.startswith(".")]
    if table == "clients.csv":
        assert Run(tmp_path / "run").clients.empty  # as it was before
        assert {"rounds.csv", "model.safetensors", "environment.json"} <= left


def test_what_stopped_a_run_is_not_hidden_by_a_full_disk(
    quick, tmp_path, monkeypatch, caplog
):
    def stop(progress):
        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick(progress=stop)
    assert "cannot be written: No space left" in caplog.text
    assert not list((tmp_path / "run").glob(".*"))


def test_an_interrupt_at_any_time_leaves_a_folder_that_can_be_read(
    quick, tmp_path, monkeypatch
):
    """Also before the first round, and while the report is written."""
    whole = folder_module.write_whole
    for number, name in enumerate(["environment.json", "partition.csv", "report.html"]):

        def interrupted(path, data, name=name):
            if path.name == name:
                monkeypatch.setattr(folder_module, "write_whole", whole)
                raise KeyboardInterrupt
            whole(path, data)

        for module in (folder_module, recorder, report_module):
            monkeypatch.setattr(module, "write_whole", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            quick(out=str(number), report=True)
        (note,) = caught.value.__notes__
        assert note.startswith(f"What was recorded is in {tmp_path / str(number)}. ")
        for module in (recorder, report_module):
            monkeypatch.setattr(module, "write_whole", whole)
        assert Run(tmp_path / str(number)).report().is_file()


@pytest.mark.parametrize(
    "settings",
    [
        {"run.rounds": 0},
        {"strategy.name": "fedavgg"},
        {"strategy.stragglers": 2.0},
        {"strategy.name": "feddisco", "strategy.a": -1.0},
        {"objective.name": "proximal", "objective.mu": -1.0},
        {"partition.alpha": -1.0},
        {"partition.name": "natural"},
        {"model.name": "cnn"},
        {"engine.device": "banana"},
        {"engine.device": "cuda:99"},
        {"server.name": "adam", "strategy.name": "flwr.serverapp.strategy:FedAvg"},
        {"server.name": "adam", "server.tau": 0.0},
        {"server.name": "builtins:dict"},
        {"server.name": "fedweight.clients.objectives:Plain"},
        {"strategy.min-replies": 5000},
        {"engine.address": "127.0.0.1:9"},
        {"engine.workers": 3},
        {"engine.gpus-per-worker": 0.5},
        {"engine.name": "ray", "engine.address": "nowhere"},
        {"data.proxy": 0.0, "strategy.name": "fedlaw"},
    ],
    ids=str,
)
def test_nothing_is_written_for_what_is_refused(quick, tmp_path, settings):
    with pytest.raises((ConfigurationError, DataError, EngineError)):
        quick(settings=settings)
    assert not (tmp_path / "run").exists()


def test_bad_data_are_refused_before_anything_is_written(quick, tmp_path):
    x, y = np.zeros((9, 2), np.float32), np.zeros(9, np.int64)
    hole = x.copy()
    hole[4, 1] = np.nan
    for part in (Examples(hole, y), Examples(x, y + 7)):
        with pytest.raises(DataError):
            quick(dataset=DataSet("bad", part, part, 3))
    with pytest.raises(DataError):
        quick(dataset=None, settings={"data.name": "csv", "data.path": "/no/such.csv"})
    assert not (tmp_path / "run").exists()


def test_data_of_ones_own_are_named_in_what_is_written(quick):
    result = quick(settings={"data.held-out": 0.3})
    config = tomllib.loads((result.folder / "config.toml").read_text())
    assert config["data"] == {
        "name": "points",
        "path": "",
        "held-out": 0.3,
        "proxy": 0.02,
        "validation": 0.0,
    }
    assert result.summary()["data"] == "points"
    # What was written repeats the run, with the same data.
    again = quick("again", file=result.folder / "config.toml")
    assert content(again) == content(result)


def test_a_file_that_cannot_repeat_its_run_says_so(quick, tmp_path):
    file = quick().folder / "config.toml"
    assert file.read_text().startswith("# This file alone does not repeat its run: ")
    with pytest.raises(ConfigurationError, match="were given in Python") as caught:
        run(file, out=tmp_path / "again")
    assert "dataset=..." in str(caught.value)
    assert not (tmp_path / "again").exists()
    # With other data it is a simulation file like any other.
    digits = {"data.name": "digits", "run.rounds": 1}
    other = run(file, out=tmp_path / "digits", settings=digits, report=False)
    assert other.config["data"]["name"] == "digits"
    assert "#" not in (other.folder / "config.toml").read_text()


# Names, seeds and notes.


def sited():
    """Points of four sites, of which the last has one example."""
    data = small_data()
    n = len(data.train)
    sites = np.array(["north", "south", "west"])[np.arange(n) % 3].astype("<U9")
    sites[5] = 'a, "b"'
    return replace(data, natural_clients=sites)


def test_clients_names_are_in_the_table_of_who_has_what(quick, rows):
    result = quick(dataset=sited(), settings=NATURAL)
    table = rows(result.folder / "partition.csv")
    assert list(table[0])[:3] == ["client", "name", "train_examples"]
    assert [row["name"] for row in table] == ['a, "b"', "north", "south", "west"]
    assert [row["client"] for row in table] == ["0", "1", "2", "3"]
    assert result.partition["name"].tolist() == ['a, "b"', "north", "south", "west"]
    plain = rows(quick("plain").folder / "partition.csv")
    assert list(plain[0])[:2] == ["client", "train_examples"]


def test_names_that_are_numbers_stay_as_they_are_written(quick):
    data = replace(small_data(), natural_clients=np.arange(90) % 3 * 1000 + 2020)
    result = quick(dataset=data, settings=NATURAL)
    assert result.partition["name"].tolist() == ["2020", "3020", "4020"]


def test_two_runs_may_differ_in_the_partition_only(quick):
    one, other = (
        quick(str(seed), settings={"partition.seed": seed, "run.seed": 5})
        for seed in (1, 2)
    )
    assert content(one)["partition.csv"] != content(other)["partition.csv"]
    parts = [prepare(r_config(r), small_data()) for r in (one, other)]
    first, second = (part.make_model().state_dict() for part in parts)
    assert all(torch.equal(first[name], second[name]) for name in first)
    # The same partition whatever the run's seed.
    again = quick("again", settings={"partition.seed": 1, "run.seed": 6})
    assert content(one)["partition.csv"] == content(again)["partition.csv"]
    assert content(one)["clients.csv"] != content(again)["clients.csv"]


def r_config(result):
    return Configuration.read(result.folder / "config.toml", (), "points")


def test_two_runs_may_differ_in_the_initial_model_only(quick, rows):
    results = [
        quick(str(seed), settings={"model.seed": seed, "run.seed": 5})
        for seed in (1, 2)
    ]
    parts, losses = zip(
        *(
            (
                content(result)["partition.csv"],
                rows(result.folder / "rounds.csv")[0]["test_loss"],
            )
            for result in results
        ),
        strict=True,
    )
    assert parts[0] == parts[1]
    assert losses[0] != losses[1]
    same = quick("same", settings={"model.seed": 5, "run.seed": 5})
    usual = content(quick("usual", settings={"run.seed": 5}))
    assert content(same)["rounds.csv"] == usual["rounds.csv"]


def test_the_seed_of_a_partition_draws_the_test_rows_of_a_file_too(tmp_path):
    path = tmp_path / "own.csv"
    body = "".join(f"{i},{i % 2}\n" for i in range(60))
    path.write_text("a,y\n" + body)
    given = {"data": {"name": "csv", "path": str(path)}, "partition": {"seed": 1}}
    seen = []
    for run_seed in (0, 1):
        configuration = Configuration.of({**given, "run": {"seed": run_seed}})
        data = prepare(configuration).data
        seen.append((data.test.x.tobytes(), data.client(3).train.x.tobytes()))
    assert seen[0] == seen[1]


def test_notes_on_the_data_are_in_the_environment(quick):
    assert quick("usual").environment["data"]["notes"] == []
    data = small_data()
    wide = data.train.x * np.array([1, 1e5], np.float32)
    data = replace(data, train=replace(data.train, x=wide))
    (note,) = quick(dataset=data).environment["data"]["notes"]
    assert note.startswith("feature '1' is ")


# Clients that fail.


def skewed():
    """Client 0 has class 0 only, and nobody else has it."""
    y = np.repeat([0, 1, 2], 20)
    x = np.eye(3, dtype=np.float32)[y]
    return DataSet("skewed", Examples(x, y), Examples(x, y), 3, np.array(y))


NATURAL = {
    "partition.name": "natural",
    "partition.clients": 0,
    "data.proxy": 0.0,
    "data.held-out": 0.0,
}


@pytest.mark.parametrize(
    ("how", "status", "reason"),
    [
        ("raise", "failed", 'ValueError: it has, as they say, "no way",'),
        ("nan", "rejected", "its model has NaN or infinite values"),
    ],
)
def test_a_client_that_fails_is_recorded_and_the_run_goes_on(
    quick, rows, own_things, how, status, reason
):
    settings = {
        **NATURAL,
        "objective.name": f"{own_things}:Sometimes",
        "objective.how": how,
    }
    result = quick(dataset=skewed(), settings=settings)
    clients = rows(result.folder / "clients.csv")
    clients = [row for row in clients if row["status"] != "evaluated"]
    bad = [row for row in clients if row["client"] == "1"]
    assert [row["status"] for row in bad] == [status, status]
    assert all(reason in row["reason"] for row in bad), bad[0]["reason"]
    assert all("\n" not in row["reason"] for row in bad)
    assert all(row["weight"] == "" for row in bad)
    good = [row for row in clients if row["client"] != "1"]
    assert [row["weight"] for row in good] == ["0.5"] * 4
    lost = result.warnings[0]
    assert lost.startswith("client 1 failed in every round it was asked (2 rounds): ")
    assert reason in lost
    errors = result.folder / "errors.log"
    assert errors.is_file() == (how == "raise")  # A line is no text of its own.
    if how == "raise":
        text = errors.read_text()
        assert text.startswith("2 x, rounds 1 and 2, client 1:\n")
        assert "and no second line" in text
        assert text.count("Traceback (most recent call last)") == 1
    rounds = rows(result.folder / "rounds.csv")
    assert [row[status] for row in rounds] == ["0", "1", "1"]
    assert [row["status"] for row in rounds] == ["ok"] * 3
    assert result.summary()["bad_replies"] == 2


class Reshaping(TrainingApp):
    """Client 1 sends another shape, and a nonsense number of steps."""

    def __call__(self, message, context: Context):
        reply = super().__call__(message, context)
        if message.metadata.message_type != "train":
            return reply
        reply.content["metrics"]["num-steps"] = float("nan")
        reply.content["metrics"]["status"] = 7.0
        reply.content["metrics"]["weight"] = 9.0
        if context.node_config["partition-id"] == 1:
            reply.content["arrays"] = ArrayRecord({"linear.weight": torch.zeros(2)})
        return reply


def test_another_shape_and_odd_metrics_are_recorded(quick, rows, monkeypatch):
    monkeypatch.setattr(components, "TrainingApp", Reshaping)
    result = quick(dataset=skewed(), settings=NATURAL)
    clients = rows(result.folder / "clients.csv")
    clients = [row for row in clients if row["status"] != "evaluated"]
    assert [row["status"] for row in clients] == ["ok", "rejected", "ok"] * 2
    assert "linear.bias" in clients[1]["reason"]
    assert [row["weight"] for row in clients[:3]] == ["0.5", "", "0.5"]
    assert clients[0]["steps"] == ""


def test_a_round_without_a_good_reply_keeps_the_model(quick, rows, own_things):
    settings = {
        **NATURAL,
        "objective.name": f"{own_things}:Sometimes",
        "objective.everybody": True,
        "objective.how": "nan",
    }
    result = quick(dataset=skewed(), settings=settings)
    rounds = rows(result.folder / "rounds.csv")
    assert [row["status"] for row in rounds] == ["ok", "failed", "failed"]
    assert "0 good replies of 3" in rounds[1]["reason"]
    assert len({row["test_loss"] for row in rounds}) == 1
    assert result.summary()["failed_rounds"] == 2
    configuration = Configuration.read(result.folder / "config.toml", (), "skewed")
    initial = prepare(configuration, skewed()).make_model().state_dict()
    kept = load_file(result.folder / "model.safetensors")
    assert all(torch.equal(kept[name], initial[name]) for name in initial)


# What can be chosen.


def test_only_some_clients_take_part(quick, rows):
    settings = {"partition.clients": 6, "strategy.fraction-train": 0.5}
    result = quick(settings={**settings, "run.rounds": 4})
    weights = result.weights
    assert weights.notna().sum(axis=1).tolist() == [3, 3, 3, 3]
    assert weights.notna().any(axis=0).sum() > 3  # not always the same ones
    assert {row["status"] for row in rows(result.folder / "clients.csv")} == {
        "ok",
        "evaluated",
    }


def test_natural_clients_are_all_there(quick, points):
    settings = {"partition.name": "natural", "partition.clients": 0}
    result = quick(dataset=points(clients=5), settings=settings)
    assert result.weights.shape == (2, 5)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_server_optimiser_changes_the_course(quick, name):
    plain = load_file(quick("plain").folder / "model.safetensors")
    result = quick(name, settings={"server.name": name})
    other = load_file(result.folder / "model.safetensors")
    assert not torch.equal(plain["linear.weight"], other["linear.weight"])


def test_stragglers_do_less_and_may_be_dropped(quick, rows):
    settings = {"strategy.stragglers": 0.5, "training.epochs": 4}
    kept = quick("kept", strategy="fedprox", settings=settings)
    settings["strategy.drop-stragglers"] = True
    dropped = quick("dropped", strategy="fedavg", settings=settings)
    steps = [
        [int(row["steps"]) / -(-int(row["examples"]) // 16) for row in part]
        for part in (rows(result.folder / "clients.csv") for result in (kept, dropped))
    ]
    assert steps[0] == steps[1]  # the seed alone decides who
    assert sorted(set(steps[0]))[-1] == 4
    slow = [epochs < 4 for epochs in steps[0]]
    assert sum(slow) == 4  # two of four, in two rounds
    for result, status in ((kept, "ok"), (dropped, "dropped")):
        clients = rows(result.folder / "clients.csv")
        assert {r["status"] for r, s in zip(clients, slow, strict=True) if s} == {
            status
        }


@pytest.mark.parametrize("strategy", sorted(STRATEGIES.entries))
def test_every_strategy_runs(quick, strategy):
    result = quick(strategy=strategy, settings={"data.proxy": 0.2})
    assert result.summary()["failed_rounds"] == 0
    assert result.summary()["bad_replies"] == 0
    assert result.weights.notna().all(axis=None)


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy.name": "FedMedian", "strategy.fraction-train": 1.0},
        {"strategy.name": "Krum", "strategy.num-malicious-nodes": 1},
        {"strategy.name": "FedTrimmedAvg", "strategy.beta": 0.25},
        {"strategy.name": "FedAdam", "strategy.eta": 0.5},
        {"strategy.name": "FedAvg", "strategy.fraction-evaluate": 0.0},
    ],
    ids=lambda settings: settings["strategy.name"],
)
def test_flowers_own_strategies_run_with_their_options(quick, settings):
    name = settings["strategy.name"]
    result = quick(
        settings={**settings, "strategy.name": f"flwr.serverapp.strategy:{name}"}
    )
    assert result.rounds_done == 2
    first, last = result.accuracy.iloc[0], result.accuracy.iloc[-1]
    assert last != first
    key = next(key for key in settings if key != "strategy.name").split(".")[1]
    assert key in result.config["strategy"]


def test_flowers_own_strategies_repeat_from_the_seed(quick):
    """They draw clients from the process's own stream."""
    settings = {
        "strategy.name": "flwr.serverapp.strategy:FedAvg",
        "strategy.fraction-train": 0.5,
    }
    random.seed(1)
    first = quick("first", settings=settings).model()
    random.seed(2)
    before = random.getstate()
    again = quick(settings=settings).model()
    assert random.getstate() == before
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_model_of_which_nothing_is_trained_is_refused(quick, tmp_path, monkeypatch):
    (tmp_path / "still.py").write_text(
        "from torch import nn\n\n"
        "def model(input_shape, num_classes):\n"
        "    return nn.Linear(2, num_classes).requires_grad_(False)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError, match="no parameter that is trained"):
        quick(settings={"model.name": "still:model"})


def test_ones_own_things_run(quick, own_things):
    settings = {
        "data.name": f"{own_things}:load",
        "data.n": 90,
        "data.proxy": 0.0,
        "data.held-out": 0.0,
        "partition.name": f"{own_things}:split",
        "partition.first": 7,
        "model.name": f"{own_things}:net",
        "model.width": 6,
        "objective.name": f"{own_things}:Scaled",
        "objective.factor": 0.5,
        "strategy.name": f"{own_things}:First",
        "strategy.share": 0.25,
        "strategy.fraction-evaluate": 0.0,
    }
    result = quick(dataset=None, settings=settings)
    assert result.partition["train_examples"].tolist() == [7, 28, 28, 27]
    assert result.weights.to_numpy().tolist() == [[0.25, 0, 0, 0]] * 2
    assert result.model()["1.weight"].shape == (6, 2)
    again = run(
        result.folder / "config.toml",
        out=result.folder.parent / "again",
        report=False,
    )
    assert content(again) == content(result)


def test_strategies_that_are_not_ours_lose_nobody_in_silence(
    quick, rows, monkeypatch, caplog
):
    class Moody(TrainingApp):
        answers_cohorts = False

        def __call__(self, message, context):
            client = context.node_config["partition-id"]
            if message.metadata.message_type == "train" and client == 1:
                raise ValueError("not today\n\x1b[2J")
            return super().__call__(message, context)

    monkeypatch.setattr(components, "TrainingApp", Moody)
    result = quick(settings={"strategy.name": "flwr.serverapp.strategy:FedAvg"})
    clients = rows(result.folder / "clients.csv")
    assert [row["status"] for row in clients] == ["ok", "failed", "ok", "ok"] * 2
    assert clients[1]["reason"] == "client 1, train: ValueError: not today"
    assert caplog.text.count("not today") == 1
    text = (result.folder / "errors.log").read_text()
    assert "2 x, rounds 1 and 2, client 1:" in text
    assert "Traceback" in text
    assert "\x1b" not in text
    assert result.warnings[0].startswith("client 1 failed in every round it was asked")


def test_what_a_strategy_that_is_not_ours_asks_and_gets_is_recorded():
    records: list[Any] = []
    names = ["Bern", "1", "2"]
    listener = Listener(records, lambda node: node - 10, names.__getitem__)
    with _flower.task_identity(run_id=0):
        sent = RecordDict({"arrays": ArrayRecord([np.zeros(5, np.float32)])})
        asked = [Message(sent, node, "train") for node in (10, 11, 12)]
        for number, message in enumerate(asked):
            _flower.set_message_id(message, f"message-{number}")
        listener.asks(lambda *_: iter(asked))(1)
        metrics = {"num-examples": 7, "train-accuracy": 87.5, "weight": 3.0}
        told = RecordDict({**dict(sent), "metrics": MetricRecord(metrics)})
        good = Message(told, reply_to=asked[0])
        lost = Message(Error(5, "Node Unavailable"), reply_to=asked[1])
    # The SuperLink answers in its place.
    lost.metadata.__dict__["_src_node_id"] = 1
    assert listener.hears(lambda *_: (None, None))(1, iter([good, lost])) == (
        None,
        None,
    )
    (record,) = records
    assert [(c.client, c.name, c.status) for c in record.clients] == [
        (0, "Bern", "ok"),
        (1, "", "missing"),
        (2, "", "missing"),
    ]
    assert record.clients[1].reason == "no reply: the node is not connected any more"
    assert record.clients[0].metrics == {"num-examples": 7}
    assert record.clients[0].own_metrics == {"train-accuracy": 87.5, "weight": 3.0}
    one = sent["arrays"]["0"].numpy().nbytes
    assert [(c.bytes_down, c.bytes_up) for c in record.clients] == [
        (one, one),
        (one, 0),
        (one, 0),
    ]
    assert record.status == "failed"


# A real node has its own file.


def node(**config):
    return Context(0, 77, config, RecordDict(), {})


def test_a_node_with_a_file_of_its_own_reads_it_as_the_configuration_says(tmp_path):
    table = tmp_path / "mine.csv"
    lines = [f"{'sick' if i % 2 else 'well'},{i},{i / 10}" for i in range(10)]
    table.write_text("\n".join(["state,a,b", *lines]) + "\n")
    configuration = Configuration.of(
        {
            "data": {
                "name": "csv",
                "path": "unused.csv",
                "label": "state",
                "classes": ["well", "sick"],
                "held-out": 0.3,
            }
        }
    )
    data = client_data(configuration, node(**{"data-path": str(table)}), None)
    assert (len(data.train), len(data.held_out)) == (7, 3)
    assert data.train.x.shape == (7, 2)
    assert data.train.y.tolist() == [int(i) % 2 for i in data.train.x[:, 0]]


def test_a_node_may_have_arrays(tmp_path):
    file = tmp_path / "mine.npz"
    np.savez(file, x=np.ones((5, 2), np.float32), y=np.array([0, 1, 2, 1, 0]))
    configuration = Configuration.of({"data": {"held-out": 0.2}})
    data = client_data(configuration, node(**{"data-path": str(file)}), None)
    assert (len(data.train), len(data.held_out)) == (4, 1)


def test_a_node_with_neither_is_told_what_to_do(points):
    components = prepare(Configuration.of({}), points())
    for federated in (None, components.data):
        with pytest.raises(ConfigurationError, match="'partition-id' nor 'data-path'"):
            client_data(components.configuration, node(), federated)
    part = components.client_data(node(**{"partition-id": 2}))
    np.testing.assert_array_equal(part.train.x, components.data.client(2).train.x)


def test_every_refusal_is_an_error_of_ours(quick):
    with pytest.raises(FedweightError):
        quick(settings={"strategy.name": "nope"})
    with pytest.raises(DataError, match=r"dataset must be a fedweight.data.DataSet"):
        run(dataset=[1, 2])


def test_a_measured_plan_is_written_and_repeats_the_run(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "WORTH_MEASURING", 0.0)
    measured = Choice("cpu", Plan(3), {"by": "a measurement"})
    monkeypatch.setattr(choosing, "choose_plan", lambda *_, **__: measured)
    # Of fewer than ten nobody would try many at once.
    first = quick(settings={"partition.clients": 12})
    assert first.config["engine"]["plan"] == "batched-3"
    monkeypatch.setattr(choosing, "choose_plan", None)  # It must not be asked again.
    file = first.folder / "config.toml"
    settings = {"data.name": "digits"}  # What the file names is not to be loaded.
    again = quick(out="again", file=file, settings=settings)
    for name in ("rounds.csv", "clients.csv", "model.safetensors"):
        assert (first.folder / name).read_bytes() == (again.folder / name).read_bytes()


def test_the_servers_own_arithmetic_does_not_depend_on_threads(quick):
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(
                quick(out=str(threads), strategy="fedlaw", settings={"data.proxy": 0.2})
            )
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    for name in ("rounds.csv", "clients.csv", "model.safetensors"):
        a, b = ((r.folder / name).read_bytes() for r in results)
        assert a == b


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"strategy.min-train-nodes": 5000}, "strategy.min-train-nodes is 5000"),
        ({"strategy.stragglers": 0.5, "training.epochs": 1}, "strategy.stragglers"),
        ({"strategy.min-train-nodes": -3}, "min-train-nodes must be in"),
        ({"model.name": "char-gru"}, "model.name: 'char-gru' cannot take an example"),
        (
            {"server.name": "adam", "server.learning-rate": 0.0},
            r"server\.learning-rate must",
        ),
        (
            {"strategy.name": "fedprox", "strategy.proximal-mu": 38.0},
            r"strategy\.proximal-mu must be below 38, got 38",
        ),
        (
            {"objective.name": "proximal", "objective.mu": 500.0},
            r"objective\.mu must be below 38, got 500",
        ),
        ({"engine.address": "auto"}, r"engine\.address is 'auto'.*'local'"),
        ({"engine.plan": "batched-²"}, "engine.plan must be"),
        (
            {"server.name": "collections:ChainMap"},
            r"\[server\]: .*is ChainMap, which is not derived",
        ),
        ({"objective.name": "collections:ChainMap"}, r"\[objective\]: .*not derived"),
        (
            {"model.hidden": [10**9], "model.name": "mlp"},
            "GB of memory, more than this",
        ),
        ({"partition.clients": 10**6}, "'dirichlet' gives each of .* at most"),
        ({"partition.name": "torch:zeros"}, "partition.name 'torch:zeros'"),
        ({"model.name": "torch.nn:Linear"}, "model 'torch.nn:Linear' cannot be made"),
        (
            {
                "partition.name": "dirichlet-sampled",
                "partition.clients": 10**8,
                "partition.examples-per-client": 5,
            },
            "strategy.fraction-train is 1, which asks 100,000,000 clients",
        ),
    ],
)
def test_what_could_only_fail_later_is_refused_first(quick, tmp_path, settings, key):
    with pytest.raises(ConfigurationError, match=key):
        quick(settings=settings)
    assert not (tmp_path / "run").exists()
