"""The Ray grid: the same bits as the local one, what travels, and what stays behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.app import MetricRecord as Metrics
from flwr.clientapp import ClientApp

from fedweight import Run, models
from fedweight.clients import TrainingApp, TrainingSettings
from fedweight.core.errors import ConfigurationError, EngineError
from fedweight.core.layout import FlatModel, Layout
from fedweight.core.module import FlatModule
from fedweight.data import federate, load
from fedweight.messages.arrays import FlatRecord
from fedweight.simulations.grid import FIRST_NODE
from fedweight.simulations.ray import watch
from fedweight.strategies.fedavg import FedAvg

pytestmark = pytest.mark.ray


def app_of(handler: Callable[[Message, Context], Any]) -> ClientApp:
    app = ClientApp()
    app.train()(handler)
    return app


def answer(message: Message, **metrics: Any) -> Message:
    return Message(RecordDict({"metrics": Metrics(metrics)}), reply_to=message)


def echo(message: Message, context: Context) -> Message:
    client = context.node_config["partition-id"]
    time.sleep(message.content["config"].get("seconds", 0))
    return answer(message, client=client, tag=message.content["config"].get("tag", 0))


def flat(size: int) -> FlatRecord:
    layout = Layout.of({"w": ((size,), "float32")}, ())
    return FlatRecord(FlatModel(layout, torch.arange(float(size)), torch.empty(0)))


def metrics_of(replies: Any, name: str) -> list[Any]:
    return [reply.content["metrics"][name] for reply in replies]


# The same bits.


@pytest.mark.parametrize("request_", [(), ("minus-error", "label-counts")])
def test_training_gives_the_bits_of_the_local_grid(
    everywhere: Any, request_: tuple[str, ...]
) -> None:
    data = federate(load("digits"), "dirichlet", 12, seed=0, alpha=0.3)

    def model() -> torch.nn.Module:
        return models.build("mlp", data.input_shape, data.num_classes, seed=0)

    app = TrainingApp(
        model,
        lambda context: data.client(int(context.node_config["partition-id"])),
        num_classes=data.num_classes,
        settings=TrainingSettings(epochs=2, batch_size=16, learning_rate=0.1),
    )
    initial = FlatRecord(FlatModule(model()).save())

    class Asking(FedAvg):
        request = request_

        def tell(self, selection: Any) -> dict[str, Any]:
            return {"coefficient": [1 / (c + 2) for c in selection.clients]}

    def play(grid: Any) -> tuple[bytes, str]:
        strategy = Asking(fraction_train=0.5)
        result = strategy.start(grid, initial, num_rounds=3)
        assert isinstance(result.arrays, FlatRecord)
        assert result.arrays.flat is not None
        return result.arrays.flat.parameters.numpy().tobytes(), repr(strategy.history)

    _, history = everywhere(play, app, 12)
    assert history.count("'train-loss'") >= 18
    assert "failed" not in history


# What travels.


class Loaded:
    """Counts how often this process has unpickled it."""

    count = 0

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self.values = values

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        os.environ["FEDWEIGHT_LOADED"] = str(
            int(os.environ.get("FEDWEIGHT_LOADED", "0")) + 1
        )


def test_app_is_sent_once_and_its_arrays_are_shared(ray_grid: Any, write: Any) -> None:
    held = Loaded(np.arange(100_000.0))

    def train(message: Message, context: Context) -> Message:
        return answer(
            message,
            count=int(os.environ["FEDWEIGHT_LOADED"]),
            copied=int(held.values.flags.owndata or held.values.flags.writeable),
            total=float(held.values.sum()),
        )

    ray_grid.load(app_of(train), 10)
    for _ in range(3):
        replies = ray_grid.send_and_receive([write(ray_grid, k) for k in range(10)])
        assert metrics_of(replies, "count") == [1] * 10
        assert metrics_of(replies, "copied") == [0] * 10
        assert metrics_of(replies, "total") == [held.values.sum()] * 10


@pytest.mark.parametrize("plain", [False, True])
def test_global_model_is_put_once_a_round(
    ray_grid: Any,
    write: Any,
    ray_session: Any,
    monkeypatch: pytest.MonkeyPatch,
    plain: bool,
) -> None:
    put = []
    original = ray_session.put

    def counting(value: Any) -> Any:
        put.append(value)
        return original(value)

    ray_grid.load(app_of(echo), 30)
    monkeypatch.setattr("ray.put", counting)
    model: ArrayRecord = flat(50_000).plain() if plain else flat(50_000)
    for _ in range(2):
        put.clear()
        ray_grid.send_and_receive([write(ray_grid, k, arrays=model) for k in range(30)])
        assert len(put) == 1
        assert put[0] is model


def test_vectors_stay_vectors(ray_grid: Any, write: Any) -> None:
    def train(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"]
        assert isinstance(arrays, FlatRecord)
        assert arrays.flat is not None
        return Message(RecordDict({"arrays": arrays}), reply_to=message)

    ray_grid.load(app_of(train), 3)
    sent = flat(50_000)
    messages = [write(ray_grid, k, arrays=sent) for k in range(3)]
    for reply in ray_grid.send_and_receive(messages):
        record = reply.content["arrays"]
        assert isinstance(record, FlatRecord)
        assert sent.flat is not None
        assert torch.equal(record.flat.parameters, sent.flat.parameters)


def test_slow_clients_begin_first(
    ray_grid: Any, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray_grid.load(app_of(echo), 12)
    # One client takes as long as all others together.
    messages = [write(ray_grid, k, seconds=0.2 if k == 7 else 0.02) for k in range(12)]
    ray_grid.send_and_receive(messages)
    first: list[list[int]] = []
    send = ray_grid._pool.crew.send

    def noting(worker: Any, jobs: Any, *known: Any) -> Any:
        first.append([c for job in jobs for c in job.clients])
        return send(worker, jobs, *known)

    monkeypatch.setattr(ray_grid._pool.crew, "send", noting)
    ray_grid.send_and_receive(messages)
    assert [7] in first[:2]


def test_no_state_is_kept_of_clients_that_have_none(ray_grid: Any, write: Any) -> None:
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            context.state["model"] = flat(50_000)
        return answer(message)

    ray_grid.load(app_of(train), 3)
    ray_grid.send_and_receive([write(ray_grid, k) for k in range(3)])
    assert list(ray_grid._pool._states) == [1]


def test_load_begins_anew(ray_grid: Any, write: Any) -> None:
    def train(message: Message, context: Context) -> Message:
        found = len(context.state)
        context.state["seen"] = ConfigRecord()
        return answer(message, found=found, value=int(context.run_config["value"]))

    ray_grid.load(app_of(train), 2, {"value": 1})
    left = ray_grid.push_messages([write(ray_grid, k) for k in range(2)])
    ray_grid.load(app_of(train), 3, {"value": 2})
    assert list(ray_grid.pull_messages(left)) == []
    replies = list(ray_grid.send_and_receive([write(ray_grid, k) for k in range(3)]))
    assert metrics_of(replies, "found") == [0, 0, 0]
    assert metrics_of(replies, "value") == [2, 2, 2]


# Waiting.


def test_rounds_from_two_threads(ray_grid: Any, write: Any) -> None:
    ray_grid.load(app_of(echo), 40)
    found: dict[int, list[int]] = {}

    def play(first: int) -> None:
        messages = [write(ray_grid, k) for k in range(first, first + 20)]
        for _ in range(5):
            found[first] = metrics_of(ray_grid.send_and_receive(messages), "client")

    threads = [threading.Thread(target=play, args=(first,)) for first in (0, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: list(range(20)), 20: list(range(20, 40))}


# What goes wrong.


def test_client_that_kills_its_worker(ray_grid: Any, write: Any) -> None:
    def train(message: Message, context: Context) -> Message:
        past = context.state.get("past", Metrics({"calls": 0}))["calls"]
        context.state["past"] = Metrics({"calls": past + 1})
        if context.node_config["partition-id"] == 3 and past == 1:
            os._exit(1)
        return answer(message, calls=past + 1)

    ray_grid.load(app_of(train), 6)
    failed = []
    for _ in range(3):
        replies = list(
            ray_grid.send_and_receive([write(ray_grid, k) for k in range(6)])
        )
        assert [r.metadata.src_node_id - FIRST_NODE for r in replies] == list(range(6))
        failed.append([k for k, reply in enumerate(replies) if reply.has_error()])
    # It fails by itself, whichever clients its worker had besides; nobody else's state
    # has moved twice, and its own has not moved.
    assert failed == [[], [3], [3]]
    assert metrics_of(replies[:3] + replies[4:], "calls") == [3] * 5
    reason = replies[3].error.reason
    assert reason.startswith("client 3, train: its worker process died: ")
    assert "OOM" in reason


def test_reply_that_cannot_travel(ray_grid: Any, write: Any) -> None:
    def train(message: Message, context: Context) -> Message:
        reply = answer(message)
        if context.node_config["partition-id"] == 1:
            reply.__dict__["lock"] = threading.Lock()
        return reply

    ray_grid.load(app_of(train), 4)
    replies = list(ray_grid.send_and_receive([write(ray_grid, k) for k in range(4)]))
    assert [r.has_error() for r in replies] == [False, True, False, False]
    assert "its worker failed" in replies[1].error.reason
    assert "cannot pickle '_thread.lock' object" in replies[1].error.reason


def test_app_that_cannot_travel(ray_grid: Any) -> None:
    guard = threading.Lock()

    def train(message: Message, context: Context) -> Message:
        with guard:
            return answer(message)

    with pytest.raises(EngineError) as caught:
        ray_grid.load(app_of(train), 2)
    text = str(caught.value)
    assert text.startswith("the ClientApp cannot be sent to Ray workers")
    assert "'guard' (lock)" in text
    assert "engine = 'local'" in text


class Homebound:
    def __setstate__(self, state: Any) -> None:
        raise ModuleNotFoundError("No module named 'at_home'")

    def __getstate__(self) -> Any:
        return {"a": 1}


def test_app_that_cannot_be_loaded(ray_grid: Any) -> None:
    held = Homebound()
    with pytest.raises(EngineError, match=r"(?s)cannot load the ClientApp.*at_home"):
        ray_grid.load(app_of(lambda message, context: held), 2)


def test_no_gpus(ray_session: Any) -> None:
    from fedweight.simulations.ray.grid import RayGrid

    if ray_session.cluster_resources().get("GPU"):
        pytest.skip("there are GPUs")
    with pytest.raises(EngineError, match=r"Ray has 0 GPUs.*room for 0 workers"):
        RayGrid(ClientApp(), 2, gpus_per_worker=0.5)
    with pytest.raises(EngineError, match="a fraction below 1 or a whole number"):
        RayGrid(ClientApp(), 2, gpus_per_worker=1.5)


@pytest.mark.parametrize(
    ("resources", "asked", "expected"),
    [
        ({"CPU": 8.0}, (None, 0.0), (8, {"num_cpus": 1.0})),
        ({"CPU": 8.0}, (3, 0.0), (3, {"num_cpus": 1.0})),
        ({"CPU": 2.0}, (3, 0.0), (3, {"num_cpus": 0.6666})),
        ({"CPU": 9.0, "GPU": 2.0}, (None, 0.4), (4, {"num_gpus": 0.4, "num_cpus": 1})),
        ({"CPU": 9.0, "GPU": 8.0}, (None, 2), (4, {"num_gpus": 2, "num_cpus": 1})),
        ({"CPU": 2.0, "GPU": 1.0}, (4, 0.2), (4, {"num_gpus": 0.2, "num_cpus": 0.5})),
    ],
)  # fmt: skip
def test_resources(
    resources: dict[str, float],
    asked: tuple[int | None, float],
    expected: tuple[int, dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fedweight.simulations.ray.grid import _resources

    monkeypatch.setattr("ray.cluster_resources", lambda: resources)
    assert _resources(*asked) == expected


def test_address_of_another_ray(ray_session: Any) -> None:
    from fedweight.simulations.ray.grid import RayGrid

    with pytest.raises(EngineError, match="Ray is initialised already"):
        RayGrid(ClientApp(), 2, address="127.0.0.1:1")


def test_addresses_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedweight.simulations.ray.grid import RayGrid

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    for address in ("nonsense", ":6379", "host:port"):
        with pytest.raises(
            ConfigurationError, match=r"must be 'auto' or the host:port"
        ):
            RayGrid(ClientApp(), 2, address=address)

    def nobody(**options: object) -> None:
        raise ConnectionError("Set --address")

    with monkeypatch.context() as patched:
        patched.setattr("ray.init", nobody)
        patched.setattr("ray.shutdown", lambda: None)  # The session is others', too.
        with pytest.raises(EngineError, match="no Ray cluster runs on this machine"):
            RayGrid(ClientApp(), 2, address="auto")
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    with pytest.raises(EngineError, match=r"nobody answers .*ray start --head"):
        RayGrid(ClientApp(), 2, address=f"127.0.0.1:{free}")


def test_closed_grid(ray_session: Any, write: Any) -> None:
    from fedweight.simulations.ray.grid import RayGrid

    before = threading.active_count()
    grid = RayGrid(ClientApp(), 2, workers=1)
    message = write(grid, 0)
    grid.push_messages([message])
    grid.close()
    grid.close()
    assert threading.active_count() == before
    assert ray_session.is_initialized()  # It was there before the grid.
    for use in (
        lambda: grid.push_messages([message]),
        lambda: grid.pull_messages(["message-1"]),
        lambda: grid.send_and_receive([message]),
        lambda: grid.load(ClientApp(), 1),
    ):
        with pytest.raises(EngineError, match="the grid is closed"):
            use()


# What stays behind: programs that start a Ray of their own.

PROGRAM = """
import sys, time
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from fedweight.messages import _flower
from fedweight.simulations.ray.grid import RayGrid

