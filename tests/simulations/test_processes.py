"""The local engine's processes: how they start, what they have, and how they end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedweight.core.errors import EngineError
from fedweight.simulations.workers import processes as module
from fedweight.simulations.workers.grid import ProcessGrid

pytestmark = pytest.mark.processes

# As people write it: everything in one file, and nothing that keeps it from running
# again where it is imported.
UNGUARDED = """
import os, sys, time
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from fedweight import simulate

print("begun", flush=True)
SECONDS = {seconds}
client_app, server_app = ClientApp(), ServerApp()


class Own:
    value = 7


@client_app.train()
def train(message, context):
    time.sleep(SECONDS)
    metrics = MetricRecord({{"value": Own.value, "argument": len(sys.argv)}})
    return Message(RecordDict({{"m": metrics}}), reply_to=message)


@server_app.main()
def main(grid, context):
    ids = list(grid.get_node_ids())
    names = grid.push_messages([Message(RecordDict(), n, "train") for n in ids])
    print("pushed", flush=True)
    while SECONDS:
        time.sleep(0.1)
    replies = grid.send_and_receive([Message(RecordDict(), n, "train") for n in ids])
    print([r.content["m"]["value"] for r in replies], flush=True)


simulate(server_app, client_app, num_supernodes=3, workers=2)
print("ended", flush=True)
"""


WITHOUT_PYTORCH = """
import sys
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from fedweight import simulate

client_app, server_app = ClientApp(), ServerApp()


def imported():
    return [name for name in ("torch", "ray", "pandas") if name in sys.modules]


@client_app.train()
def train(message, context):
    metrics = MetricRecord({"imported": len(imported())})
    return Message(RecordDict({"m": metrics}), reply_to=message)


@server_app.main()
def main(grid, context):
    ids = list(grid.get_node_ids())
    replies = grid.send_and_receive([Message(RecordDict(), n, "train") for n in ids])
    print([r.content["m"]["imported"] for r in replies], imported())


simulate(server_app, client_app, num_supernodes=3, workers=2, seed=0)
print(imported())
"""


def test_an_app_without_pytorch_does_not_wait_for_its_import(script: Any) -> None:
    program = script(WITHOUT_PYTORCH)
    expected = ["[0, 0, 0] []", "[]"]
    assert program.finish().splitlines() == expected, program.errors.read_text()


def test_such_tests_run_one_after_another(request: pytest.FixtureRequest) -> None:
    """Where tests run side by side; xdist reads the group from the test's id."""
    if request.config.getoption("loadgroup", False):
        assert request.node.nodeid.endswith("@processes")


def test_a_script_with_everything_in_it(script: Any) -> None:
    program = script(UNGUARDED.format(seconds=0))
    assert program.finish().splitlines() == [
        "begun",
        "pushed",
        "[7, 7, 7]",
        "ended",
    ], program.errors.read_text()
    assert program.process.returncode == 0
    assert program.left_behind() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_program_that_is_ended(script: Any, number: int) -> None:
    """Though a client would go on for an hour."""
    program = script(UNGUARDED.format(seconds=3600))
    program.wait_for("pushed")
    os.kill(program.process.pid, number)
    program.finish()
    assert program.process.returncode != 0
    assert program.left_behind() == []


@pytest.mark.parametrize(
    "left",
    [
        "__import__('threading').Thread(target=time.sleep, args=(3600,)).start()",
        "os.abort()",
    ],
)
def test_what_clients_leave_does_not_keep_a_program(script: Any, left: str) -> None:
    """A thread that never ends, or a process that has only begun."""
    text = UNGUARDED.format(seconds=0).replace("time.sleep(SECONDS)", left)
    program = script(text.replace('r.content["m"]["value"]', "r.has_error()"))
    lines = program.finish().splitlines()
    assert lines[-1] == "ended", program.errors.read_text()
    assert program.process.returncode == 0
    assert program.left_behind() == []


def environment(message: Message, context: Context) -> Message:
    names = ["OWN", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "FEDWEIGHT_PRELOAD"]
    found = {name: os.environ.get(name, "none") for name in names}
    content = RecordDict({"found": ConfigRecord({**found, "process": os.getpid()})})
    return Message(content, reply_to=message)


def test_environment_of_the_processes(
    processes: Any, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWN", "set after the fork server began")
    app = ClientApp()
    app.train()(environment)
    grid = ProcessGrid(app, 2, workers=2)
    replies = grid.send_and_receive([write(grid, k) for k in range(2)])
    for reply in replies:
        found = dict(reply.content["found"])
        assert found.pop("process") != os.getpid()
        assert found == {
            "OWN": "set after the fork server began",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "FEDWEIGHT_PRELOAD": "none",
        }
    grid.close()
    assert "FEDWEIGHT_PRELOAD" not in os.environ
    with pytest.raises(EngineError, match="is closed"):
        grid.send_and_receive([write(grid, 0)])


def test_what_the_fork_server_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    app = ClientApp()
    app.train()(lambda message, context: None)
    data = module.cloudpickle.dumps(app)
    assert "flwr.clientapp.client_app" in module._modules(data)
    assert "__main__" not in module._modules(data)
    monkeypatch.setitem(sys.modules, "jax", sys)
    assert module._modules(data) == []


def test_app_that_cannot_travel(processes: Any) -> None:
    guard = threading.Lock()
    app = ClientApp()
    app.train()(lambda message, context: guard)
    with pytest.raises(EngineError, match=r"cannot be sent .* isolation = 'none'"):
        processes.load(app, 2)


class Homebound:
    def __reduce__(self) -> Any:
        return __import__, ("no_such_module_at_all",)


def test_app_that_cannot_be_loaded(processes: Any) -> None:
    held = Homebound()
    app = ClientApp()
    app.train()(lambda message, context: held)
    with pytest.raises(EngineError, match=r"cannot load .*no_such_module_at_all"):
        processes.load(app, 2)
    processes.load(ClientApp(), 2)


def test_a_model_travels_to_a_process_once(
    processes: Any, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = ClientApp()
    app.train()(environment)
    processes.load(app, 8)
    news: list[int] = []
    crew = processes._pool.crew
    for worker in crew.handles:
        submit = worker.pool.submit

        def noting(work: Any, *given: Any, submit: Any = submit) -> Any:
            news.append(len(given[2]))
            return submit(work, *given)

        monkeypatch.setattr(worker.pool, "submit", noting)
    model = ArrayRecord({"w": Array(np.zeros(1_000))})
    processes.send_and_receive([write(processes, k, arrays=model) for k in range(8)])
    assert len(news) == 8
    assert 1 <= sum(news) <= 2
