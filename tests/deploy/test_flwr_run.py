"""``flwr run .`` on Flower's own runtime: a daemon, Ray, and the app from a bundle.

It gives what ``fedweight run`` gives, and what goes over the wire is what ``bytes_up``
and ``bytes_down`` say.
"""

from __future__ import annotations

import json
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

pytestmark = [pytest.mark.deploy, pytest.mark.ray, pytest.mark.timeout(280)]

ROOT = Path(__file__).parents[2]
APPS = ROOT / "tests" / "apps"

# A strategy whose module weighs each message as Flower writes it, at the grid: after
# models were written by the codec, and before they are read.
WEIGHING = """
import json
from pathlib import Path
from flwr.common.serde import recorddict_to_proto
from fedweight.messages.wire import Wire
from {module} import {strategy}

write, read = Wire.write, Wire.read

def weigh(way, messages):
    several = list(messages)
    sizes = [
        recorddict_to_proto(m.content).ByteSize()
        for m in several
        if m.metadata.message_type.startswith(("train", "evaluate")) and m.has_content()
    ]
    with (Path.home() / "{name}.jsonl").open("a") as file:
        print(json.dumps([way, sum(sizes)]), file=file)
    return several

Wire.write = lambda self, messages: weigh("down", write(self, messages))
Wire.read = lambda self, replies: read(self, weigh("up", replies))

class Weighing({strategy}):
    pass
"""

# Two adapted layers of a base that stays as it is.
LORA = {
    "model.adapters": "lora",
    "model.rank": 64,
    "model.hidden": [512],
    "training.learning-rate": 0.02,
}
ADAPTERS = 64 * (64 + 512) + 64 * (512 + 10)
TENSORS = 4


# Points of two classes, which lie elsewhere for the few of a second group.
POINTS = """
import numpy as np
from fedweight.data import DataSet, Examples

def points():
    rng = np.random.default_rng(0)
    y, group = np.arange(500) % 2, (np.arange(500) % 7 == 0).astype(np.int64)
    x = rng.normal(size=(500, 200)) + np.eye(200)[(y + group) % 3] * 4
    parts = [
        Examples(x[rows].astype(np.float32), y[rows], {"site": group[rows]})
        for rows in (slice(400), slice(400, 500))
    ]
    return DataSet("points", *parts, 2, attribute_names={"site": ("a", "b")})
"""

MEDIAN_DISTANCE = "strategies.median_distance:MedianDistance"

# Where each run's strategy comes from, by the name of the module that weighs for it.
WEIGHED = {
    "weighing_dense": MEDIAN_DISTANCE,
    "weighing_low_bits": MEDIAN_DISTANCE,
    "weighing_told": "fedweight.strategies:AgnosticFair",
}


@pytest.fixture(scope="module")
def place(lasting_flower: Any) -> Any:
    """One bundle for all runs: what Numba compiles for the first serves the others."""
    folder = lasting_flower.app / "strategies"
    for name, strategy in WEIGHED.items():
        module, _, own = strategy.partition(":")
        text = WEIGHING.replace("{module}", module).replace("{strategy}", own)
        (folder / f"{name}.py").write_text(text.replace("{name}", name))
    (folder / "kernel_points.py").write_text(POINTS)
    return lasting_flower


def weighed(place: Any, name: str) -> dict[str, int]:
    """Return how many bytes went which way."""
    found = {"down": 0, "up": 0}
    for line in (place.folder / f"{name}.jsonl").read_text().splitlines():
        way, size = json.loads(line)
        found[way] += size
    return found