folder = Path({folder!r})
values = [1, 2, 3]
app = ClientApp()

@app.train()
def train(message, context):
    client = context.node_config["partition-id"]
    print("printed by client", client, values)
    (folder / f"client-{{client}}").touch()
    time.sleep({seconds})
    return Message(RecordDict(), reply_to=message)

with _flower.task_identity(0):
    grid = RayGrid(app, 4, {arguments})
    messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    print("ready", flush=True)
    {rest}
"""


def started(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(list(folder.glob("client-*"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_interrupt(script: Any, tmp_path: Path) -> None:
    rest = """
    try:
        grid.send_and_receive(messages)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    finally:
        grid.close()
    print("closed", flush=True)
    """
    program = script(
        PROGRAM.format(
            folder=str(tmp_path), seconds=60, arguments="workers=2", rest=rest
        )
    )
    program.wait_for("ready")
    started(tmp_path, 2)
    began = time.perf_counter()
    program.interrupt()
    program.wait_for("interrupted")
    assert time.perf_counter() - began < 1
    assert program.finish() == "closed\n"
    assert program.left_behind() == []


def test_grid_that_nobody_closes(script: Any, tmp_path: Path) -> None:
    rest = """
    print(len(list(grid.send_and_receive(messages))), flush=True)
    raise RuntimeError("as planned")
    """
    program = script(
        PROGRAM.format(
            folder=str(tmp_path), seconds=0, arguments="workers=1", rest=rest
        )
    )
    assert program.finish() == "ready\n4\n"  # and nothing of what the clients print
    assert program.process.returncode == 1
    assert "RuntimeError: as planned" in program.errors.read_text()
    assert "Warning" not in program.errors.read_text()
    assert program.left_behind() == []


ENDLESS = """
import time
from fedweight import run

