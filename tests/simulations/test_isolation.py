"""What a client does to its process reaches neither the server nor another client."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from fedweight.simulations import SimulationGrid, simulate
from fedweight.simulations.isolation import seed_generators, undone
from fedweight.simulations.local import LocalGrid

Make = Callable[..., SimulationGrid]


def test_pytorch_imported_by_a_client_is_seeded_and_put_back_too() -> None:
    """In a process that has not imported it."""
    program = """
import sys
from fedweight.simulations.isolation import seed_generators, undone

def client(nth):
    with undone():
        seed_generators(0, 3, nth)
        import torch
        torch.set_default_dtype(torch.float64)
        return torch.rand(3, dtype=torch.float32).tolist()

with undone():
    seed_generators(0, 3, 1)
    finders = list(sys.meta_path)
assert len(finders) == len(sys.meta_path) + 2 and "torch" not in sys.modules
first = client(1)
import torch
assert torch.get_default_dtype() == torch.float32
before = torch.get_rng_state()
assert client(1) == first != client(2)
assert torch.equal(torch.get_rng_state(), before)
print(*first)
"""
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, check=True, capture_output=True, text=True)
    with undone():
        seed_generators(0, 3, 1)
        expected = torch.rand(3).tolist()
    assert [float(word) for word in printed.stdout.split()] == expected


def app_of(handler: Callable[[Message, Context], Any]) -> ClientApp:
    app = ClientApp()
    app.train()(handler)
    return app


def answer(message: Message, **metrics: Any) -> Message:
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def metrics_of(replies: Any, name: str) -> list[Any]:
    errors = [reply.error.reason for reply in replies if reply.has_error()]
    assert not errors, errors[0]
    return [reply.content["metrics"][name] for reply in replies]


def state_of_process() -> dict[str, Any]:
    """Return all that has to stay the process's own."""
    return {
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index]  # noqa: NPY002
        "torch": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "device": torch.empty(0).device,
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "arguments": list(sys.argv),
        "level": logging.getLogger().level,
        "warnings": list(warnings.filters),
    }


def change_everything() -> None:
    random.seed(42)
    np.random.seed(42)  # noqa: NPY002
    torch.manual_seed(42)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    torch.set_num_threads(torch.get_num_threads() + 1)
    os.environ["SET_BY_A_CLIENT"] = "1"
    os.environ.pop("HOME", None)
    os.chdir("/")
    sys.argv.append("--changed")
    logging.getLogger().setLevel(5)
    warnings.simplefilter("ignore")


def test_a_block_is_undone() -> None:
    before = state_of_process()
    with undone():
        change_everything()
        changed = state_of_process()
    assert all(changed[name] != before[name] for name in before)
    assert state_of_process() == before
    with contextlib.suppress(KeyError), undone():
        change_everything()
        raise KeyError
    assert state_of_process() == before


def test_neither_server_nor_other_clients_see_what_a_client_changed(
    make: Make, write: Any
) -> None:
    names = [name for name in state_of_process() if name not in ("warnings",)]

    def train(message: Message, context: Context) -> Message:
        own = state_of_process()
        found = own["environment"].get("SET_BY_A_CLIENT", "")
        text = {n: str(own[n]) for n in names if n not in ("random", "numpy", "torch")}
        del text["environment"]
        change_everything()
        config = ConfigRecord({**text, "found": found})
        return Message(RecordDict({"config": config}), reply_to=message)

    grid = make(app_of(train), 3)
    before = state_of_process()
    first = grid.send_and_receive([write(grid, k) for k in range(3)])
    second = grid.send_and_receive([write(grid, k) for k in range(3)])
    assert state_of_process() == before
    told = [dict(reply.content["config"]) for reply in [*first, *second]]
    assert all(one == told[0] for one in told)
    assert told[0]["found"] == ""
    assert told[0]["dtype"] == "torch.float32"
    assert told[0]["gradients"] == "True"
    assert told[0]["folder"] == os.getcwd()


