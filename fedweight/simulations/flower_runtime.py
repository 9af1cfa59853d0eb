"""The same app on Flower's own simulation runtime, to compare: a program of its own.

``python -m fedweight.simulations.flower_runtime`` reads what to run as JSON and writes
what it saw, since Flower's runtime ends the Ray of the process that it runs in.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Context, Message
from flwr.serverapp import Grid

from ..core.errors import EngineError
from ..messages import _flower
from .app_folder import AppFolder, backend_config
from .seen import Seen


@dataclass
class Outcome:
    """What came of an app that ran in another process.

    Attributes
    ----------
    arrays : list[ndarray]
        The model that was sent last.
    metrics : dict
        As :class:`~fedweight.simulations.seen.Seen` has them; where it ran on
        Flower's runtime a client is its node.
    seconds, seconds_started : float
        How long it took, and without start-up: from the first reply on.
    """

    arrays: list[npt.NDArray[Any]]
    metrics: dict[str, list[dict[str, Any]]]
    seconds: float
    seconds_started: float

    def save(self, folder: str | Path) -> None:
        """Write it to a folder."""
        np.savez(Path(folder, "arrays.npz"), *self.arrays)
        told = {name: v for name, v in vars(self).items() if name != "arrays"}
        Path(folder, "result.json").write_text(json.dumps(told), "utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Outcome:
        """Read what :meth:`save` has written."""
        told = json.loads(Path(folder, "result.json").read_text("utf-8"))
        with np.load(Path(folder, "arrays.npz"), allow_pickle=False) as saved:
            arrays = [saved[f"arr_{k}"] for k in range(len(saved.files))]
        return cls(arrays=arrays, **told)


class _Watched(Grid):
    """Another grid, with what passes through it noted."""

    def __init__(self, grid: Grid, seen: Seen) -> None:
        self._grid, self._seen = grid, seen

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        return self._grid.create_message(*arguments, **named)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(self._noted(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(self._grid.pull_messages(message_ids))
        self._seen.replied(replies)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        sent = self._noted(messages)
        replies = list(self._grid.send_and_receive(sent, timeout=timeout))
        self._seen.replied(replies)
        return replies

    def _noted(self, messages: Iterable[Message]) -> list[Message]:
        batch = list(messages)
        for message in batch:
            self._seen.sent(message)
        return batch


def run_on_flower(
    folder: AppFolder, overrides: Mapping[str, Any], federation: Mapping[str, Any]
) -> Outcome:
    """Run an app as ``flwr run`` would simulate it, in another process.

    Parameters
    ----------
    folder : AppFolder
        The app.
    overrides : Mapping
        Settings other than the app's own.
    federation : Mapping
        Keys and values of ``--federation-config``.

    Raises
    ------
    EngineError
        Where that does not succeed.
    """
    with tempfile.TemporaryDirectory() as place:
        told = {
            "folder": str(folder.path),
            "overrides": dict(overrides),
            "federation": dict(federation),
            "place": place,
        }
        program = [sys.executable, "-m", __name__, json.dumps(told)]
        status = subprocess.run(program, check=False).returncode
        if status or not Path(place, "result.json").is_file():
            raise EngineError(
                f"Flower's own runtime did not run the app to its end: status {status}."
            )
        return Outcome.load(place)


def _main(told: dict[str, Any]) -> None:
    folder = AppFolder.read(told["folder"])
    sys.path.insert(0, str(folder.path))
    server_app, _ = folder.load()
    seen = Seen(lambda node: node)
    ended = 0.0

    def watched(grid: Grid, context: Context) -> None:
        nonlocal ended
        server_app(_Watched(grid, seen), context)
        ended = time.perf_counter()

    began = time.perf_counter()
    federation = told["federation"]
    _flower.run_folder(
        watched,
        client_app=folder.client_app,
        folder=str(folder.path),
        run_config={**folder.run_config, **told["overrides"]},
        overrides=told["overrides"],
        num_supernodes=federation["num-supernodes"],
        backend_config=backend_config(federation),
    )
    whole = time.perf_counter() - began
    arrays = (seen.arrays or ArrayRecord()).to_numpy_ndarrays()
    rest = ended - (seen.began or began)
    Outcome(arrays, seen.metrics, whole, rest).save(told["place"])


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
