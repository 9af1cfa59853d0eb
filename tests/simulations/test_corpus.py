"""Whole Flower apps, run as they are on our engines and on Flower's own runtime.

``tests/apps`` holds them, each laid out as Flower's templates are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedweight.simulations.app_folder import AppFolder
from fedweight.simulations.flower_runtime import run_on_flower
from fedweight.simulations.folder_run import TOLERANCE, FolderRun, run_folder

APPS = Path(__file__).parents[1] / "apps"
CLIENTS = 4

# Each app, with the settings that it is run with.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "line-fit": ("line-fit", {}),
    "older-names": ("older-names", {}),
    "in-flight": ("in-flight", {}),
    "privacy on clients": ("private-mean", {}),
    "privacy on the server": ("private-mean", {"side": "server"}),
    "secure-sum": ("secure-sum", {}),
    "torch-digits": ("torch-digits", {}),
    "own-strategy": ("own-strategy", {}),
    "all-records": ("all-records", {}),
    "some-fail": ("some-fail", {}),
    "adaptive-clip": ("adaptive-clip", {}),
    "small-photos": ("small-photos", {}),
}

# What differs by more than rounding, and why: SecAgg+ rounds what clients send, up or
# down at random, to one of 2^22 values between -8 and 8; and they send a part of their
# values, as large as their examples' part of a thousand.
LOOSER = {"secure-sum": 16 / 2**22 * 1000 / 10}


def run(name: str, **options: Any) -> FolderRun:
    folder, settings = RUNS[name]
    settings = {**settings, **options.pop("settings", {})}
    given = [f"{key}={value!r}" for key, value in settings.items()]
    return run_folder(APPS / folder, run_config=given, clients=CLIENTS, **options)


def metrics_of(run: Any) -> dict[str, list[list[tuple[str, float]]]]:
    """Return what clients told, whoever they were: Flower's nodes have no number."""
    result = {}
    for kind, replies in run.metrics.items():
        rows = []
        for reply in replies:
            values = {k: v for k, v in reply.items() if k != "client"}
            if "error" in values:
                assert "as planned" in values["error"]
                values["error"] = 1.0
            rows.append(sorted((k, float(np.sum(v))) for k, v in values.items()))
        result[kind] = sorted(rows)
    return result


def check(name: str, mine: FolderRun, arrays: list[Any], metrics: Any) -> None:
    record = mine.ours.arrays
    own = [] if record is None else record.to_numpy_ndarrays()
    limit = LOOSER.get(name, TOLERANCE)
    assert len(own) == len(arrays)
    for a, b in zip(own, arrays, strict=True):
        np.testing.assert_allclose(a, b, rtol=limit, atol=limit)
    told = metrics_of(mine.ours)
    assert told.keys() == metrics.keys()
    for kind, rows in told.items():
        assert len(rows) == len(metrics[kind])
        for row, other in zip(rows, metrics[kind], strict=True):
            assert [name for name, _ in row] == [name for name, _ in other]
            values = [value for _, value in row]
            assert values == pytest.approx([v for _, v in other], rel=1e-5, abs=1e-6)


@pytest.mark.usefixtures("ready_ray")
@pytest.mark.ray
@pytest.mark.processes
@pytest.mark.parametrize("name", RUNS)
def test_our_engines_agree(name: str) -> None:
    local = run(name, engine="local", workers=2)
    ray = run(name, engine="ray", workers=1)
    record = ray.ours.arrays
    arrays = [] if record is None else record.to_numpy_ndarrays()
    check(name, local, arrays, metrics_of(ray.ours))


@pytest.mark.usefixtures("ready_ray")
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("local", marks=pytest.mark.processes),
        pytest.param("ray", marks=pytest.mark.ray),
    ],
)
def test_secure_aggregation_finishes_without_a_late_client(
    engine: str, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"timeout": 2.0, "late": 1}
    run("secure-sum", engine=engine, workers=2, settings=settings)
    first, second = (
        float(line.partition(": ")[2])
        for line in capfd.readouterr().out.splitlines()
        if line.startswith(("round 1", "round 2"))
    )
    # In the first round clients 0, 2 and 3 count, of 10, 12 and 13 examples; then all.
    expected = (2 * 12 + 3 * 13) / 35 / 2
    assert first == pytest.approx(expected, abs=1e-3)
    everybody = (1 * 11 + 2 * 12 + 3 * 13) / 46
    assert second == pytest.approx((expected + everybody) / 2, abs=1e-3)


@pytest.mark.ray
@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_flowers_own_runtime_agrees(name: str) -> None:
    folder, settings = RUNS[name]
    federation = {"num-supernodes": CLIENTS, "client-resources-num-cpus": 1}
    theirs = run_on_flower(AppFolder.read(APPS / folder), settings, federation)
    mine = run(name, engine="local", workers=2)
    check(name, mine, theirs.arrays, metrics_of(theirs))
