"""Running a whole app, and the choice of the engine."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedweight.core.errors import ConfigurationError, EngineError
from fedweight.simulations import LocalGrid, Plan, simulate
from fedweight.simulations.engine import choose_engine, make_grid

client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    metrics = MetricRecord({"value": int(context.run_config["value"])})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    messages = [Message(RecordDict(), n, "train") for n in grid.get_node_ids()]
    replies = grid.send_and_receive(messages)
    values = [int(reply.content["metrics"]["value"]) for reply in replies]
    context.state["result"] = ConfigRecord({"values": values})


def test_local() -> None:
    context = simulate(
        server_app, client_app, num_clients=3, run_config={"value": 7}, isolation="none"
    ).context
    assert context.state["result"] == {"values": [7, 7, 7]}
    assert context.run_config == {"value": 7}


@pytest.mark.ray
def test_ray(ray_grids: list[Any]) -> None:
    # Ray is initialised: it is used, and left running.
    context = simulate(
        server_app, client_app, num_clients=3, run_config={"value": 7}, workers=1,
        engine="ray",
    ).context  # fmt: skip
    assert context.state["result"] == {"values": [7, 7, 7]}
    ray_grids[0].load(client_app, 2, {"value": 8})
    replies = ray_grids[0].send_and_receive(
        [Message(RecordDict(), n, "train") for n in ray_grids[0].get_node_ids()]
    )
    assert [r.content["metrics"]["value"] for r in replies] == [8, 8]


def test_error_of_the_server_reaches_the_caller() -> None:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        raise RuntimeError("as planned")

    with pytest.raises(RuntimeError, match="as planned"):
        simulate(app, client_app, num_clients=2, isolation="none")


@pytest.mark.parametrize(
    ("workers", "gpus", "address", "devices", "engine"),
    [
        (None, 0.0, None, 0, "local"),
        (1, 0.0, None, 1, "local"),
        (2, 0.0, None, 0, "ray"),
        (None, 0.5, None, 1, "ray"),
        (None, 0.0, "auto", 0, "ray"),
        (None, 0.0, None, 2, "ray"),
    ],
)
def test_auto(
    workers: int | None,
    gpus: float,
    address: str | None,
    devices: int,
    engine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    assert choose_engine(workers, gpus, address) == engine
    expected = "local" if devices > 1 else engine
    assert choose_engine(workers, gpus, address, counts_gpus=False) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "rey"}, "engine must be one of .* Did you mean 'ray'"),
        ({"num_clients": 0}, r"num_clients must be in \[1, inf\), got 0"),
        ({"workers": 0}, r"workers must be in \[1, inf\), got 0"),
        ({"gpus_per_worker": -1}, r"gpus_per_worker must be in \[0, inf\), got -1"),
        ({"threads": 0}, r"threads must be in \[1, inf\), got 0"),
        ({"plan": 5}, r"plan must be a Plan or its name, .* got 5"),
        ({"plan": "fast"}, r"engine\.plan must be 'auto', .* got 'fast'"),
        ({"engine": "local", "address": "a:1"}, "address is 'a:1', .* is 'local'"),
        (
            {"engine": "local", "workers": 2, "isolation": "none"},
            "workers is 2, .* is 'local'",
        ),
        ({"isolation": "some"}, "isolation must be one of"),
        ({"isolation": "none", "engine": "ray"}, "isolation is 'none', .* is Ray"),
        ({"num_supernodes": 2}, "give the number of clients once"),
        ({"num_clients": None}, "give the number of clients once"),
        ({"run_config": {"a": [1]}}, r"run_config has .* got 'a' = \[1\]"),
        ({"node_config": {1: {"a": None}}}, "node_config of client 1 has"),
        ({"node_config": {2: {"a": 1}}}, "numbers of clients, 0 to 1, got 2"),
        ({"node_config": {"a": {"a": 1}}}, "numbers of clients, 0 to 1, got 'a'"),
        ({"node_config": {1: 5}}, "node_config of client 1 must be settings"),
        ({"backend_config": {"more": {}}}, "a key of backend_config must be one of"),
        ({"backend_name": "dask"}, "backend_name must be one of"),
        ({"seed": -1}, r"seed must be in \[0, inf\), got -1"),
        ({"engine": "local", "gpus_per_worker": 1}, "gpus_per_worker is 1, .* 'local'"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        simulate(server_app, client_app, **{"num_clients": 2, **arguments})


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"Install fedweight\[simulation\]"):
        simulate(server_app, client_app, num_clients=2, engine="ray")


@pytest.mark.parametrize(
    ("plan", "used"),
    [
        ("batched-5", Plan(5)),
        (Plan(5), Plan(5)),
        ("loop", Plan(1)),
        ("auto", Plan(1)),  # Only a run of ours measures.
        (None, Plan(1)),
    ],
)
def test_a_plan_may_be_named(plan: Plan | str | None, used: Plan) -> None:
    with make_grid(client_app, 2, plan=plan, isolation="none") as grid:
        assert isinstance(grid, LocalGrid)
        assert grid.plan == used


def test_grid_for_the_time_of_a_block() -> None:
    with make_grid(client_app, 2, {"value": 1}, isolation="none") as grid:
        assert isinstance(grid, LocalGrid)
        (reply,) = grid.send_and_receive([Message(RecordDict(), 1000, "train")])
    assert reply.content["metrics"]["value"] == 1