def test_a_client_cannot_freeze_what_the_server_draws(make: Make, write: Any) -> None:
    def train(message: Message, context: Context) -> Message:
        random.seed(42)
        np.random.seed(42)  # noqa: NPY002
        return answer(message, value=random.random())

    grid = make(app_of(train), 2)
    drawn = []
    for _ in range(3):
        grid.send_and_receive([write(grid, k) for k in range(2)])
        drawn.append((random.random(), float(np.random.random())))  # noqa: NPY002
    assert len(set(drawn)) == 3


def test_noise_of_server_side_privacy_is_new_every_round(make: Make) -> None:
    def train(message: Message, context: Context) -> Message:
        np.random.seed(42)  # noqa: NPY002
        w = message.content["arrays"]["w"].numpy()
        content = RecordDict(
            {
                "arrays": ArrayRecord({"w": Array(w + 1.0)}),
                "metrics": MetricRecord({"num-examples": 1}),
            }
        )
        return Message(content, reply_to=message)

    grid = make(app_of(train), 2)
    inner = FedAvg(fraction_evaluate=0.0)
    strategy = DifferentialPrivacyServerSideFixedClipping(inner, 1.0, 1.0, 2)
    start = ArrayRecord({"w": Array(np.zeros(4))})
    models = [np.zeros(4)]

    def keep(number: int, arrays: ArrayRecord) -> None:
        models.append(arrays["w"].numpy())

    strategy.start(grid, start, num_rounds=3, evaluate_fn=keep)
    noise = [b - a for a, b in itertools.pairwise(models[1:])]
    assert len({tuple(one.round(12)) for one in noise}) == 3


def draws(message: Message, context: Context) -> Message:
    values = [random.random(), np.random.random(), torch.rand(1).item()]  # noqa: NPY002
    return answer(message, values=[float(v) for v in values])


def test_with_a_seed_clients_draw_the_same_everywhere(make: Make, write: Any) -> None:
    def play(seed: int, order: list[int]) -> dict[tuple[int, int], Any]:
        grid = make(app_of(draws), 4, {}, seed=seed)
        found = {}
        for number in range(2):
            replies = grid.send_and_receive([write(grid, k) for k in order])
            for client, values in zip(
                order, metrics_of(replies, "values"), strict=True
            ):
                found[client, number] = tuple(values)
        return found

    once = play(3, [0, 1, 2, 3])
    assert once == play(3, [3, 1, 0, 2])
    assert len(set(once.values())) == 8
    assert once != play(4, [0, 1, 2, 3])
    local = LocalGrid(app_of(draws), 4, {}, seed=3)
    replies = local.send_and_receive([write(local, k) for k in range(4)])
    assert [tuple(v) for v in metrics_of(replies, "values")] == [
        once[k, 0] for k in range(4)
    ]


def test_without_a_seed_they_differ_and_it_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        for _ in range(2):
            grid.send_and_receive([Message(RecordDict(), 1000, "train")])

    with caplog.at_level(logging.INFO, "fedweight"):
        runs = [simulate(app, app_of(draws), 1, isolation="none") for _ in range(2)]
    assert runs[0].metrics["train"][0] != runs[1].metrics["train"][0]
    told = [r.getMessage() for r in caplog.records if "seed = " in r.getMessage()]
    assert len(told) == 2
    seed = int(told[0].split("seed = ")[1].rstrip("."))
    again = simulate(app, app_of(draws), 1, isolation="none", seed=seed)
    assert again.metrics == runs[0].metrics


def test_threads_of_a_server_do_not_make_clients_run_at_once(
    make: Make, write: Any
) -> None:
    """As ServerApps of the older kind do: a message a thread."""

    def train(message: Message, context: Context) -> Message:
        global _running
        _running += 1
        seen = _running
        time.sleep(0.02)
        _running -= 1
        return answer(message, at_once=seen)

    grid = make(app_of(train), 6)
    found: list[int] = []

    def ask(client: int) -> None:
        found.extend(
            metrics_of(grid.send_and_receive([write(grid, client)]), "at_once")
        )

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1] * 6


