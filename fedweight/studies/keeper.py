"""Checkpoints of a run: when they are written, and how a run goes on from one."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy

from ..core.errors import DataError
from ..core.writing import write_whole
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
from .folder import CHECKPOINT


class Remembers(Protocol):
    """What a checkpoint holds besides the loop's state."""

    @property
    def state(self) -> Any:
        """What it remembers, as plain values."""
        ...

    def restore(self, state: Any) -> None:
        """Go on with what another one remembered."""
        ...


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
    folder : Path
        The run's folder.
    others : Mapping[str, Remembers]
        What else is carried from round to round; all of it has seen a round when this
        is called.
    over : Callable[[], bool]
        Whether the round is the last one, though more were asked for.
    """

    def __init__(
        self,
        configuration: Configuration,
        strategy: Strategy,
        grid: SimulationGrid,
        folder: Path,
        others: Mapping[str, Remembers],
        over: Callable[[], bool],
    ) -> None:
        self.configuration = configuration
        self.strategy = strategy
        self.grid = grid
        self.path = folder / CHECKPOINT
        self.others = others
        self.over = over
        self._written = time.monotonic()

    def __call__(self, state: ServerState) -> None:
        """Write one if it is time, and the run is not over."""
        table = self.configuration["run"]
        if state.round >= table["rounds"] or self.over():
            return
        every, minutes = table["checkpoint-rounds"], table["checkpoint-minutes"]
        passed = (time.monotonic() - self._written) / 60
        due = every and state.round % every == 0
        if due or (minutes and passed >= minutes):
            write_whole(self.path, checkpoint.write(self._content(state)))
            self.grid.store.release()
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
            "store": self.grid.store.secure(),
            **{name: other.state for name, other in self.others.items()},
        }


def read_checkpoint(folder: Path, configuration: Configuration) -> dict[str, Any]:
    """Return the checkpoint of a run that was stopped.

    Raises
    ------
    DataError
        If there is none, or none of this run.
    """
    path = folder / CHECKPOINT
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
    others: Mapping[str, Remembers],
    initial: FlatRecord,
) -> ServerState:
    """Put everything back as it was when a checkpoint was written.

    But for the grid's store: that goes on with files of its own.
    """
    give_back(strategy, content["strategy"])
    grid.restore_clients(
        {client: records_of(kept) for client, kept in content["clients"].items()}
    )
    for name, other in others.items():
        other.restore(content[name])
    arrays: Any = record_of(content["arrays"])
    train: Any = record_of(content["train-config"])
    evaluation: Any = record_of(content["evaluate-config"])
    return ServerState(
        _laid_out(arrays, initial),
        content["round"],
        train,
        evaluation,
        schedule=content["schedule"],
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
