"""Flower's own processes, for the time of a test or of a module's, and no longer."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

SECONDS = 150  # for a run; an idle machine needs a fifth of that


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on, all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Flower:
    """A place for Flower: its own home, its own ports, a copy of the app.

    Every process that is started here, and every one that those start, has this home
    in its environment. So they can be found, and ended by their ids.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "flwr"
        self.home.mkdir()
        self.app = folder / "fedweight-clone"
        self.app.mkdir()
        for name in ("fedweight", "strategies", "pyproject.toml", ".gitignore"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.app / name)
        port, old_port = free_ports(2)
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder),
            "FLWR_HOME": str(self.home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
            "FLWR_LOCAL_CONTROL_API_PORT": str(old_port),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        }
        self.children: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str, programs: Path = BIN) -> None:
        """Start a process that stays, of a folder of programs."""
        environment = self.environment
        if programs != BIN:
            path = f"{programs}{os.pathsep}{os.environ['PATH']}"
            environment = {**environment, "PATH": path}
            environment.pop("PYTHONPATH", None)
        log = (self.folder / f"{command[0]}-{len(self.children)}.log").open("wb")
        with log:
            self.children.append(
                subprocess.Popen(
                    command,
                    executable=programs / command[0],
                    env=environment,
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )

    def wait_for(self, address: str) -> None:
        """Wait until somebody listens there."""
        host, port = address.split(":")
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection((host, int(port)), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline, f"nobody listens at {address}"
                time.sleep(0.1)

    def flwr(self, *arguments: str, check: bool = True) -> str:
        """Run the command ``flwr`` in the app's folder."""
        done = subprocess.run(
            [str(BIN / "flwr"), *arguments],
            env=self.environment,
            cwd=self.app,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, *arguments: str, connection: str = "") -> dict[str, Any]:
        """Run the app until its end; return what Flower says of the run.

        ``flwr run --stream`` succeeds even where the run failed, so only the list of
        runs tells.
        """
        where = [connection] if connection else []
        log = self.flwr("run", ".", *where, "--stream", *arguments)
        started = re.search(r"started run (\d+)", log)
        assert started, log
        asked = ("--run-id", started[1], "--format", "json")
        deadline = time.monotonic() + 10
        while True:
            (run,) = json.loads(self.flwr("list", *where, *asked))["runs"]
            if run["status"].startswith("finished"):
                return {**run, "log": log}
            assert time.monotonic() < deadline, log
            time.sleep(0.5)

    def processes(self) -> list[int]:
        """Return the processes of this place, those that daemons started included."""
        mark = f"FLWR_HOME={self.home}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # no process, or somebody else's, or gone
                continue
            if mark in environment and int(entry.name) != os.getpid():
                found.append(int(entry.name))
        return found

    def stop(self) -> list[int]:
        """End everything; return the processes that had to be killed."""
        for number, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
            stubborn = self.processes()
            for process in stubborn:
                try:
                    os.kill(process, number)
                except ProcessLookupError:
                    continue
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                for child in self.children:
                    child.poll()  # or it would stay as a zombie
                if not self.processes():
                    return stubborn if number == signal.SIGKILL else []
                time.sleep(0.2)
        return self.processes()


def _place(folder: Path) -> Iterator[Flower]:
    if not Path("/proc/self/environ").exists():
        pytest.skip("needs /proc to find, and end, what Flower starts")
    place = Flower(folder)
    yield place
    assert place.stop() == []


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[Flower]:
    yield from _place(tmp_path)


@pytest.fixture(scope="module")
def lasting_flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    """A place whose SuperLink, once started, serves all runs of a module."""
    yield from _place(tmp_path_factory.mktemp("flower"))


@pytest.fixture
def ports() -> Callable[[int], list[int]]:
    return free_ports
