"""What goes over the wire in a real run is what ``bytes_up`` and ``bytes_down`` say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

import fedweight

pytestmark = [pytest.mark.deploy, pytest.mark.ray, pytest.mark.timeout(280)]

# A strategy whose module weighs each message as Flower writes it, at the grid: after
# models were written by the codec, and before they are read.
WEIGHING = """
import json
from pathlib import Path
from flwr.common.serde import recorddict_to_proto
from fedweight.messages.wire import Wire
from fedweight.strategies import {strategy}

write, read = Wire.write, Wire.read

def weigh(way, messages):
    several = list(messages)
    sizes = [
        recorddict_to_proto(m.content).ByteSize()
        for m in several
        if m.metadata.message_type.startswith("train") and m.has_content()
    ]
    with (Path.home() / "weighed.jsonl").open("a") as file:
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


def weighed_in(folder: Path) -> dict[str, int]:
    """Return how many bytes went which way."""
    weighed = {"down": 0, "up": 0}
    for line in (folder / "weighed.jsonl").read_text().splitlines():
        way, size = json.loads(line)
        weighed[way] += size
    return weighed


@pytest.mark.parametrize("codec", ["dense", "low-bits"])
def test_a_frozen_base_stays_and_the_bytes_are_those_of_flower(
    flower: Any, codec: str
) -> None:
    weighing = WEIGHING.replace("{strategy}", "FedAvg")
    (flower.app / "strategies" / "weighing.py").write_text(weighing)
    out = flower.folder / "flower"
    run = flower.run(
        "--federation-config",
        "num-supernodes=2 client-resources-num-cpus=1",
        "-c",
        "strategy.name='strategies.weighing:Weighing' run.rounds=2 training.epochs=1 "
        f"out='{out}' model.adapters='lora' codec.name='{codec}' "
        "training.learning-rate=0.02 settings='strategy.fraction-evaluate=0.0 "
        "model.rank=64 model.hidden=[512] partition.alpha=0.5'",
    )
    assert run["status"] == "finished:completed", run["log"]

    found = fedweight.Run(out)
    one = {"dense": 4 * ADAPTERS, "low-bits": ADAPTERS + 4 * TENSORS}[codec]
    assert found.clients.bytes_up.tolist() == [one] * 4
    assert found.clients.bytes_down.tolist() == [4 * ADAPTERS] * 4
    weighed = weighed_in(flower.folder)
    assert found.clients.bytes_up.sum() == pytest.approx(weighed["up"], rel=0.02)
    assert found.clients.bytes_down.sum() == pytest.approx(weighed["down"], rel=0.02)

    ours = fedweight.run(
        engine="local",
        out=flower.folder / "ours",
        settings={
            **LORA,
            "run.rounds": 2,
            "training.epochs": 1,
            "codec.name": codec,
            "strategy.fraction-evaluate": 0.0,
            "partition.alpha": 0.5,
            "partition.clients": 2,
        },
    )
    for column in ("bytes_up", "bytes_down", "client"):
        assert ours.clients[column].tolist() == found.clients[column].tolist()
    model, expected = (load_file(r.folder / "model.safetensors") for r in (found, ours))
    for name, values in expected.items():
        if "lora" not in name:  # The base has the bits that it was built with.
            np.testing.assert_array_equal(model[name], values)
        # A value at a border of two levels may be read as the next one.
        off = 1e-6 if codec == "dense" else 5e-3
        np.testing.assert_allclose(model[name], values, atol=off)


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


def test_what_a_strategy_tells_arrives_and_is_counted(
    flower: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels, which clients train with and measure by, as on the local engine."""
    weighing = WEIGHING.replace("{strategy}", "AgnosticFair")
    (flower.app / "strategies" / "weighing.py").write_text(weighing)
    (flower.app / "strategies" / "kernel_points.py").write_text(POINTS)
    out = flower.folder / "flower"
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
    run = flower.run(
        "--federation-config",
        "num-supernodes=3 client-resources-num-cpus=1",
        "-c",
        "strategy.name='strategies.weighing:Weighing' run.rounds=3 training.epochs=1 "
        f"data.name='strategies.kernel_points:points' out='{out}' settings='{given}'",
    )
    assert run["status"] == "finished:completed", run["log"]
    found = fedweight.Run(out)
    # 20 bases of 200 features, as many coefficients, the widths, and the attribute.
    model = 4 * (200 * 16 + 16 + 16 * 2 + 2)
    told = 8 * (20 * 200 + 20 + 200) + len("site")
    assert found.clients.bytes_down.tolist() == [model + told] * 9
    down = weighed_in(flower.folder)["down"]
    assert found.clients.bytes_down.sum() == pytest.approx(down, rel=0.02)

    (tmp_path / "kernel_points.py").write_text(POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    ours = fedweight.run(
        strategy="agnostic-fair",
        engine="local",
        out=flower.folder / "ours",
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
