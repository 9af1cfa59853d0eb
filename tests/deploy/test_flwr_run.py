"""``flwr run .`` on Flower's own runtime: a daemon, Ray, and the app from a bundle."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

import fedweight

pytestmark = [pytest.mark.deploy, pytest.mark.ray, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
APPS = ROOT / "tests" / "apps"

STRATEGY = "strategies.median_distance:MedianDistance"


def test_flwr_run_gives_what_fedweight_run_gives(flower: Any) -> None:
    """With a strategy of the user's own, and clients that are sampled."""
    out = flower.folder / "flower"
    run = flower.run(
        "--federation-config",
        "num-supernodes=4 client-resources-num-cpus=1",
        "-c",
        f"strategy.name='{STRATEGY}' run.rounds=2 training.epochs=1 out='{out}' "
        "settings='strategy.fraction-train=0.5 model.hidden=[16] partition.alpha=0.5'",
    )
    assert run["status"] == "finished:completed", run["log"]
    assert f"results in {out}" in run["log"]

    ours = fedweight.run(
        strategy=STRATEGY,
        engine="local",
        out=flower.folder / "ours",
        settings={
            "run.rounds": 2,
            "training.epochs": 1,
            "strategy.fraction-train": 0.5,
            "model.hidden": [16],
            "partition.alpha": 0.5,
            "partition.clients": 4,
        },
    ).folder
    assert {p.name for p in out.iterdir()} == {p.name for p in ours.iterdir()}
    assert (out / "partition.csv").read_bytes() == (ours / "partition.csv").read_bytes()
    # A simulation adds up the models list by list, so the last bits may differ.
    for name in ("rounds.csv", "clients.csv"):
        frame, expected = (pd.read_csv(folder / name) for folder in (out, ours))
        pd.testing.assert_frame_equal(frame, expected, rtol=1e-5)
    model, expected = (
        load_file(folder / "model.safetensors") for folder in (out, ours)
    )
    assert list(model) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(model[name], values, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_flwr_run_and_fedweight_app_take_the_same_folders(flower: Any) -> None:
    """Three of the apps in ``tests/apps``, without a change."""
    federation = ["--federation-config"]
    federation.append("num-supernodes=4 client-resources-num-cpus=1")
    said = {
        "line-fit": "122 examples on 4 nodes",
        "in-flight": "the sum of all cuts is -5.105033",
        "older-names": "History (metrics, distributed, evaluate)",
    }
    for name, text in said.items():
        flower.app = shutil.copytree(APPS / name, flower.folder / name)
        run = flower.run(*federation)
        assert run["status"] == "finished:completed", run["log"]
        assert text in run["log"]
        done = subprocess.run(
            [sys.executable, "-m", "fedweight.cli", "app", name, *federation],
            cwd=flower.folder,
            env={**flower.environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert text in done.stdout + done.stderr