@pytest.mark.parametrize("codec", ["dense", "low-bits"])
def test_flwr_run_gives_what_fedweight_run_gives(place: Any, codec: str) -> None:
    """With a strategy of the user's own, sampled clients, and a base that is frozen.

    With the dense codec all clients evaluate the models, too, and there are two workers
    of Ray's.
    """
    evaluated = codec == "dense"
    name = f"weighing_{codec.replace('-', '_')}"
    out = place.folder / codec
    run = place.run(
        "--federation-config",
        "num-supernodes=4 client-resources-num-cpus=1 "
        f"init-args-num-cpus={1 + evaluated}",
        "-c",
        f"strategy.name='strategies.{name}:Weighing' run.rounds=2 training.epochs=1 "
        f"out='{out}' model.adapters='lora' codec.name='{codec}' "
        "training.learning-rate=0.02 settings='strategy.fraction-train=0.5 "
        f"strategy.fraction-evaluate={float(evaluated)} model.rank=64 "
        "model.hidden=[512] partition.alpha=0.5'",
    )
    assert run["status"] == "finished:completed", run["log"]
    assert f"results in {out}" in run["log"]

    found = fedweight.Run(out)
    size = {"dense": 4 * ADAPTERS, "low-bits": ADAPTERS + 4 * TENSORS}[codec]
    trained = found.clients[found.clients.status == "ok"]
    assert trained.bytes_up.tolist() == [size] * 4
    assert trained.bytes_down.tolist() == [4 * ADAPTERS * (1 + evaluated)] * 4
    sizes = weighed(place, name)
    assert found.clients.bytes_up.sum() == pytest.approx(sizes["up"], rel=0.02)
    assert found.clients.bytes_down.sum() == pytest.approx(sizes["down"], rel=0.02)

    ours = fedweight.run(
        strategy=MEDIAN_DISTANCE,
        engine="local",
        out=place.folder / f"{codec}-ours",
        settings={
            **LORA,
            "run.rounds": 2,
            "training.epochs": 1,
            "codec.name": codec,
            "strategy.fraction-train": 0.5,
            "strategy.fraction-evaluate": float(evaluated),
            "partition.alpha": 0.5,
            "partition.clients": 4,
        },
    )
    files, expected_files = (
        {path.name: path for path in made.folder.iterdir()} for made in (found, ours)
    )
    assert files.keys() == expected_files.keys()
    same = [one["partition.csv"].read_bytes() for one in (files, expected_files)]
    assert same[0] == same[1]
    for column in ("bytes_up", "bytes_down", "client"):
        assert ours.clients[column].tolist() == found.clients[column].tolist()
    # A simulation adds up the models list by list, so the last bits may differ.
    for table in ("rounds.csv", "clients.csv") if codec == "dense" else ():
        frame, expected = (pd.read_csv(all_[table]) for all_ in (files, expected_files))
        pd.testing.assert_frame_equal(frame, expected, rtol=1e-5)
    model, expected_model = (
        load_file(all_["model.safetensors"]) for all_ in (files, expected_files)
    )
    assert list(model) == list(expected_model)
    for tensor, values in expected_model.items():
        if "lora" not in tensor:  # The base has the bits that it was built with.
            np.testing.assert_array_equal(model[tensor], values)
        # A value at a border of two levels may be read as the next one.
        off = 1e-6 if codec == "dense" else 5e-3
        np.testing.assert_allclose(model[tensor], values, atol=off)


def test_what_a_strategy_tells_arrives_and_is_counted(
    place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels, which clients train with and measure by, as on the local engine."""
    out = place.folder / "told"
    options = {
        "strategy.group": "site",
        "strategy.bases": 20,
        "strategy.penalty": 0.2,
        "strategy.fraction-evaluate": 0.0,
        "model.name": "mlp",
        "model.hidden": [16],
        "partition.alpha": 1.0,
        "data.proxy": 0.1,
    }
    given = " ".join(f"{key}={value}" for key, value in options.items())
    run = place.run(
        "--federation-config",
        "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=1",
        "-c",
        "strategy.name='strategies.weighing_told:Weighing' run.rounds=3 "
        f"training.epochs=1 data.name='strategies.kernel_points:points' out='{out}' "
        f"settings='{given}'",
    )
    assert run["status"] == "finished:completed", run["log"]
    found = fedweight.Run(out)
    # 20 bases of 200 features, as many coefficients, the widths, and the attribute.
    model = 4 * (200 * 16 + 16 + 16 * 2 + 2)
    told = 8 * (20 * 200 + 20 + 200) + len("site")
    assert found.clients.bytes_down.tolist() == [model + told] * 9
    down = weighed(place, "weighing_told")["down"]
    assert found.clients.bytes_down.sum() == pytest.approx(down, rel=0.02)

    (tmp_path / "kernel_points.py").write_text(POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    ours = fedweight.run(
        strategy="agnostic-fair",
        engine="local",
        out=place.folder / "told-ours",
        settings={
            **options,
            "data.name": "kernel_points:points",
            "run.rounds": 3,
            "training.epochs": 1,
            "partition.clients": 3,
        },
    )
    sys.modules.pop("kernel_points", None)
    for name in ("rounds", "clients"):
        frames = [getattr(one, name) for one in (found, ours)]
        pd.testing.assert_frame_equal(*frames, rtol=1e-4)
    assert found.rounds["feasible"].notna().any()
    trained, expected = (
        load_file(one.folder / "model.safetensors") for one in (found, ours)
    )
    for name, values in expected.items():
        np.testing.assert_allclose(trained[name], values, rtol=1e-4, atol=1e-5)


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
