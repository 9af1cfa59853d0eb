"""``flwr run .`` on Flower's own runtime: a daemon, Ray, and the app from a bundle."""

from __future__ import annotations

from typing import Any

import pytest

import fedweight

pytestmark = [pytest.mark.deploy, pytest.mark.ray, pytest.mark.timeout(240)]

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
    for name in ("rounds.csv", "clients.csv", "partition.csv", "model.safetensors"):
        assert (out / name).read_bytes() == (ours / name).read_bytes(), name
