"""Runs that compute in another precision: told, kept, and the same on any workers."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedweight import run
from fedweight.core import precision
from fedweight.core.errors import ConfigurationError
from fedweight.simulations.plan import Plan
from fedweight.simulations.planner import Choice
from fedweight.studies import choosing, runner

SETTINGS = {
    "run.rounds": 2,
    "partition.clients": 6,
    "training.epochs": 1,
    "model.hidden": [8],
    "engine.name": "local",
    "engine.plan": "batched-3",
    "engine.precision": "bf16",
}


def made(out, **settings):
    told = {key.replace("__", "."): value for key, value in settings.items()}
    result = run(settings={**SETTINGS, **told}, out=out, report=False)
    weights = load_file(out / "model.safetensors")
    return result, np.concatenate([w.ravel() for w in weights.values()])


def test_a_run_tells_its_precision_and_has_bits_of_its_own(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "fedweight"):
        result, coarse = made(tmp_path / "coarse")
        _, fine = made(tmp_path / "fine", engine__precision="fp32")
    assert not caplog.records
    assert 'precision = "bf16"' in (result.folder / "config.toml").read_text()
    environment = json.loads((result.folder / "environment.json").read_text())
    assert environment["engine"]["precision"] == "bf16"
    assert coarse.dtype == np.float32
    assert 1e-5 < np.abs(coarse - fine).max() < 0.02
    _, again = made(tmp_path / "again", engine__threads=2)
    np.testing.assert_array_equal(again, coarse)


@pytest.mark.usefixtures("ready_ray")
@pytest.mark.parametrize("plan", ["loop", "batched-3"])
@pytest.mark.ray
def test_the_precision_travels_to_workers(tmp_path, plan):
    _, here = made(tmp_path / "here", engine__plan=plan, engine__threads=1)
    several = {"engine__name": "ray", "engine__workers": 2}
    _, there = made(tmp_path / "there", engine__plan=plan, **several)
    np.testing.assert_array_equal(there, here)


def test_what_a_cpu_does_not_have_is_said_in_a_line(tmp_path, caplog):
    precision._IDLE.clear()
    with caplog.at_level(logging.WARNING, "fedweight"):
        _, told = made(tmp_path / "a", engine__precision="tf32", engine__device="cpu")
    (record,) = caplog.records
    said = "engine.precision = 'tf32' changes nothing on a CPU: only NVIDIA's GPUs"
    assert record.getMessage().startswith(said)
    _, fine = made(tmp_path / "b", engine__precision="fp32", engine__device="cpu")
    np.testing.assert_array_equal(told, fine)


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"^engine\.precision must be one of"):
        made(tmp_path, engine__precision="fp16")
    assert not list(tmp_path.iterdir())


def test_a_plan_is_kept_for_each_precision(tmp_path, monkeypatch):
    kept = []

    def choose(*_, about, **__):
        kept.append(about["engine"].pop("precision"))
        kept.append(about)
        return Choice("cpu", Plan(3), {"by": "a test"})

    monkeypatch.setattr(choosing, "choose_plan", choose)
    monkeypatch.setattr(choosing, "WORTH_MEASURING", 0)
    monkeypatch.setattr(choosing, "plans_for", lambda *_: [Plan(), Plan(3)])
    for wanted in ("bf16", "fp32"):
        told = {"engine__plan": "auto", "engine__precision": wanted}
        made(tmp_path / wanted, **told)
    coarse, one, fine, other = kept
    assert (coarse, fine) == ("bf16", "fp32")
    assert one == other


def test_the_server_multiplies_so_too(tmp_path, monkeypatch):
    asked = []
    products = runner.gpu_arithmetic

    def ask(wanted, device):
        asked.append((wanted, device))
        return products(wanted, device)

    monkeypatch.setattr(runner, "gpu_arithmetic", ask)
    made(tmp_path / "run", engine__device="cpu")
    assert asked == [("bf16", "cpu")]
