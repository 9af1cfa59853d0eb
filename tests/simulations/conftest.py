"""Grids for the tests, and programs that start their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedweight.messages import _flower
from fedweight.simulations.grid import SimulationGrid, is_stranger
from fedweight.simulations.local import LocalGrid


@pytest.fixture(autouse=True)
def _identity() -> Iterator[None]:
    """Let the tests write messages, as a ServerApp may."""
    with _flower.task_identity(run_id=0):
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Let PyTorch's operations have two threads, as in a program; tests have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def session_processes() -> Iterator[Any]:
    from fedweight.simulations.workers.grid import ProcessGrid

    grid = ProcessGrid(ClientApp(), 1, workers=2)
    yield grid
    grid.close()


@pytest.fixture
def processes(session_processes: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Give the grid of two processes; ``load`` an app before use."""
    # They need not find the test modules either.
    cloudpickle.register_pickle_by_value(request.module)
    yield session_processes
    cloudpickle.unregister_pickle_by_value(request.module)


@pytest.fixture
def ray_grids(
    ray_session: Any, session_grids: list[Any], request: pytest.FixtureRequest
) -> Iterator[list[Any]]:
    """Give a grid of one worker and one of two; ``load`` an app before use."""
    # The workers need not find the test modules: what they define travels along.
    ray_session.cloudpickle.register_pickle_by_value(request.module)
    yield session_grids
    ray_session.cloudpickle.unregister_pickle_by_value(request.module)


@pytest.fixture
def ray_grid(ray_grids: list[Any]) -> Any:
    """Give the grid of two workers."""
    return ray_grids[1]


@pytest.fixture
def everywhere(
    ray_grids: list[Any], processes: Any
) -> Callable[[Callable[[SimulationGrid], Any], ClientApp, int], Any]:
    """Give a function that runs something on every grid and expects the same of all.

    It returns what the local grid gave.
    """

    def play(
        what: Callable[[SimulationGrid], Any],
        client_app: ClientApp,
        num_clients: int,
        run_config: dict[str, Any] | None = None,
    ) -> Any:
        local = what(LocalGrid(client_app, num_clients, run_config))
        own = [processes] if is_stranger(client_app) else []
        for grid in (*own, *ray_grids):
            grid.load(client_app, num_clients, run_config)
            assert what(grid) == local, f"{type(grid).__name__}, {grid.workers}"
        return local

    return play


APART = [
    pytest.param("processes", marks=pytest.mark.processes),
    pytest.param("ray_grid", marks=pytest.mark.ray),
]


@pytest.fixture(params=["local", *APART])
def make(request: pytest.FixtureRequest) -> Callable[..., SimulationGrid]:
    """Give a function that makes a grid, of any kind."""
    return _maker(request)


@pytest.fixture(params=APART)
def make_apart(request: pytest.FixtureRequest) -> Callable[..., SimulationGrid]:
    """Give a function that makes a grid whose clients are in other processes."""
    return _maker(request)


def _maker(request: pytest.FixtureRequest) -> Callable[..., SimulationGrid]:
    if request.param == "local":
        return LocalGrid
    grid = request.getfixturevalue(request.param)

    def load(*arguments: Any, **nodes: Any) -> SimulationGrid:
        grid.load(*arguments, **nodes)
        return grid

    return load


@pytest.fixture
def serve() -> Callable[[ServerApp, SimulationGrid], Context]:
    """Give a function that runs a ServerApp on a grid, as ``simulate`` does."""

    def run(
        server_app: ServerApp,
        grid: SimulationGrid,
        run_config: dict[str, Any] | None = None,
    ) -> Context:
        context = Context(0, 1, {}, RecordDict(), dict(run_config or {}))
        server_app(grid, context)
        return context

    return run


@pytest.fixture
def write() -> Callable[..., Message]:
    """Give a function that writes a message to a client."""

    def message(
        grid: SimulationGrid,
        client: int,
        kind: str = "train",
        arrays: ArrayRecord | None = None,
        **config: Any,
    ) -> Message:
        content = RecordDict({"config": ConfigRecord(config)})
        if arrays is not None:
            content["arrays"] = arrays
        return Message(content, list(grid.get_node_ids())[client], kind)

    return message


class Script:
    """A Python program in a process group of its own, and what it leaves behind."""

    def __init__(self, text: str, folder: Path) -> None:
        path = folder / "script.py"
        path.write_text(text)
        root = str(Path(__file__).parents[2])
        self.mark = f"FEDWEIGHT_TEST={uuid.uuid4()}"
        name, _, value = self.mark.partition("=")
        self.errors = folder / "errors.txt"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(path)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=root,  # Ray's workers find modules where the program stands
                env={**os.environ, "PYTHONPATH": root, name: value},
                start_new_session=True,
            )

    def wait_for(self, line: str) -> None:
        """Read the output until a line."""
        assert self.process.stdout is not None
        for got in self.process.stdout:
            if got.strip() == line:
                return
        raise AssertionError(f"no line {line!r}: {self.errors.read_text()}")

    def interrupt(self) -> None:
        """Do what Ctrl-C does: it reaches every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def finish(self) -> str:
        """Wait for the end; return the rest of the output."""
        output, _ = self.process.communicate(timeout=100)
        return output

    def left_behind(self) -> list[str]:
        """Return the commands of the processes that outlive it by five seconds."""
        deadline = time.monotonic() + 5
        while (left := self._members()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return list(left.values())

    def kill(self) -> None:
        for number in self._members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self.process.communicate()

    def _members(self) -> dict[int, str]:
        """Find the processes that have inherited this program's mark."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environment = (entry / "environ").read_bytes()
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if self.mark.encode() in environment:
                found[int(entry.name)] = command.replace(b"\0", b" ").decode()
        return found


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Callable[[str], Script]]:
    """Give a function that starts a Python program; it is gone after the test."""
    started: list[Script] = []

    def start(text: str) -> Script:
        started.append(Script(text, tmp_path))
        return started[-1]

    yield start
    for one in started:
        one.kill()
