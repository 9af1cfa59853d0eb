"""Trackers: what follows a run elsewhere, in TensorBoard, MLflow or Weights & Biases.

A tracker is given among a run's ``callbacks``. It is told what the run's own tables
hold, when they hold it; it decides nothing, and changes no bit of the run.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import ConfigurationError
from ..core.extras import require
from ..core.texts import plain

log = logging.getLogger("fedweight")

# MLflow takes no more parameters at once, and of each no more characters.
_AT_ONCE = 100
_LONGEST = 500
# What the name of a metric may not hold there.
_ODD = re.compile(r"[^/\w.\- :]")


class Tracker:
    """Follows a run; the base of one's own.

    A subclass says what it does in :meth:`log`, and in :meth:`begin` and :meth:`end`
    where it needs to. What it raises ends no run: it is said in a line, and the rest of
    the run is not tracked.

    Parameters
    ----------
    clients : bool
        Whether :meth:`log` is told each client's values, too.
    groups : bool
        Whether it is told those of groups, where a run measures by groups.

    Examples
    --------
    >>> class Printed(Tracker):
    ...     def log(self, round, values):
    ...         print(round, values["test_accuracy"])
    >>> import fedweight
    >>> fedweight.run(callbacks=[Printed()])  # doctest: +SKIP
    """

    clients: bool = False
    groups: bool = False

    def __init__(self, *, clients: bool = False, groups: bool = False) -> None:
        for name, told in (("clients", clients), ("groups", groups)):
            if not isinstance(told, bool):
                raise ConfigurationError(f"{name} must be True or False, got {told!r}.")
        self.clients = clients
        self.groups = groups

    def begin(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Be told of a run that begins, or goes on.

        Parameters
        ----------
        folder : Path
            The run's.
        config : Mapping[str, Any]
            What its ``config.toml`` holds, by dotted keys: ``{"run.rounds": 20}``.
        """

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """Be told of a round, from 0, the initial model.

        Parameters
        ----------
        round : int
            Its number. A run that is resumed tells again what came after its last
            checkpoint.
        values : Mapping[str, float]
            The numbers of its row of ``rounds.csv``, by column; with ``clients`` those
            of ``clients.csv``, too, as ``clients/<name or number>/<column>``; with
            ``groups`` those of ``groups.csv``, as
            ``groups/<part>/<attribute>/<group>/<column>``, and with both each client's
            as ``clients/<name or number>/groups/<attribute>/<group>/<column>``. What
            was not measured, or is not finite, is not there.
        """
        raise NotImplementedError

    def end(self, failed: bool) -> None:
        """Be told that the run is over; ``failed`` says that it was stopped."""

    def __call__(self, state: Any) -> None:
        """Do nothing: as a callback it has no say in when a run ends."""


