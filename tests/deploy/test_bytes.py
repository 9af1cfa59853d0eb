"""What goes over the wire in a real run is what ``bytes_up`` and ``bytes_down`` say."""

from __future__ import annotations

from typing import Any

import numpy as np
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
from fedweight.strategies import FedAvg

write, read = Wire.write, Wire.read

def weigh(way, messages):
    several = list(messages)
    sizes = [
        recorddict_to_proto(m.content).ByteSize()
        for m in several if m.has_content() and m.content.array_records
    ]
    with (Path.home() / "weighed.jsonl").open("a") as file:
        print(json.dumps([way, sum(sizes)]), file=file)
    return several

Wire.write = lambda self, messages: weigh("down", write(self, messages))
Wire.read = lambda self, replies: read(self, weigh("up", replies))

class Weighing(FedAvg):
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


@pytest.mark.parametrize("codec", ["dense", "low-bits"])
def test_a_frozen_base_stays_and_the_bytes_are_those_of_flower(
    flower: Any, codec: str
) -> None:
    (flower.app / "strategies" / "weighing.py").write_text(WEIGHING)
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
    lines = (flower.folder / "weighed.jsonl").read_text().splitlines()
    weighed = {"down": 0, "up": 0}
    for line in lines:
        way, size = line.strip("[]").split(", ")
        weighed[way.strip('"')] += int(size)
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
