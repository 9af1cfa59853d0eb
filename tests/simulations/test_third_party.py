"""Flower apps that know nothing of this library, on every grid and on Flower's own.

Each is written as a user of Flower would: a ServerApp with a main function, a
ClientApp with handlers, a small NumPy model, no import of ours.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    Krum,
    QFedAvg,
    Strategy,
)

NUM_CLIENTS = 4
FEATURES = 5

Result = dict[str, Any]


def make_client_app(train_mods: list[Any] | None = None) -> ClientApp:
    """Linear regression; client k has 10 + 5k examples of its own line."""
    app = ClientApp()

    def data(context: Context) -> tuple[Any, Any]:
        client = int(context.node_config["partition-id"])
        rng = np.random.default_rng(client)
        x = rng.normal(size=(10 + 5 * client, FEATURES))
        return x, x @ np.arange(FEATURES) + client + rng.normal(size=len(x)) / 10

    def loss(w: Any, b: Any, x: Any, y: Any) -> float:
        return float(np.mean((x @ w + b - y) ** 2))

    @app.train(mods=train_mods)
    def train(message: Message, context: Context) -> Message:
        x, y = data(context)
        w, b = message.content.array_records["arrays"].to_numpy_ndarrays()
        before = loss(w, b, x, y)
        rate = context.run_config.get("rate", 0.05)
        for _ in range(3):
            residual = x @ w + b - y
            w -= rate * 2 * x.T @ residual / len(x)
            b -= rate * 2 * residual.mean()
        past = context.state.get("calls", MetricRecord({"count": 0}))
        context.state["calls"] = MetricRecord({"count": past["count"] + 1})
        metrics = MetricRecord(
            {
                "num-examples": len(x),
                "train_loss": before,
                "calls": context.state["calls"]["count"],
            }
        )
        arrays = ArrayRecord({"w": _array(w), "b": _array(b)})
        return Message(
            RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message
        )

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        x, y = data(context)
        w, b = message.content.array_records["arrays"].to_numpy_ndarrays()
        metrics = MetricRecord({"num-examples": len(x), "loss": loss(w, b, x, y)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    @app.query("how_many")
    def how_many(message: Message, context: Context) -> Message:
        count = MetricRecord({"examples": len(data(context)[0])})
        return Message(RecordDict({"count": count}), reply_to=message)

    return app


def _array(values: Any) -> Array:
    return Array(np.asarray(values))


def make_server_app(strategy: Strategy, results: list[Result]) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        # Flower draws cohorts and noise from the process's own generators.
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        initial = ArrayRecord(
            {"w": _array(np.zeros(FEATURES)), "b": _array(np.zeros(1))}
        )
        result = strategy.start(grid, initial, num_rounds=3)
        results.append(
            {
                "arrays": [a.tolist() for a in result.arrays.to_numpy_ndarrays()],
                "train": {
                    r: dict(m) for r, m in result.train_metrics_clientapp.items()
                },
                "evaluate": {
                    r: dict(m) for r, m in result.evaluate_metrics_clientapp.items()
                },
            }
        )

    return app


def halve_loss(message: Message, context: Context, call_next: Any) -> Message:
    """Change what comes in and what goes out, as a mod of a user's own may."""
    message.content["config"]["noticed"] = True
    reply = call_next(message, context)
    reply.content["metrics"]["train_loss"] /= 2
    return reply


# Flower's runtime may begin before all nodes are there, and its strategies would be
# content with two.
ALL: dict[str, Any] = {
    "min_train_nodes": NUM_CLIENTS,
    "min_evaluate_nodes": NUM_CLIENTS,
    "min_available_nodes": NUM_CLIENTS,
}
PRIVACY = (0.1, 1.0, NUM_CLIENTS)  # noise, clipping norm, cohort

STRATEGIES: dict[str, tuple[Callable[[], Strategy], list[Any]]] = {
    "FedAvg": (lambda: FedAvg(**ALL), []),
    "FedAvgM": (lambda: FedAvgM(server_momentum=0.9, **ALL), []),
    "FedAdam": (lambda: FedAdam(**ALL), []),
    # With one neighbour each, the two nearest clients would tie, and Krum would take
    # whichever answered first.
    "Krum": (lambda: Krum(num_malicious_nodes=0, **ALL), []),
    "QFedAvg": (lambda: QFedAvg(client_learning_rate=0.05, q=0.2, **ALL), []),
    "server-side DP": (
        lambda: DifferentialPrivacyServerSideFixedClipping(FedAvg(**ALL), *PRIVACY),
        [],
    ),
    "client-side DP": (
        lambda: DifferentialPrivacyClientSideFixedClipping(FedAvg(**ALL), *PRIVACY),
        [fixedclipping_mod],
    ),
    "own mod": (lambda: FedAvg(**ALL), [halve_loss]),
}


