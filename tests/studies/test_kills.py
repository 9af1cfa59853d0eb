"""Thirty-five runs that are killed at random moments, each of forty rounds.

pytest -m slow tests/studies/test_kills.py
"""

from __future__ import annotations

import random
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedweight import Run, resume, run

from .test_resume import OWN, written

ROUNDS = 40
COMMON: dict[str, Any] = {
    "run.rounds": ROUNDS,
    "run.checkpoint-rounds": 3,
    "partition.clients": 8,
    "training.epochs": 1,
}
METHODS: dict[str, dict[str, Any]] = {
    "FedCE with momentum": {"strategy.name": "fedce", "server.name": "momentum"},
    "FedLAW with Adam": {"strategy.name": "fedlaw", "server.name": "adam"},
    "AFL": {"strategy.name": "afl", "strategy.fraction-train": 0.5},
    "FedAU": {"strategy.name": "fedau", "strategy.fraction-train": 0.5},
    "Fair incentive": {
        "strategy.name": "fair-incentive",
        "strategy.explore-at-most": 5,
        "strategy.beta": 3.0,
    },
    "FedBuff": {
        "strategy.name": "fedbuff",
        "schedule.name": "buffered",
        "schedule.buffer-size": 3,
        "schedule.concurrency": 5,
    },
    "Flower's FedAdam in its DP wrapper": {"strategy.name": "own_private:Private"},
    "Ditto with ALDR": {
        "strategy.name": "fedavg",
        "strategy.fraction-train": 0.5,
        "objective.name": "aldr",
        "personal.name": "ditto",
        "engine.plan": "batched-2",
    },
}
KILLS = [
    *((method, "local", kill) for method in METHODS for kill in range(3)),
    *((method, "ray", kill) for method in METHODS for kill in range(2)),
]


@pytest.fixture(autouse=True)
def _own_module(tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.getbasetemp() / "own"
    folder.mkdir(exist_ok=True)
    (folder / "own_private.py").write_text(OWN)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)


def settings_of(method: str, engine: str) -> dict[str, Any]:
    own = {"engine.workers": 2} if engine == "ray" else {}
    return {**COMMON, **METHODS[method], "engine.name": engine, **own}


@cache
def uninterrupted(method: str, engine: str, folder: Path) -> tuple[Path, float]:
    """Return the folder of a whole run, and how long its rounds took."""
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    out = folder / f"{method}, {engine}"
    made = run(settings=settings_of(method, engine), out=out, report=False)
    return out, float(made.timings["seconds"].sum())


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # Flower's own.
@pytest.mark.parametrize(("method", "engine", "kill"), KILLS)
def test_a_killed_run_ends_as_if_it_had_not_been(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    killed: Any,
    method: str,
    engine: str,
    kill: int,
) -> None:
    whole, seconds = uninterrupted(method, engine, tmp_path_factory.getbasetemp())
    moment = random.Random(f"{method}, {engine}, {kill}").random() * seconds
    began = time.monotonic()
    killed(tmp_path / "run", settings_of(method, engine), moment)
    before = Run(tmp_path / "run")
    print(
        f"{method}, {engine}: killed after {time.monotonic() - began:.1f} s, in round "
        f"{before.rounds_done + 1} of {ROUNDS}"
    )
    if not before.complete:
        random.seed(99)
        np.random.seed(99)  # noqa: NPY002
        resume(tmp_path / "run", report=False)
    expected, found = written(whole), written(tmp_path / "run")
    assert expected.keys() == found.keys()
    for name in expected:
        assert expected[name] == found[name], name