_running = 0


def test_changes_to_the_configuration_do_not_last(make: Make, write: Any) -> None:
    def train(message: Message, context: Context) -> Message:
        found = [*context.run_config.values(), len(context.node_config)]
        context.run_config["rate"] = 2.0
        context.node_config["more"] = 1
        return answer(message, found=[float(value) for value in found])

    grid = make(app_of(train), 1, {"rate": 1.0})
    for _ in range(2):
        replies = grid.send_and_receive([write(grid, 0)])
        assert metrics_of(replies, "found") == [[1.0, 2.0]]


def test_a_node_config_of_each_client(make: Make, write: Any) -> None:
    def train(message: Message, context: Context) -> Message:
        return answer(message, size=int(context.node_config.get("size", 0)))

    grid = make(app_of(train), 3, {}, node_config={1: {"size": 5}})
    replies = grid.send_and_receive([write(grid, k) for k in range(3)])
    assert metrics_of(replies, "size") == [0, 5, 0]


class Halt(BaseException):
    """What is no Exception, as asyncio's CancelledError."""


@pytest.mark.parametrize("kind", [Halt, SystemExit, GeneratorExit, KeyboardInterrupt])
def test_a_client_that_raises_no_exception_costs_itself_alone(
    make: Make, write: Any, kind: type[BaseException]
) -> None:
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise kind("as planned")
        return answer(message, size=1)

    grid = make(app_of(train), 3, {})
    if kind is KeyboardInterrupt and isinstance(grid, LocalGrid):
        return  # There it is whoever started this process.
    replies = list(grid.send_and_receive([write(grid, k) for k in range(3)]))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert "as planned" in replies[1].error.reason


@pytest.mark.parametrize(
    ("engine", "grids"),
    [
        pytest.param("local", "processes", marks=pytest.mark.processes),
        pytest.param("ray", "ray_grids", marks=pytest.mark.ray),
    ],
)
def test_old_apps_give_the_same_each_time(
    engine: str, grids: str, request: pytest.FixtureRequest
) -> None:
    """Ones whose clients draw from the process's generators, a thread a message."""
    request.getfixturevalue(grids)  # What is defined here travels along.
    request.getfixturevalue("ready_ray")

    from flwr.common import ndarrays_to_parameters
    from flwr.server import ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg as OldFedAvg

    class Noisy(NumPyClient):
        def fit(self, parameters: Any, config: Any) -> Any:
            noise = [np.random.normal(size=p.shape) for p in parameters]  # noqa: NPY002
            return [p + n for p, n in zip(parameters, noise, strict=True)], 1, {}

    def client_fn(context: Context) -> Client:
        return Noisy().to_client()

    def play() -> Any:
        found: list[Any] = []

        def keep(number: int, parameters: Any, config: Any) -> None:
            found.append([p.tolist() for p in parameters])

        def server_fn(context: Context) -> ServerAppComponents:
            strategy = OldFedAvg(
                fraction_evaluate=0.0,
                min_fit_clients=6,
                min_available_clients=6,
                evaluate_fn=keep,
                initial_parameters=ndarrays_to_parameters([np.zeros(3)]),
            )
            config = ServerConfig(num_rounds=2)
            return ServerAppComponents(config=config, strategy=strategy)

        simulate(
            ServerApp(server_fn=server_fn),
            ClientApp(client_fn=client_fn),
            6,
            engine=engine,
            workers=2,
            seed=0,
        )
        return found

    once = play()
    np.testing.assert_allclose(np.array(play()), np.array(once), rtol=1e-12)
    assert np.abs(once[-1]).sum() > 0
