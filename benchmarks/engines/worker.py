"""How the program that measures tells a worker, an engine's process, what to run.

Over the engine's standard input and output, a line each. The engine has imported what
it needs when it is told ``begin``, and touched no card yet, so that the next engine may
be started while one is measured. It says ``ready`` with its version; then it is told

* ``run N``: run N rounds, answer ``done`` with the seconds;
* ``profile``: run one, and count what PyTorch does on the card meanwhile;
* ``facts``: answer ``facts`` with what it found out, as JSON;
* ``weights FILE``: write the global weights as one vector, answer ``done``;
* ``quit``.

An engine asks for leave before every round, so it does not matter whether its loop is
its own or lies inside the peer's library.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .card import Profiler
from .job import Job

Weights = Callable[[], npt.NDArray[np.float32]]


class Worker:
    """The engine's side.

    Parameters
    ----------
    version : str
        What is measured, such as ``pfl 0.6.0``; may be added to before the first round.

    Attributes
    ----------
    facts : dict
        What else there is to say, by name; may be added to before any round.
    """

    def __init__(self, version: str) -> None:
        # What libraries print goes to the error stream, and they cannot read along.
        self._commands = os.fdopen(os.dup(0))
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(2, 1)
        self.version = version
        self.facts: dict[str, Any] = {}
        self._said_ready = False
        self._left = 0
        self._began: float | None = None
        self._profiler: Profiler | None = None
        if self._commands.readline().strip() != "begin":
            sys.exit()

    def next_round(self, weights: Weights) -> bool:
        """Wait for leave to run one more round; return False when it is over.

        Parameters
        ----------
        weights : Callable
            Returns the global weights as they are now.
        """
        if self._left:
            self._left -= 1
            return True
        if self._began is not None:
            if torch.cuda.is_initialized():  # What is only queued is not done.
                torch.cuda.synchronize()
            seconds = time.perf_counter() - self._began
            if self._profiler is not None:
                self.facts |= self._profiler.end()
                self._profiler = None
            self._answer(f"done {seconds}")
            self._began = None
        if not self._said_ready:
            self._said_ready = True
            self._answer(f"ready {self.version}")
        for line in self._commands:
            command, _, argument = line.strip().partition(" ")
            if command == "run":
                self._left = int(argument) - 1
                self._began = time.perf_counter()
                return True
            if command == "profile":
                self._profiler = Profiler() if torch.cuda.is_initialized() else None
                self._began = time.perf_counter()
                return True
            if command == "facts":
                self._answer(f"facts {json.dumps(self.facts)}")
            if command == "weights":
                np.save(Path(argument), weights())
                self._answer("done")
            if command == "quit":
                break
        return False

    def _answer(self, line: str) -> None:
        print(line, file=self._answers, flush=True)


def start(version: str) -> tuple[Worker, Job]:
    """Begin: read the job from the folder that the command line names."""
    worker = Worker(version)
    return worker, Job(sys.argv[1])