@pytest.mark.ray
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy(
    name: str, everywhere: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy, mods = STRATEGIES[name]
    # QFedAvg collects garbage for each reply, which takes seconds in a big process.
    monkeypatch.setattr("gc.collect", lambda: 0)

    def play(grid: Grid) -> Result:
        results: list[Result] = []
        serve(make_server_app(strategy(), results), grid)
        return results[0]

    result = everywhere(play, make_client_app(mods), NUM_CLIENTS)
    assert set(result["train"]) == {1, 2, 3}
    assert result["train"][3]["calls"] == 3  # Context.state went along
    losses = [result["evaluate"][r]["loss"] for r in (1, 2, 3)]
    assert losses[2] < losses[0]


# A program of its own: when Flower's runtime ends it ends the process's Ray.
FLOWER = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("third_party", {path!r})
apps = importlib.util.module_from_spec(spec)
sys.modules["third_party"] = apps
spec.loader.exec_module(apps)

import ray
from flwr.simulation import run_simulation

ray.cloudpickle.register_pickle_by_value(apps)
found = {{}}
for name in {names!r}:
    results = []
    strategy, mods = apps.STRATEGIES[name]
    run_simulation(
        apps.make_server_app(strategy(), results),
        apps.make_client_app(mods),
        num_supernodes={num_clients},
        backend_config={{"client_resources": {{"num_cpus": 1, "num_gpus": 0.0}}}},
    )
    found[name] = results[0]
print("RESULT", json.dumps(found), flush=True)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_flowers_own_runtime_gives_the_same(script: Any, serve: Any) -> None:
    """Full participation and clients that know their number: one right answer."""
    from fedweight.simulations.local import LocalGrid

    names = list(STRATEGIES)
    ours = {}
    for name in names:
        results: list[Result] = []
        strategy, mods = STRATEGIES[name]
        grid = LocalGrid(make_client_app(mods), NUM_CLIENTS)
        serve(make_server_app(strategy(), results), grid)
        ours[name] = json.loads(json.dumps(results[0]))
    program = script(FLOWER.format(path=__file__, names=names, num_clients=NUM_CLIENTS))
    output = program.finish()
    lines = [x for x in output.splitlines() if x.startswith("RESULT ")]
    assert lines, program.errors.read_text()[-3000:]
    theirs = json.loads(lines[0].removeprefix("RESULT "))
    for name in names:
        for part in ("train", "evaluate"):
            for number, metrics in ours[name][part].items():
                wanted = pytest.approx(metrics, rel=1e-6)
                assert theirs[name][part][number] == wanted, name
        for mine, other in zip(
            ours[name]["arrays"], theirs[name]["arrays"], strict=True
        ):
            np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-9)


@pytest.mark.ray
def test_run_config(everywhere: Any, serve: Any) -> None:
    def play(grid: Grid) -> Result:
        results: list[Result] = []
        serve(make_server_app(FedAvg(), results), grid)
        return results[0]

    slow = everywhere(play, make_client_app(), NUM_CLIENTS, {"rate": 0.001})
    fast = everywhere(play, make_client_app(), NUM_CLIENTS, {"rate": 0.05})
    assert fast["evaluate"][3]["loss"] < slow["evaluate"][3]["loss"]


@pytest.mark.ray
def test_query_messages(everywhere: Any) -> None:
    def play(grid: Grid) -> list[int]:
        messages = [
            Message(RecordDict(), node, "query.how_many")
            for node in grid.get_node_ids()
        ]
        replies = grid.send_and_receive(messages)
        return [int(reply.content["count"]["examples"]) for reply in replies]

    assert everywhere(play, make_client_app(), NUM_CLIENTS) == [10, 15, 20, 25]


@pytest.mark.ray
def test_lifespan_wraps_each_message(everywhere: Any, write: Any) -> None:
    app = ClientApp()

    @app.lifespan()
    def lifespan(context: Context) -> Any:
        context.state["life"] = ConfigRecord({"stage": "inside"})
        yield
        context.state["life"] = ConfigRecord({"stage": "after"})

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"seen": context.state["life"]}), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(RecordDict({"seen": context.state["life"]}), reply_to=message)

    def play(grid: Grid) -> list[Any]:
        stages = []
        for kind in ("train", "query"):
            (reply,) = grid.send_and_receive([write(grid, 0, kind)])
            stages.append(reply.content["seen"]["stage"])
        return stages

    assert everywhere(play, app, 2) == ["inside", "inside"]


@pytest.mark.ray
def test_asynchronous_server(everywhere: Any, serve: Any) -> None:
    """A server that sends a client its next message once it has answered the last.

    Which comes first differs, so the result is what does not depend on it.
    """

    def play(grid: Grid) -> Any:
        done: dict[int, list[int]] = {}
        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            model = ArrayRecord(
                {"w": _array(np.zeros(FEATURES)), "b": _array(np.zeros(1))}
            )

            def ask(node: int) -> Message:
                return Message(RecordDict({"arrays": model}), node, "train")

            open_ids = set(grid.push_messages([ask(n) for n in grid.get_node_ids()]))
            while open_ids:
                for reply in grid.pull_messages(list(open_ids)):
                    open_ids.discard(reply.metadata.reply_to_message_id)
                    node = reply.metadata.src_node_id
                    calls = int(reply.content["metrics"]["calls"])
                    done.setdefault(node, []).append(calls)
                    if calls < 3:
                        open_ids |= set(grid.push_messages([ask(node)]))

        serve(app, grid)
        return sorted(done.items())

    result = everywhere(play, make_client_app(), 6)
    assert [calls for _, calls in result] == [[1, 2, 3]] * 6
