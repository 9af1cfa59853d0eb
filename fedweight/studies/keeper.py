"""Checkpoints of a run: when they are written, and how a run goes on from one."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy

from ..core.errors import DataError
from ..messages.arrays import FlatRecord, flatten
from ..server import checkpoint
from ..server.checkpoint import (
    carried_by,
    give_back,
    plain_record,
    plain_records,
    record_of,
    records_of,
)
from ..server.loop import ServerState
from ..simulations import SimulationGrid
from .configuration import Configuration
from .folder import write_whole
from .recorder import Recorder

NAME = "checkpoint.safetensors"


class Keeper:
    """Writes a checkpoint every so many rounds or minutes; a callback of the loop.

    Parameters
    ----------
    configuration : Configuration
        Of the run.
    strategy : Strategy
        What runs.
    grid : SimulationGrid
        Where the clients are.
    recorder : Recorder
        What has recorded a round when this is called.
    """

    def __init__(
        self,
        configuration: Configuration,
        strategy: Strategy,
        grid: SimulationGrid,
        recorder: Recorder,
    ) -> None:
        self.configuration = configuration
        self.strategy = strategy
        self.grid = grid
        self.recorder = recorder
        self._written = time.monotonic()

    def __call__(self, state: ServerState) -> None:
        """Write one if it is time; remove it where the run is over."""
        table = self.configuration["run"]
        path = self.recorder.folder / NAME
        if state.round >= table["rounds"]:
            path.unlink(missing_ok=True)
            return
        every, minutes = table["checkpoint-rounds"], table["checkpoint-minutes"]
        passed = (time.monotonic() - self._written) / 60
        due = every and state.round % every == 0
        if due or (minutes and passed >= minutes):
            write_whole(path, checkpoint.write(self._content(state)))
            self._written = time.monotonic()

    def _content(self, state: ServerState) -> dict[str, Any]:
        clients = self.grid.client_states()
        return {
            "run": _digest(self.configuration),
            "round": state.round,
            "arrays": plain_record(state.arrays),
            "train-config": plain_record(state.train_config),
            "evaluate-config": plain_record(state.evaluate_config),
            "schedule": state.schedule,
            "strategy": carried_by(self.strategy),
            "clients": {c: plain_records(records) for c, records in clients.items()},
            "recorder": self.recorder.state,
        }


def read_checkpoint(folder: Path, configuration: Configuration) -> dict[str, Any]:
    """Return the checkpoint of a run that was stopped.

    Raises
    ------
    DataError
        If there is none, or none of this run.
    """
    path = folder / NAME
    content = checkpoint.read(path)
    if content.get("run") != _digest(configuration):
        raise DataError(
            f"{path} belongs to another run: config.toml beside it is not the one that "
            "it was written with."
        )
    return content


def go_on(
    content: Mapping[str, Any],
    strategy: Strategy,
    grid: SimulationGrid,
    recorder: Recorder,
    initial: FlatRecord,
) -> ServerState:
    """Put everything back as it was when a checkpoint was written."""
    give_back(strategy, content["strategy"])
    grid.restore_clients(
        {client: records_of(kept) for client, kept in content["clients"].items()}
    )
    recorder.restore(content["recorder"])
    arrays: Any = record_of(content["arrays"])
    train: Any = record_of(content["train-config"])
    evaluation: Any = record_of(content["evaluate-config"])
    return ServerState(
        _laid_out(arrays, initial),
        content["round"],
        train,
        evaluation,
        content["schedule"],
    )


def _laid_out(arrays: ArrayRecord, initial: FlatRecord) -> ArrayRecord:
    """Return arrays in the layout that the run began with, if their types agree."""
    assert initial.flat is not None
    layout = initial.flat.layout
    types = {entry.name: entry.dtype for entry in layout.entries}
    if types != {name: array.dtype for name, array in arrays.items()}:
        return arrays
    return FlatRecord(flatten(arrays, layout))


def _digest(configuration: Configuration) -> str:
    return hashlib.sha256(configuration.to_toml().encode()).hexdigest()