class Tracking:
    """All trackers of a run; one that raises is let go of, and that is said.

    Parameters
    ----------
    trackers : Iterable[Tracker]
        They are called in this order.
    """

    def __init__(self, trackers: Iterable[Tracker] = ()) -> None:
        self._trackers = [*trackers]

    def begin(self, folder: Path, config: Mapping[str, Mapping[str, Any]]) -> None:
        """Tell all of a run that begins."""
        flat = {
            f"{t}.{key}": v for t, keys in config.items() for key, v in keys.items()
        }
        self._each(lambda tracker: tracker.begin(folder, dict(flat)))

    def log(
        self,
        round: int,
        row: Mapping[str, Any],
        clients: Iterable[Mapping[str, Any]] = (),
        groups: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Tell all of a round: its row, and those of its clients and groups."""
        values = _numbers(row)
        each: dict[str, float] = {}
        if any(tracker.clients for tracker in self._trackers):
            for one in clients:
                each |= _below(_client(one), one)
        together: dict[str, float] = {}
        of_clients: dict[str, float] = {}
        if any(tracker.groups for tracker in self._trackers):
            for one in groups:
                place = [_part(one["attribute"]), _part(one["group"])]
                if "client" in one:
                    path = "/".join([_client(one), "groups", *place])
                    of_clients |= _below(path, one)
                else:
                    path = "/".join(["groups", _part(one["part"]), *place])
                    together |= _below(path, one)

        def tell(tracker: Tracker) -> None:
            told = dict(values)
            told |= each if tracker.clients else {}
            told |= together if tracker.groups else {}
            told |= of_clients if tracker.clients and tracker.groups else {}
            tracker.log(round, told)

        self._each(tell)

    def end(self, failed: bool) -> None:
        """Tell all that the run is over."""
        self._each(lambda tracker: tracker.end(failed))

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for tracker in [*self._trackers]:
            try:
                tell(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                log.warning(
                    "%s failed, and follows this run no longer: %s: %s",
                    type(tracker).__name__,
                    type(error).__name__,
                    plain(error),
                )


def told_apart(callbacks: Iterable[Any]) -> tuple[Tracking, tuple[Any, ...]]:
    """Return the trackers among a user's callbacks, and the others."""
    several = tuple(callbacks)
    trackers = [one for one in several if isinstance(one, Tracker)]
    return Tracking(trackers), tuple(one for one in several if one not in trackers)


def _part(name: Any) -> str:
    """Return a name as one part of a path."""
    return plain(str(name)).replace("/", "-")


def _client(row: Mapping[str, Any]) -> str:
    return f"clients/{_part(row.get('name') or row['client'])}"


def _below(path: str, row: Mapping[str, Any]) -> dict[str, float]:
    return {f"{path}/{key}": value for key, value in _numbers(row).items()}


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return what of a table's row is a finite number, but for what it is about."""
    return {
        key: float(value)
        for key, value in row.items()
        if key not in ("round", "client")
        and isinstance(value, int | float)
        and math.isfinite(value)
    }


def _imported(extra: str, *packages: str) -> Any:
    """Import an extra's package, or say in a line which extra brings it."""
    require(f"tracking by {extra}", extra)
    return importlib.import_module(*packages or (extra,))


class TensorBoard(Tracker):
    """Writes event files, one folder a run: ``tensorboard --logdir tensorboard``.

    Parameters
    ----------
    folder : str or Path
        Where the runs' folders are.
    clients, groups : bool
        Whether each client's and each group's values are written, too.

    Raises
    ------
    ConfigurationError
        If tensorboard is not installed, which the extra ``tensorboard`` brings.
    """

    def __init__(
        self,
        folder: str | Path = "tensorboard",
        *,
        clients: bool = False,
        groups: bool = False,
    ) -> None:
        super().__init__(clients=clients, groups=groups)
        self.folder = Path(folder)
        require("tracking by TensorBoard", "tensorboard")
        self._writer: Any = None

    def begin(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Open the run's event file."""
        events = _imported("tensorboard", "torch.utils.tensorboard")
        self._writer = events.SummaryWriter(str(self.folder / folder.name))
        lines = "\n".join(f"    {key} = {value!r}" for key, value in config.items())
        self._writer.add_text("config", lines, 0)

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """Write a scalar each."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def end(self, failed: bool) -> None:
        """Close the file."""
        self._writer.close()


class MLflow(Tracker):
    """Logs to MLflow: a run of it is a run of ours, the configuration its parameters.

    In the names of metrics ``_`` stands for what MLflow does not take there.

    Parameters
    ----------
    experiment : str
        The experiment's name; it is made where it is not there.
    tracking_uri : str, optional
        The server or the store; by default what MLflow takes.
    clients, groups : bool
        Whether each client's and each group's values are logged, too.

    Raises
    ------
    ConfigurationError
        If mlflow is not installed, which the extra ``mlflow`` brings.
    """

    def __init__(
        self,
        experiment: str = "fedweight",
        tracking_uri: str | None = None,
        *,
        clients: bool = False,
        groups: bool = False,
    ) -> None:
        super().__init__(clients=clients, groups=groups)
        self.experiment = experiment
        self.tracking_uri = tracking_uri
        require("tracking by MLflow", "mlflow")
        self._client: Any = None
        self._run = ""

    def begin(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Begin a run, with the configuration as its parameters."""
        mlflow = _imported("mlflow")
        entities = importlib.import_module("mlflow.entities")
        self._client = mlflow.MlflowClient(self.tracking_uri)
        found = self._client.get_experiment_by_name(self.experiment)
        number = (
            found.experiment_id
            if found is not None
            else self._client.create_experiment(self.experiment)
        )
        started = self._client.create_run(number, run_name=folder.name)
        self._run = started.info.run_id
        parameters = [
            entities.Param(key, str(value)[:_LONGEST]) for key, value in config.items()
        ]
        for first in range(0, len(parameters), _AT_ONCE):
            some = parameters[first : first + _AT_ONCE]
            self._client.log_batch(self._run, params=some)

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """Log a metric each, the round as its step."""
        metric = importlib.import_module("mlflow.entities").Metric
        now = int(time.time() * 1000)
        several = [
            metric(_ODD.sub("_", name), value, now, round)
            for name, value in values.items()
        ]
        for first in range(0, len(several), 10 * _AT_ONCE):
            some = several[first : first + 10 * _AT_ONCE]
            self._client.log_batch(self._run, metrics=some)

    def end(self, failed: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class WandB(Tracker):
    """Logs to Weights & Biases, offline unless told otherwise: ``wandb sync`` sends it.

    Parameters
    ----------
    project : str
        The project's name.
    folder : str or Path
        Under which its folder ``wandb`` is.
    mode : {"offline", "online", "shared", "disabled"}
        As ``wandb.init`` takes it.
    clients, groups : bool
        Whether each client's and each group's values are logged, too.

    Raises
    ------
    ConfigurationError
        If wandb is not installed, which the extra ``wandb`` brings.
    """

    def __init__(
        self,
        project: str = "fedweight",
        folder: str | Path = ".",
        *,
        mode: str = "offline",
        clients: bool = False,
        groups: bool = False,
    ) -> None:
        super().__init__(clients=clients, groups=groups)
        self.project = project
        self.folder = Path(folder)
        self.mode = mode
        require("tracking by Weights & Biases", "wandb")
        self._run: Any = None

    def begin(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Begin a run, with the configuration beside it."""
        wandb = _imported("wandb")
        self._run = wandb.init(
            project=self.project,
            name=folder.name,
            dir=str(self.folder),
            mode=self.mode,
            # Dates and the like become texts.
            config=json.loads(json.dumps(dict(config), default=str)),
            settings=wandb.Settings(silent=True),
        )

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """Log the round, its number as the step."""
        self._run.log(dict(values), step=round)

    def end(self, failed: bool) -> None:
        """End the run."""
        self._run.finish(exit_code=int(failed))
