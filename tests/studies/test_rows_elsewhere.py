"""Runs whose clients leave their rows on a device: those of the CPU, to rounding."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import _disable_current_modes

from fedweight import Run, run
from fedweight.clients import TrainingApp
from fedweight.clients.steps.batched import BatchedTrainer
from fedweight.clients.trial import Trials
from fedweight.core import local_models
from fedweight.core.device_updates import DeviceUpdates
from fedweight.strategies import STRATEGIES

from ..elsewhere import Elsewhere, There

NETS = """
from torch import nn


def normed(input_shape, num_classes):
    return nn.Sequential(
        nn.Linear(*input_shape, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(),
        nn.Linear(6, num_classes),
    )
"""

QUICK: dict[str, Any] = {
    "run.rounds": 2,
    "data.name": "csv",
    "data.label": "grade",
    "data.client": "school",
    "data.sensitive": ["sex"],
    "data.held-out": 0.0,
    "partition.name": "natural",
    "partition.clients": 0,
    "model.name": "own_normed:normed",
    "training.batch-size": 10,
    "training.learning-rate": 0.05,
    "engine.name": "local",
    "engine.plan": "batched-100",
}

# What a method needs, or what only takes time.
SETTINGS: dict[str, dict[str, Any]] = {
    "agnostic-fair": {"strategy.group": "sex", "run.metrics": []},
    "fedbuff": {"schedule.name": "buffered", "schedule.buffer-size": 20},
    "fedcollab": {"strategy.discriminator-rounds": 3},
    "fedlaw": {"strategy.server-epochs": 2},
    "fedlex": {"strategy.explore-epochs": 2},
    "global-group-dro": {"strategy.group": "sex"},
}
RUNS = [(name, {}) for name in sorted(STRATEGIES.entries)] + [
    ("fedavg", {"strategy.accumulate": "float64"}),  # All others' rows are added up.
    ("fedavg", {"strategy.max-update-norm": 1.0}),
    (
        "ida",
        {"strategy.per-tensor": True, "strategy.intrac": True, "strategy.fedavg": True},
    ),
]

CLIENTS = 40

# What is measured of personal models.
OWN = {"personal_loss", "personal_accuracy"}

# So often at most is something brought from the device in a round: less often than
# there are clients.
COPIES = 20


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that runs a strategy."""
    (tmp_path / "own_normed.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    # That this model may train so is known, and trying it takes half of the time.
    monkeypatch.setattr(Trials, "batched", lambda *_: "")
    rng = np.random.default_rng(0)
    lines = ["age,hours,sex,school,grade"]
    for k in range(CLIENTS * 10):
        age, hours, sex = rng.normal(), rng.normal(), rng.choice(["f", "m"])
        grade = "good" if hours + 0.3 * age + 0.02 * (k % CLIENTS) > 0.5 else "bad"
        lines.append(f"{age:.3f},{hours:.3f},{sex},s{k % CLIENTS:02},{grade}")
    lines += ["0.1,0.2,f,alone,good"]  # BatchNorm cannot train on that.
    Path("pupils.csv").write_text("\n".join(lines) + "\n")

    def begin(name: str, out: str, **settings: Any) -> Run:
        own = {**SETTINGS.get(name, {}), **settings}
        given = {**QUICK, "strategy.name": name, "data.path": "pupils.csv", **own}
        return run(settings=given, out=out, report=False)

    yield begin
    sys.modules.pop("own_normed", None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


@pytest.fixture
def leaving(monkeypatch: pytest.MonkeyPatch):
    """Let what clients train, on the CPU, be left on a device that is not there."""
    trains = BatchedTrainer.train_rows

    def train_rows(self, *arguments: Any, **named: Any):
        with _disable_current_modes():
            trained = trains(self, *arguments, **named)
        return replace(
            trained,
            rows=There(trained.rows),
            buffer_rows=There(trained.buffer_rows),
            integers={n: There(values) for n, values in trained.integers.items()},
            losses=There(trained.losses),
            correct=There(trained.correct),
        )

    stacked = local_models.StackedUpdates

    def refuse(rows: Any, *arguments: Any, **named: Any):
        assert len(rows) == 1, "rows were brought to the CPU"  # One trains alone.
        return stacked(rows, *arguments, **named)

    def leave(*, brought: bool = False) -> None:
        if not brought:
            monkeypatch.setattr(local_models, "StackedUpdates", refuse)
        monkeypatch.setattr(BatchedTrainer, "train_rows", train_rows)
        # As with an app that trains there.
        monkeypatch.setattr(TrainingApp, "thread_safe", False)

    return leave


def assert_same(found: Run, expected: Run, tolerance: float = 1e-4) -> None:
    """Compare two runs: weights, losses, accuracies and the last model."""
    near = {"rtol": tolerance, "atol": tolerance / 100}
    one, other = found.clients, expected.clients
    for column in {"weight", "train_loss", "accuracy"} | {*other} & OWN:
        np.testing.assert_allclose(one[column], other[column], **near)
    models = [load_file(f"{run.folder}/model.safetensors") for run in (found, expected)]
    for tensor, values in models[1].items():
        torch.testing.assert_close(models[0][tensor], values, **near)


IDS = ["-".join([name, *settings]).replace("strategy.", "") for name, settings in RUNS]


@pytest.mark.parametrize(("name", "settings"), RUNS, ids=IDS)
def test_a_run_is_what_it_is_on_a_cpu(name, settings, start, leaving):
    expected = start(name, "cpu", **settings)
    leaving()
    with Elsewhere() as device:
        found = start(name, "device", **settings)
    assert 0 < device.seen["down"] + device.seen["read"] <= COPIES * QUICK["run.rounds"]
    assert_same(found, expected)


# What needs models in this process's memory, or brings something else along.
BROUGHT = {
    "codec": {"codec.name": "bfloat16"},
    "personal": {"personal.name": "ditto"},
    "in-the-end": {"personal.name": "fine-tuned"},
    "kept": {"objective.name": "aldr"},
    "carried": {"objective.name": "group-dro", "objective.group": "sex"},
}


@pytest.mark.parametrize("name", BROUGHT)
def test_what_needs_models_has_all_of_them_brought_at_once(name, start, leaving):
    settings = {"strategy.accumulate": "float64", **BROUGHT[name]}
    expected = start("ida", "cpu", **settings)
    leaving(brought=True)
    with Elsewhere() as device:
        found = start("ida", "device", **settings)
    assert_same(found, expected)
    assert 0 < device.seen["down"] + device.seen["read"] < CLIENTS * QUICK["run.rounds"]


def test_without_room_there_the_cpu_does_it_which_is_told_once(
    start, leaving, monkeypatch, caplog
):
    expected = start("ida", "cpu")
    leaving(brought=True)

    def combine(self, weights):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(DeviceUpdates, "combine", combine)
    with Elsewhere(), caplog.at_level(logging.WARNING, "fedweight"):
        found = start("ida", "device")
    assert_same(found, expected)
    assert [record.getMessage() for record in caplog.records] == [
        "the server works on the clients' models on the CPU: where they trained there "
        "is no room for it (CUDA out of memory. Tried to allocate 2 GiB.)"
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fedavg", "fedce", "fedlaw", "ida"])
def test_a_run_on_a_gpu_leaves_the_rows_there(name, start, monkeypatch):
    settings = {"strategy.accumulate": "float64"}
    expected = start(name, "cpu", **settings)
    made = []
    begin = DeviceUpdates.__init__

    def note(self, models, *arguments, **named):
        made.append({model.device.type for model in models})
        begin(self, models, *arguments, **named)

    monkeypatch.setattr(DeviceUpdates, "__init__", note)
    found = start(name, "device", **settings, **{"engine.device": "cuda"})
    assert made
    assert {*map(str, made)} == {"{'cuda'}"}
    assert_same(found, expected, 1e-3)
