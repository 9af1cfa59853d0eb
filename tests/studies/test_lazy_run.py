"""Runs of many registered clients, of which few take part."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedweight import Run, run
from fedweight.core.errors import ConfigurationError
from fedweight.data import DataSet, Examples
from fedweight.studies.configuration import Configuration
from fedweight.studies.runner import prepare

ROOT = Path(__file__).resolve().parents[2]

LAZY: dict[str, Any] = {
    "run.rounds": 2,
    "partition.name": "dirichlet-sampled",
    "partition.clients": 1_000_000,
    "partition.examples-per-client": 12,
    "partition.size-sigma": 0.5,
    "training.epochs": 1,
    "model.name": "softmax",
    "strategy.fraction-train": 8e-6,
    "strategy.fraction-evaluate": 4e-6,
    "engine.name": "local",
}


def points() -> DataSet:
    rng = np.random.default_rng(0)
    y = np.arange(150) % 3
    x = (rng.normal(size=(150, 2)) + 3 * np.eye(3)[y, :2]).astype(np.float32)
    return DataSet("points", Examples(x[30:], y[30:]), Examples(x[:30], y[:30]), 3)


def start(out: Path, **settings: Any) -> Run:
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    return run(settings={**LAZY, **changes}, dataset=points(), out=out, report=False)


def test_the_partition_on_disk_describes_those_who_took_part(tmp_path: Path) -> None:
    result = start(tmp_path / "run")
    took_part = set(result.clients["client"])
    assert 16 < len(took_part) <= 24
    table = result.partition
    assert table["client"].is_unique
    assert set(table["client"]) == took_part
    data = prepare(Configuration.read(None, LAZY, "points"), points()).data
    for row in table.to_dict("records"):
        client = data.client(row["client"])
        counts = np.bincount(client.train.y, minlength=3)
        assert [row[f"label_{c}"] for c in range(3)] == counts.tolist()
        assert row["train_examples"] == len(client.train)
        assert row["held_out_examples"] == len(client.held_out)
    trained = result.clients.dropna(subset=["examples"])
    sizes = table.set_index("client").loc[trained["client"], "train_examples"]
    assert trained["examples"].tolist() == sizes.tolist()
    environment = json.loads((result.folder / "environment.json").read_text())
    assert environment["data"]["clients"] == 1_000_000


@pytest.mark.parametrize("setting", [{"engine__threads": 3}, {"engine__threads": 1}])
def test_threads_do_not_change_a_bit(tmp_path: Path, setting: dict[str, int]) -> None:
    a, b = start(tmp_path / "a"), start(tmp_path / "b", **setting)
    names = ("rounds.csv", "clients.csv", "partition.csv", "model.safetensors")
    for name in names:
        assert (a.folder / name).read_bytes() == (b.folder / name).read_bytes()


def test_a_client_is_the_same_among_fewer() -> None:
    small = prepare(
        Configuration.read(None, {**LAZY, "partition.clients": 16}, "points"), points()
    ).data
    large = prepare(Configuration.read(None, LAZY, "points"), points()).data
    for client in range(16):
        for half in ("train", "held_out"):
            np.testing.assert_array_equal(
                getattr(small.client(client), half).x,
                getattr(large.client(client), half).x,
            )


def test_the_written_configuration_repeats_the_run(tmp_path: Path) -> None:
    first = start(tmp_path / "a")
    again = run(
        first.folder / "config.toml", dataset=points(), out=tmp_path / "b", report=False
    )
    for name in ("clients.csv", "partition.csv"):
        written = (first.folder / name).read_bytes()
        assert (again.folder / name).read_bytes() == written


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("alpha", -1.0, r"alpha must be in \(0, inf\)"),
        ("examples-per-client", 500, "must be from 1 to 1.., .* got 500"),
        ("examples-per-client", 1.5, "must be a whole number"),
        ("size-sigma", -1.0, "size-sigma must be in"),
        ("size-sgma", 1.0, "Did you mean 'size-sigma'"),
        ("clients", 0, "needs num_clients"),
    ],
)
def test_what_is_out_of_range_is_refused(
    tmp_path: Path, key: str, value: float, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        start(tmp_path / "run", **{f"partition__{key}": value})
    assert not (tmp_path / "run").exists()


def test_the_example_runs_from_the_command_line(tmp_path: Path) -> None:
    settings = ("run.rounds=1", "strategy.fraction-train=2e-5")
    settings += ("strategy.fraction-evaluate=1e-5", "engine.name=local")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fedweight", "run", "simulations/million.toml"),
            *("--json", "--out", str(tmp_path / "run")),
            *(part for setting in settings for part in ("--set", setting)),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert json.loads(done.stdout)["rounds"] == 1
    folder = tmp_path / "run"
    table = pd.read_csv(folder / "partition.csv")
    assert len(table) == len(pd.read_csv(folder / "clients.csv")) == 30
    assert (table["train_examples"] == 40).all()
    assert (table["held_out_examples"] == 10).all()
    assert table["client"].max() > 500_000
    report = (folder / "report.html").read_text()
    assert "Which classes each client holds" in report
