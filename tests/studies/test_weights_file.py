"""Runs that begin with the weights of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict
from safetensors.torch import load_file, save_file

import fedweight
from fedweight import apps
from fedweight.core.errors import ConfigurationError, DataError
from fedweight.messages import _flower
from fedweight.simulations.local import LocalGrid

SETTINGS: dict[str, Any] = {
    "partition.clients": 4,
    "run.rounds": 1,
    "training.epochs": 1,
    "model.name": "mlp",
    "model.hidden": [8],
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(out: str, **more: Any) -> fedweight.Run:
    keys = {key.replace("__", ".").replace("_", "-"): v for key, v in more.items()}
    return fedweight.run(
        settings={**SETTINGS, **keys}, out=out, report=False, progress=False
    )


def test_a_run_goes_on_where_another_ended():
    first = run("first")
    trained = load_file(first.folder / "model.safetensors")
    # A rate of nearly nothing leaves what was begun with.
    again = run(
        "again",
        model__weights="first/model.safetensors",
        training__learning_rate=1e-9,
    )
    found = load_file(again.folder / "model.safetensors")
    for name, tensor in trained.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)
    accuracies = again.rounds.test_accuracy.tolist()
    assert accuracies[0] == first.rounds.test_accuracy.iloc[-1]
    config = (again.folder / "config.toml").read_text()
    assert f'weights = "{Path.cwd()}/first/model.safetensors"' in config
    about = json.loads((again.folder / "environment.json").read_text())["made_of"]
    assert len(about["model.weights"]) == 64


def test_the_base_of_adapters_is_that_of_the_file():
    first = run("first")
    lora = {"model__adapters": "lora", "model__rank": 2}
    lora["training__learning_rate"] = 0.02
    found = run("adapted", model__weights="first/model.safetensors", **lora)
    base = load_file(first.folder / "model.safetensors")
    trained = load_file(found.folder / "model.safetensors")
    for name, tensor in base.items():
        assert torch.equal(trained[name], tensor)
    assert found.clients.bytes_up.max() < sum(4 * t.numel() for t in base.values())


def test_what_does_not_fit_is_refused_before_anything_is_written():
    first = run("first")
    assert first.complete
    with pytest.raises(DataError, match="has shape"):
        run("other", model__weights="first/model.safetensors", model__hidden=[9])
    with pytest.raises(DataError, match="it does not exist"):
        run("other", model__weights="nowhere.safetensors")
    assert not Path("other").exists()


def test_a_run_that_goes_on_needs_the_same_file():
    first = run("first")

    class Stop(Exception):
        pass

    def stops(state: Any) -> None:
        if state.round == 2:
            raise Stop

    more = {"model.weights": "first/model.safetensors", "run.rounds": 3}
    with pytest.raises(Stop):
        fedweight.run(
            settings={**SETTINGS, **more, "run.checkpoint-rounds": 1},
            out="stopped",
            report=False,
            progress=False,
            callbacks=[stops],
        )
    path = first.folder / "model.safetensors"
    before = path.read_bytes()
    save_file({n: t + 1 for n, t in load_file(path).items()}, path)
    with pytest.raises(
        DataError, match=r"the file of model\.weights \(.*\) changed since the run"
    ):
        fedweight.resume("stopped", report=False, progress=False)
    path.write_bytes(before)
    assert fedweight.resume("stopped", report=False, progress=False).complete


def test_an_app_takes_it_by_an_absolute_path(tmp_path):
    first = run("first")
    path = (first.folder / "model.safetensors").resolve()
    config = {
        "run.rounds": 1,
        "training.epochs": 1,
        "model.name": "mlp",
        "model.weights": str(path),
        "settings": "model.hidden=[8]",
    }

    def start(out: str, **more: Any) -> fedweight.Run:
        given = {**config, **more, "out": str(tmp_path / out)}
        grid = LocalGrid(apps.client_app, 4, given)
        with _flower.task_identity(run_id=0):
            apps.server_app(grid, Context(7, 1, {}, RecordDict(), given))
        return fedweight.Run(tmp_path / out)

    found = start("flower")
    expected = run("again", model__weights=str(path))
    assert found.rounds.test_accuracy.tolist() == expected.rounds.test_accuracy.tolist()
    with pytest.raises(ConfigurationError, match=r"model\.weights must be an absolute"):
        start("relative", **{"model.weights": "first/model.safetensors"})
