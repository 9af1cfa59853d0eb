"""Several nodes, and GPUs that only Ray believes in: programs with their own Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Two nodes of one core each, a machine of their own each as far as Ray knows. The
# driver is on the first.
CLUSTER = """
import json
import time

import numpy as np
import ray
import torch
from flwr.app import ConfigRecord
from ray.cluster_utils import Cluster
from ray.experimental import get_object_locations

import fedweight
from fedweight.messages import _flower
from fedweight.clients import TrainingApp, TrainingSettings
from fedweight.data import ClientData, Examples
from fedweight.core.module import FlatModule
from fedweight.messages.arrays import FlatRecord
from fedweight.simulations.local import LocalGrid
from fedweight.simulations.ray.grid import RayGrid
from fedweight.strategies.fedavg import FedAvg
from fedweight.strategies.fedlaw import FedLAW
from fedweight.strategies.ida import IDA

FOLDER = {folder!r}
CLIENTS = 8
found = {}


def examples_of(client):
    rng = np.random.default_rng(client)
    count = 6 + 4 * client
    x = rng.normal(size=(count, 6)).astype(np.float32)
    return Examples(x, rng.integers(0, 3, count))


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5000), torch.nn.Linear(5000, 3))


def data(context):
    # Long enough that both workers get something to do.
    time.sleep(0.1)
    client = int(context.node_config["partition-id"])
    return ClientData(examples_of(client), examples_of(client + 100))


app = TrainingApp(
    model,
    data,
    num_classes=3,
    settings=TrainingSettings(epochs=1, batch_size=8, learning_rate=0.1),
    sizes=[6 + 4 * client for client in range(CLIENTS)],
)
initial = FlatRecord(FlatModule(model()).save())
strategies = {
    "fedavg": FedAvg,
    "fedavg, float64": lambda: FedAvg(accumulate="float64"),
    "ida": IDA,
    "fedlaw": lambda: FedLAW(model=model(), proxy=examples_of(99), server_epochs=2),
}


def play(grid, strategy):
    result = strategy.start(grid, initial, num_rounds=2)
    assert [r.status for r in strategy.history] == ["ok", "ok"], strategy.history
    return [a.tobytes() for a in result.arrays.to_numpy_ndarrays()]


def train(grid, strategy):
    cohort = strategy.configure_train(1, initial, ConfigRecord(), grid)
    return grid.send_and_receive(cohort)


def where_shards_are(replies):
    shards = {id(s): s for s, _ in replies.models._found.values()}.values()
    at = get_object_locations([s.rows for s in shards])
    return [[s.place, at[s.rows]["node_ids"]] for s in shards]


def alive():
    return sum(node["Alive"] for node in ray.nodes())


cluster = Cluster(
    initialize_head=True,
    head_node_args={"num_cpus": 1, "include_dashboard": False},
)
second = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
identity = _flower.task_identity(0)
identity.__enter__()

grid = RayGrid(app, CLIENTS, address=cluster.address)
found["workers"] = grid.workers
found["nodes"] = len(set(grid._pool.crew.places))
found["same"] = {
    name: play(grid, make()) == play(LocalGrid(app, CLIENTS), make())
    for name, make in strategies.items()
}

strategy = IDA()
replies = train(grid, strategy)
found["before"] = where_shards_are(replies)
strategy.aggregate_train(1, replies)
found["after"] = where_shards_are(replies)
found["aggregated"] = strategy.history[-1].status
here = ray.get_runtime_context().get_node_id()
shards = replies.models._found
elsewhere = [k for k in range(CLIENTS) if shards[1000 + k][0].place != here]
arrays = replies[elsewhere[0]].content["arrays"]
found["looked at"] = sum(len(a.data) for a in arrays.values()) > 200_000
del replies, shards
grid.close()
found["still initialized"] = ray.is_initialized()

settings = {
    "run.rounds": 2, "run.seed": 1, "partition.clients": 6, "training.epochs": 1,
    "strategy.name": "ida",
}
runs = {}
for name, more in {
    "local": {"engine.name": "local"},
    "cluster": {"engine.address": cluster.address},
}.items():
    result = fedweight.run(
        settings={**settings, "engine.plan": "loop", **more},
        out=f"{FOLDER}/{name}", report=False,
    )
    runs[name] = (result.folder / "model.safetensors").read_bytes()
found["fedweight.run"] = runs["local"] == runs["cluster"]

ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
found["alive"] = alive()
ray.shutdown()

