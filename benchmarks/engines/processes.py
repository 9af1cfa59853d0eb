"""Engines as processes: starting them, talking to them, weighing them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import select
import signal
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import BENCHMARKS

# Seconds that an engine may take for one answer.
PATIENCE = 1800.0


class EngineFailedError(Exception):
    """An engine ended or gave no answer; the message is its last words."""


class EngineProcess:
    """An engine in a process of its own; see :mod:`engines.worker`.

    Parameters
    ----------
    python : str
        The interpreter of its environment.
    engine : str
        Its runner's name.
    folder : Path
        Where the work is written.
    *arguments : str
        What else its runner takes.
    environment : Mapping
        Variables besides those of this process.

    Attributes
    ----------
    started : float
        ``time.perf_counter()`` just before the process was started. It imports then,
        and begins when it is entered (``with``).
    deadline : float
        The ``time.perf_counter()`` until which answers are waited for.
    """

    def __init__(
        self,
        python: str,
        engine: str,
        folder: Path,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        path = [str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [python, "-m", f"engines.{engine}", str(folder), *arguments],
            cwd=BENCHMARKS,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, path)),
                "FLWR_TELEMETRY_ENABLED": "0",
                "FLWR_DISABLE_UPDATE_CHECK": "1",
                "RAY_USAGE_STATS_ENABLED": "0",
                "WANDB_MODE": "disabled",
                **(environment or {}),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._version: str | None = None
        self._heard = b""
        self.deadline = math.inf
        self._is_late = False

    def __enter__(self) -> EngineProcess:
        with contextlib.suppress(EngineFailedError):  # It is said at the first answer.
            self._say("begin")
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def version(self) -> str:
        """What the engine says it is; waits until it is ready."""
        if self._version is None:
            self._version = self._answer("ready")
        return self._version

    def run(self, rounds: int) -> float:
        """Let the engine run some rounds; return its seconds."""
        self._say(f"run {rounds}")
        return float(self._answer("done"))

    def run_weighed(self, rounds: int) -> tuple[float, float | None]:
        """Let the engine run some rounds; return its seconds, and the peak PSS.

        The speed of these rounds does not count: looking takes time.
        """
        self._say(f"run {rounds}")
        peak = pss_mb(self.pid)
        while not self._has_answer(0.1):
            peak = max(filter(None, [peak, pss_mb(self.pid)]), default=None)
        peak = max(filter(None, [peak, pss_mb(self.pid)]), default=None)
        return float(self._answer("done")), peak

    def profile(self) -> float:
        """Let the engine run a round whose work on the card it counts; see facts."""
        self._say("profile")
        return float(self._answer("done"))

    def facts(self) -> dict[str, Any]:
        """Return what the engine found out besides its speed."""
        self._say("facts")
        found: dict[str, Any] = json.loads(self._answer("facts"))
        return found

    def weights(self, file: Path) -> None:
        """Let the engine write its global weights."""
        self._say(f"weights {file}")
        self._answer("done")

    def close(self) -> None:
        """Let the engine quit; kill it and its children if it does not."""
        family = processes_below(self.pid)
        with contextlib.suppress(OSError, EngineFailedError):
            self._say("quit")
        try:
            self._process.wait(timeout=0.1 if self._is_late else 30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pid in family[1:]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise EngineFailedError(self._last_words()) from None

    def _has_answer(self, seconds: float) -> bool:
        """Wait so long at most for a whole line, or the end; say whether it came."""
        assert self._process.stdout is not None
        pipe, end = self._process.stdout.fileno(), time.perf_counter() + seconds
        while b"\n" not in self._heard:
            left = max(end - time.perf_counter(), 0.0)
            if not select.select([pipe], [], [], left)[0]:
                return False
            # Not by readline(), which may take a second line off the pipe, and hide it.
            new = os.read(pipe, 1 << 16)
            self._heard += new
            if not new:
                break
        return True

    def _answer(self, expected: str) -> str:
        """Return what follows the expected word."""
        if expected != "ready" and self._version is None:
            self._version = self._answer("ready")
        patience = min(PATIENCE, max(self.deadline - time.perf_counter(), 0.0))
        if not self._has_answer(patience):
            self._is_late = True
            raise EngineFailedError(f"no answer within {patience:.3g} s")
        line, _, self._heard = self._heard.partition(b"\n")
        word, _, rest = line.decode().strip().partition(" ")
        if word != expected:
            raise EngineFailedError(self._last_words())
        return rest

    def errors(self) -> str:
        """Return all that the engine said besides its answers."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def _last_words(self) -> str:
        """Return the last line of the engine's errors, once it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        said = [line.strip() for line in self.errors().split("\n") if line.strip()]
        return said[-1][:300] if said else "it ended without a word"


def processes_below(pid: int) -> list[int]:
    """Return a process and all its descendants; only itself where there is no /proc."""
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name before the last parenthesis may hold anything.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children[parent].append(int(stat.parent.name))
    family = [pid]
    for member in family:
        family += children[member]
    return family


def pss_mb(pid: int) -> float | None:
    """Return the memory of a process and its descendants in MB; None if unknown.

    The sum of their proportional set sizes: a page that n processes share counts as
    one n-th in each.
    """
    total = 0
    for member in processes_below(pid):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{member}/smaps_rollup").read_text()
            for line in text.splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    return total / 1000 * 1.024 if total else None


def machine() -> str:
    """Describe this machine in a line."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    memory = ""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = f", {size / 2**30:.0f} GiB"
    return (
        f"{name}, {os.cpu_count()} cores{memory}, {platform.system()}, "
        f"Python {platform.python_version()}, PyTorch {version('torch')}"
    )