def progress(progress):
    print("round", progress.round, flush=True)
    time.sleep({pause})

run(
    engine="ray",
    out={folder!r},
    settings={{
        "run.rounds": 100_000,
        "partition.clients": 4,
        "training.epochs": 1,
        "engine.workers": 2,
    }},
    progress=progress,
)
"""


def wait_for_agents(session: str, mark: str) -> None:
    """Wait until Ray's agents have started: then they wipe their environment.

    Now and then one of them does not, so nobody waits for ever.
    """
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if len(watch.writing_to(session) - watch.marked(mark.encode())) >= 2:
            break
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("number", "settled"),
    [(signal.SIGTERM, False), (signal.SIGKILL, False), (signal.SIGKILL, True)],
)
def test_a_run_that_is_ended_leaves_no_process(
    script: Any, tmp_path: Path, number: signal.Signals, settled: bool
) -> None:
    folder = tmp_path / "run"
    # A run that takes its time leaves the cores to the agents.
    program = script(ENDLESS.format(folder=str(folder), pause=int(settled)))
    program.wait_for("round 1")
    # An earlier process may have had this number: the last one is this one's.
    session = max(Path("/tmp/ray").glob(f"session_*_{program.process.pid}"))
    if settled:
        wait_for_agents(str(session), program.mark)
    os.kill(program.process.pid, number)
    program.finish()
    assert program.process.returncode == -number
    assert program.left_behind() == []
    # Ray's agents, which wipe their environment, still write to their logs.
    assert watch.writing_to(str(session)) == set()
    said = program.errors.read_text()
    assert "SIGTERM" not in said  # Ray would write where each thread was.
    assert "Traceback" not in said
    stopped = Run(folder)
    assert stopped.rounds_done >= (number == signal.SIGTERM)
    if number == signal.SIGTERM:
        assert stopped.model()
        assert not list(folder.glob(".*"))


def test_processes_are_told_by_their_mark() -> None:
    mark = f"FEDWEIGHT_TEST_{os.getpid()}=1"
    program = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    name, _, value = mark.partition("=")
    with subprocess.Popen(
        program, env={**os.environ, name: value}, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            assert watch.marked(mark.encode()) == {process.pid}
            assert watch.marked(mark[:-1].encode()) == set()
            assert watch.marked(name.encode()) == set()
        finally:
            process.kill()
    assert watch.marked(mark.encode()) == set()


def test_a_process_that_is_just_being_started_is_ended_too() -> None:
    """It has no mark yet when the driver is killed."""
    name = f"FEDWEIGHT_TEST_LATE_{os.getpid()}"
    late = (
        "import os, sys, time; time.sleep(0.5)\n"
        f"os.environ[{name!r}] = '1'\n"
        "then = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "os.execv(sys.executable, then)"
    )
    with subprocess.Popen([sys.executable, "-c", late]) as process:
        try:
            subprocess.run(
                [sys.executable, "-I", "-S", watch.__file__, f"{name}=1"],
                stdin=subprocess.DEVNULL,
                timeout=60,
                check=True,
            )
            assert process.wait(timeout=1) == -signal.SIGKILL
        finally:
            process.kill()


def test_cluster_that_is_joined_stays(
    script: Any, tmp_path: Path, ray_session: Any
) -> None:
    address = ray_session.get_runtime_context().gcs_address
    rest = """
    print(len(list(grid.send_and_receive(messages))), flush=True)
    grid.close()
    """
    program = script(
        PROGRAM.format(
            folder=str(tmp_path),
            seconds=0,
            arguments=f"workers=1, address={address!r}",
            rest=rest,
        )
    )
    assert program.finish() == "ready\n4\n", program.errors.read_text()
    assert program.left_behind() == []
    assert ray_session.get(ray_session.put(1)) == 1