# A node goes between training and aggregation.
grid = RayGrid(app, CLIENTS, address=cluster.address)
strategy = IDA()
replies = train(grid, strategy)
cluster.remove_node(second, allow_graceful=False)
began = time.perf_counter()
arrays, _ = strategy.aggregate_train(1, replies)
found["lost"] = [
    arrays is None, strategy.history[-1].status, strategy.history[-1].reason,
    time.perf_counter() - began,
]
del replies
# The other goes on.
began = time.perf_counter()
strategy = IDA()
arrays, _ = strategy.aggregate_train(1, train(grid, strategy))
found["next"] = [
    strategy.history[-1].status,
    [c.reason for c in strategy.history[-1].clients if c.status != "ok"],
    time.perf_counter() - began,
]
grid.close()
cluster.shutdown()
print("RESULT", json.dumps(found), flush=True)
"""

GPUS = """
import json, os
import ray
from flwr.app import Message, MetricRecord, ConfigRecord, RecordDict
from flwr.clientapp import ClientApp
from fedweight.messages import _flower
from fedweight.simulations.ray.grid import RayGrid

ray.init(num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False,
         logging_level="ERROR", object_store_memory=100_000_000)
app = ClientApp()

@app.train()
def train(message, context):
    config = ConfigRecord({
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "worker": ray.get_runtime_context().get_actor_id(),
    })
    import time; time.sleep(0.2)
    return Message(RecordDict({"where": config}), reply_to=message)

found = {}
with _flower.task_identity(0):
    for share in (0.5, 1, 2, 0):
        grid = RayGrid(app, 16, gpus_per_worker=share)
        messages = [Message(RecordDict(), n, "train") for n in grid.get_node_ids()]
        replies = list(grid.send_and_receive(messages))
        seen = {r.content["where"]["worker"]: r.content["where"]["visible"]
                for r in replies}
        found[str(share)] = [grid.workers, sorted(seen.values())]
        grid.close()
ray.shutdown()
print("RESULT", json.dumps(found), flush=True)
"""


def run(script: Any, text: str) -> dict[str, Any]:
    """Run a program that prints what it found; nothing of it may stay behind."""
    program = script(text)
    lines = program.finish().splitlines()
    results = [x for x in lines if x.startswith("RESULT ")]
    assert results, program.errors.read_text()[-3000:]
    # Workers of a node that was killed take a while to notice.
    assert any(program.left_behind() == [] for _ in range(5))
    found: dict[str, Any] = json.loads(results[0].removeprefix("RESULT "))
    return found


_found: dict[str, Any] = {}


@pytest.fixture
def cluster(script: Any, tmp_path: Path) -> dict[str, Any]:
    """Give what the program on a cluster found; it runs once for all tests."""
    if not _found:
        text = CLUSTER.replace("{folder!r}", repr(str(tmp_path)))
        _found.update(run(script, text))
    return _found


def test_workers_are_on_all_nodes(cluster: dict[str, Any]) -> None:
    assert cluster["workers"] == 2
    assert cluster["nodes"] == 2


def test_the_bits_are_those_of_the_local_grid(cluster: dict[str, Any]) -> None:
    assert cluster["same"] == dict.fromkeys(cluster["same"], True)
    assert len(cluster["same"]) == 4
    assert cluster["fedweight.run"]


def test_models_stay_on_the_node_that_trained_them(cluster: dict[str, Any]) -> None:
    assert cluster["aggregated"] == "ok"
    for moment in ("before", "after"):
        assert len({place for place, _ in cluster[moment]}) == 2
        assert all(nodes == [place] for place, nodes in cluster[moment]), moment
    assert cluster["looked at"]  # one reply's arrays, by whoever asks for them


def test_a_cluster_outlives_its_grid(cluster: dict[str, Any]) -> None:
    assert not cluster["still initialized"]  # The grid had joined it: it leaves.
    assert cluster["alive"] == 2


def test_a_lost_node_fails_the_round_and_no_more(cluster: dict[str, Any]) -> None:
    empty, status, reason, seconds = cluster["lost"]
    assert empty
    assert status == "failed"
    assert "cannot be reached on Ray node" in reason
    assert seconds < 40
    status, reasons, seconds = cluster["next"]
    assert (status, reasons) == ("ok", [])
    assert seconds < 40


def test_a_worker_for_each_share_of_a_gpu(script: Any) -> None:
    assert run(script, GPUS) == {
        "0.5": [4, ["0", "0", "1", "1"]],
        "1": [2, ["0", "1"]],
        "2": [1, ["0,1"]],
        "0": [4, [""] * 4],
    }
