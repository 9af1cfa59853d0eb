"""What a run writes while it runs: its folder, round by round."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ..clients.evaluation import measured_of, sums_of_each
from ..core.errors import FedweightError, OutputError
from ..core.layout import Base, Layout
from ..core.module import FlatModule
from ..core.records import NOTHING
from ..core.texts import NAME_LENGTH, plain
from ..core.writing import write_whole
from ..data import Examples, notes
from ..messages.arrays import FlatRecord, complete
from ..messages.grids import connected, name_of, number_of
from ..metrics import Sums
from ..server.loop import ServerState
from ..server.reported import recorded_metrics
from ..server.wrapped import with_inner
from ..simulations import SimulationGrid
from ..strategies import RoundRecord, WeightingStrategy
from .callbacks import BEST, BEST_MODELS
from .columns import (
    ACCURACIES,
    CLIENT_COLUMNS,
    OPTIONAL,
    PERSONAL_COLUMNS,
    ROUND_COLUMNS,
)
from .components import Components
from .failures import in_full
from .folder import ERRORS, Table, rows_of
from .grouping import group_rows, group_table
from .listener import Listener
from .origins import MADE_OF, made_of
from .progress import Progress, Report
from .records import (
    ErrorLog,
    client_columns,
    client_row,
    measured_columns,
    personal_means,
    personal_rows,
    round_row,
)
from .trackers import Tracking

log = logging.getLogger("fedweight")

# In environment.json, besides the plan: why it was chosen, and where it was halved.
OF_THE_PLAN = ("chosen", "halved")


class Recorder:
    """Writes a run's folder, round by round.

    Parameters
    ----------
    folder : Path
        The run's folder.
    components : Components
        What is run.
    strategy : Strategy
        Its ``history`` is what is recorded, if it keeps one.
    progress : Callable, optional
        Called after every round.
    began : float, optional
        When the run began, by ``time.perf_counter``; by default now.
    tracking : Tracking, optional
        Who else is told what is recorded.

    Attributes
    ----------
    goes_on : bool
        Whether the folder is being written: not before a run that was begun before has
        been found fit to go on.
    """

    def __init__(
        self,
        folder: Path,
        components: Components,
        strategy: Strategy,
        progress: Report | None = None,
        began: float | None = None,
        tracking: Tracking | None = None,
    ) -> None:
        self.tracking = tracking or Tracking()
        self.folder = folder
        self.components = components
        self.strategy = strategy
        self.progress = progress
        hits = components.task.counts_hits
        optional = OPTIONAL if hits else OPTIONAL | ACCURACIES
        self.rounds = Table(folder / "rounds.csv", ROUND_COLUMNS, optional)
        self.clients = Table(folder / "clients.csv", CLIENT_COLUMNS, optional)
        self.groups: Table | None = None
        if components.groups is not None:
            self.groups = group_table(folder)
        self.errors = ErrorLog(folder / ERRORS)
        self.timings = Table(folder / "timings.csv", ("round", "seconds", "elapsed"))
        self.partition: Table | None = None
        # Whether partition.csv has a client.
        self._described = np.zeros(components.data.num_clients, bool)
        self._module: FlatModule | None = None
        self._base: Base | None = None
        self._arrays: ArrayRecord | None = None
        self._tested = False  # the model of the last round
        self._began = self._last = time.perf_counter() if began is None else began
        self.goes_on = False
        self._heard: list[RoundRecord] = []
        self._before: list[RoundRecord] = []  # of round 0, as far as it is recorded
        self._environment: dict[str, Any] = {}
        self.grid: Grid | None = None
        self.over: Callable[[], bool] = lambda: False  # Whether no round comes after.
        self.listener: Listener | None = None
        if not hasattr(strategy, "history"):
            self._listen(strategy)

    def _listen(self, strategy: Strategy) -> None:
        """Record what clients answer to a strategy that keeps no history itself."""
        listener = Listener(self._heard, self._client_of, self._name_of)
        self.listener = listener
        strategy.configure_train = listener.asks(strategy.configure_train)  # type: ignore[method-assign]
        strategy.aggregate_train = listener.hears(strategy.aggregate_train)  # type: ignore[method-assign]
        statistics = self.components.statistics
        if statistics.sends:
            strategy.aggregate_evaluate = listener.measures(  # type: ignore[method-assign]
                statistics, strategy.aggregate_evaluate
            )

    def _client_of(self, node: int) -> int:
        return number_of(self.grid)(node)

    def _name_of(self, client: int) -> str:
        return name_of(self.grid)(client)

    @contextmanager
    def recording(
        self,
        engine: Mapping[str, Any] | None = None,
        *,
        own_data: bool = False,
        preface: str = "",
        anew: bool = True,
    ) -> Iterator[None]:
        """Write the folder while rounds are run in a ``with`` block.

        However the block ends, what was recorded in it is written.

        Parameters
        ----------
        engine : Mapping, optional
            What else is known of the engine.
        own_data : bool
            Clients have data of their own: how those are spread is theirs to know.
        preface : str
            Comments that ``config.toml`` begins with.
        anew : bool
            False where the run was begun before, and goes on.
        """
        try:
            self._begin(dict(engine or {}), own_data, preface, anew)
            yield
        except BaseException as stop:
            if isinstance(stop, Exception) and not isinstance(stop, FedweightError):
                self.errors.end(in_full(stop))
            failure = self._end()
            self.tracking.end(failed=True)
            if failure is not None and not isinstance(stop, OutputError):
                log.warning("%s", failure)  # Not instead of what stopped the run.
            raise
        failure = self._end()
        self.tracking.end(failed=failure is not None)
        if failure is not None:
            raise failure

    @property
    def state(self) -> dict[str, Any]:
        """How much is recorded, for :meth:`restore`."""
        tables = self._tables().items()
        return {
            "tables": {name: table.state for name, table in tables},
            "errors": self.errors.state,
            "own-metrics": [] if self.listener is None else self.listener.own_metrics,
            "elapsed": time.perf_counter() - self._began,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from there; what was recorded later is removed.

        Nothing is written where one of the tables is refused.
        """
        for name, table in self._tables().items():
            table.check(state["tables"][name])
        for name, table in self._tables().items():
            table.restore(state["tables"][name])
        self.goes_on = True
        self.errors.restore(state["errors"])
        if self.partition is not None:
            rows = rows_of(self.partition.path)[1:]
            self._described[[int(row[0]) for row in rows]] = True
        if self.listener is not None:
            self.listener.own_metrics = state["own-metrics"]
        self._last = time.perf_counter()
        self._began = self._last - state["elapsed"]

    def _tables(self) -> dict[str, Table]:
        tables = {
            "rounds": self.rounds,
            "clients": self.clients,
            "timings": self.timings,
        }
        optional = {"groups": self.groups, "partition": self.partition}
        return tables | {n: table for n, table in optional.items() if table is not None}

    def _begin(
        self, engine: dict[str, Any], own_data: bool, preface: str, anew: bool
    ) -> None:
        """Write what is known before the first round."""
        components = self.components
        self._environment = environment_of(components)
        self._environment["engine"] |= engine
        if own_data:
            del self._environment["data"]["clients"]
        else:
            self._environment["data"]["notes"] = notes(components.data)
        self.goes_on = anew
        if anew:
            config = preface + components.configuration.to_toml()
            write_whole(self.folder / "config.toml", config)
            self._write_environment()
        self.tracking.begin(self.folder, components.configuration.tables)
        if own_data:
            return
        classes = (f"label_{c}" for c in range(components.data.num_classes))
        name = ("name",) if components.data.names else ()
        columns = ("client", *name, "train_examples", "held_out_examples", *classes)
        self.partition = Table(self.folder / "partition.csv", columns)
        # Of clients that are computed when they are asked for, only those who are.
        lazy = components.data.is_lazy
        if anew:
            self._write_partition(() if lazy else range(components.data.num_clients))

    def _write_environment(self) -> None:
        text = json.dumps(self._environment, indent=2) + "\n"
        write_whole(self.folder / "environment.json", text)

    def _write_partition(self, clients: Iterable[int]) -> None:
        """Add clients that are not there yet to ``partition.csv``."""
        if self.partition is None:
            return
        # A reply may claim to be from a client that there is not.
        data = self.components.data
        there_are = range(data.num_clients)
        new = [c for c in clients if c in there_are and not self._described[c]]
        self._described[new] = True
        rows = []
        for client in new:
            train, held_out, counts = data.described(client)
            name = {"name": plain(data.name_of(client), NAME_LENGTH)}
            rows.append(
                {
                    "client": client,
                    **(name if data.names else {}),
                    "train_examples": train,
                    "held_out_examples": held_out,
                    **{f"label_{c}": n for c, n in enumerate(counts.tolist())},
                }
            )
        self.partition.append(rows)

    def __call__(self, state: ServerState) -> None:
        """Record a round of our loop, or what was there before the first."""
        measured = {
            **recorded_metrics(state.train_metrics),
            **recorded_metrics(state.evaluate_metrics, "evaluate-"),
        }
        self.after_round(state.round, state.arrays, measured)

    def after_round(
        self,
        number: int,
        arrays: ArrayRecord,
        measured: Mapping[str, float] = NOTHING,
    ) -> MetricRecord | None:
        """Evaluate the global model, and record the round; Flower's evaluate_fn."""
        self._arrays = arrays
        test, tested = self._test(number, arrays)
        self._tested = bool(test)
        before = self._record_before()
        history = self._history
        if history and history[-1].number == number:
            record = history[-1]
        else:
            record = RoundRecord(number)
        if self.listener is not None:  # It has heard the clients, not the strategy.
            known = {n: v for n, v in measured.items() if not n.startswith("own-")}
            record.metrics = {**record.metrics, **known, **self.listener.measured}
            self.listener.measured = {}
        columns = client_columns(number, record.clients)
        self.clients.append_columns(columns, len(record.clients))
        self.errors.add(record)
        if self.components.data.is_lazy:
            self._write_partition(c.client for c in record.clients)
        hits = self.components.task.counts_hits
        row = round_row(record, test, accuracies=hits)
        # What was sent before the first round is in its sums: row 0 is written.
        for name in ("bytes_down", "bytes_up"):
            row[name] += sum(getattr(c, name) for r in before for c in r.clients)
        row |= self._validated(arrays) if test else {}
        self.rounds.append([row])
        self._note_plan(number)
        groups = self._record_groups(record, tested)
        clients = (client_row(number, client) for client in record.clients)
        self.tracking.log(number, row, clients, groups)
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.timings.append(
            [{"round": number, "seconds": seconds, "elapsed": now - self._began}]
        )
        if self.progress is not None:
            self.progress(
                Progress(
                    number,
                    self.components.configuration["run"]["rounds"],
                    test.get("accuracy", float("nan")),
                    test.get("loss", float("nan")),
                    now - self._began,
                )
            )
        return MetricRecord(dict(test)) if test else None

    def _note_plan(self, number: int) -> None:
        """Record that a device had no room for the plan, and remember it."""
        if not isinstance(self.grid, SimulationGrid) or not self.grid.why_halved:
            return
        engine, plan = self._environment["engine"], self.grid.plan
        if str(plan) == engine["plan"]:
            return
        why = {"round": number, "was": engine["plan"], "why": self.grid.why_halved}
        engine["halved"] = [*engine.get("halved", []), why]
        engine["plan"] = str(plan)
        self._write_environment()
        if self.components.choice is not None:
            self.components.choice.remember(plan)

    def _record_groups(
        self, record: RoundRecord, tested: Sums | None
    ) -> list[dict[str, Any]]:
        """Record what clients, or the server's test data, say of groups; return it."""
        groups = self.components.groups
        if self.groups is None or groups is None:
            return []
        rows = group_rows(groups, record, tested)
        if rows:
            self.groups.append(rows)
        return rows

    @property
    def _history(self) -> list[RoundRecord]:
        return getattr(self.strategy, "history", self._heard)

    def _record_before(self) -> list[RoundRecord]:
        """Record what clients did before the first round, once; return what is new."""
        if self._before:
            return []
        histories = [getattr(s, "history", ()) for s in with_inner(self.strategy)]
        self._before = [r for one in histories for r in one if r.number == 0]
        for record in self._before:
            columns = client_columns(0, record.clients)
            self.clients.append_columns(columns, len(record.clients))
            self.errors.add(record)
        return self._before

    def _end(self) -> OutputError | None:
        """Write all that is still to be written; return why some of it cannot be."""
        if not self.goes_on:
            return None
        jobs: list[Callable[[], Any]] = [self._record_before]
        jobs += [table.write for table in self._tables().values()]
        jobs += [self.errors.write, self._write_connected, self._write_model]
        failure = None
        for write in jobs:
            try:
                write()
            except OutputError as error:
                failure = failure or error
        return failure

    def _write_connected(self) -> None:
        """Write down which clients were there, where they come and go."""
        came = connected(self.grid)
        if came is not None and self._environment:
            self._environment["data"]["connected"] = sorted(came)
            self._write_environment()

    def _write_model(self) -> None:
        if self._arrays is not None:
            self._write_one(self.folder / "model.safetensors", self._arrays)
        several = self._several_models()
        if several:
            path = self.folder / "models.safetensors"
            write_whole(path, safetensors_bytes(several))

    def _write_one(
        self, path: Path, arrays: ArrayRecord, about: dict[str, str] | None = None
    ) -> None:
        """Write a model, and in its file's metadata what is said about it."""
        state = complete(arrays, self.base).state_dict()
        write_whole(path, safetensors_bytes(state, about))

    def _several_models(self) -> dict[str, Tensor]:
        """Return the tensors of all global models, where the method keeps several."""
        models = []
        if isinstance(self.strategy, WeightingStrategy):
            models = self.strategy.models
        return {
            f"{which}/{name}": tensor
            for which, model in enumerate(models)
            for name, tensor in complete(FlatRecord(model), self.base)
            .state_dict()
            .items()
        }

    def write_best(self, number: int, arrays: ArrayRecord) -> None:
        """Write what clients used in a round: the global model, or the several."""
        # One entry: several would come in any order, and change the file's bits.
        about = {"round": str(number)}
        one, more = self.folder / BEST, self.folder / BEST_MODELS
        several = self._several_models()
        if several:
            write_whole(more, safetensors_bytes(several, about))
        else:
            self._write_one(one, arrays, about)

    @property
    def arrays(self) -> ArrayRecord | None:
        """The global model of the last round on record."""
        return self._arrays

    def will_end(self) -> None:
        """Write down that a phase comes after the rounds: before, no run is over."""
        self._environment["after_rounds"] = "personal.csv"
        self._write_environment()

    def personal(self, record: RoundRecord) -> None:
        """Record the phase after the rounds, in which clients trained for themselves.

        A row for each client in ``personal.csv``; the means stand in the last round.
        """
        hits = self.components.task.counts_hits
        columns = [c for c in PERSONAL_COLUMNS if hits or c not in ACCURACIES]
        table = Table(self.folder / "personal.csv", columns, ("name",))
        table.append(personal_rows(record, columns))
        self.rounds.complete(personal_means(record))
        self.errors.add(record)

    def stopped(self, number: int, reason: str) -> None:
        """Write down that no round comes after this one, though more were asked for.

        Where that was not known when it was recorded, its model is tested now.
        """
        if not self._tested and self._arrays is not None:
            test, tested = self._evaluate(self._arrays)
            row = measured_columns(test) | self._validated(self._arrays)
            self.rounds.complete(row)
            self._record_groups(RoundRecord(number), tested)
        self._environment["stopped"] = {"round": number, "reason": reason}
        self._write_environment()

    def _ready_module(self) -> FlatModule:
        if self._module is None:
            components = self.components
            self._module = FlatModule(
                components.make_model(), components.device, components.precision
            )
            self._base = self._module.copy_base()
        return self._module

    @property
    def base(self) -> Base:
        """What of the model no round changes."""
        self._ready_module()
        assert self._base is not None
        return self._base

    def _test(
        self, number: int, arrays: ArrayRecord
    ) -> tuple[dict[str, float], Sums | None]:
        table = self.components.configuration["run"]
        last = number == table["rounds"] or self.over()
        if number % table["evaluate-every"] and not last:
            return {}, None
        return self._evaluate(arrays)

    def _validated(self, arrays: ArrayRecord) -> dict[str, Any]:
        """Return what the server measures on what it chooses by, if it has any."""
        validation = self.components.data.validation
        if not len(validation):
            return {}
        measured, _ = self._evaluate(arrays, validation)
        return measured_columns(measured, "validation")

    def _evaluate(
        self, arrays: ArrayRecord, examples: Examples | None = None
    ) -> tuple[dict[str, float], Sums | None]:
        """Return what is measured of the global model, and what was added up.

        It is measured on the test set unless told otherwise, and then not by group.
        """
        module = self._ready_module()
        model = complete(arrays, self.base)
        statistics, test = self.components.statistics, self.components.data.test
        groups = None
        if statistics.groups is not None and examples is None:
            groups = statistics.groups.untold
        statistics = replace(statistics, groups=groups)
        of = test if examples is None else examples
        sums = sums_of_each(module, model, [of], statistics)
        return measured_of(statistics, sums), sums if len(of) else None


def environment_of(components: Components) -> dict[str, Any]:
    """Return what a run ran on: versions, machine, engine, data."""
    test = components.data.test
    packages = ("fedweight", "flwr", "torch", "ray", "numpy", "numba", "pandas")
    name = components.engine()
    return {
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in packages},
        },
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "gpus": [
                torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
            ],
        },
        "engine": {
            "name": name,
            "device": components.device,
            "precision": components.precision,
        },
        "data": {
            "name": components.data.name,
            "task": components.data.task,
            "clients": components.data.num_clients,
            "classes": components.data.num_classes,
            "class_names": list(components.data.class_names),
            "input_shape": list(components.data.input_shape),
            "test_examples": len(test),
            "largest_test_class": components.task.guessed(test.y),
            "grouped_by": list(components.groups.names) if components.groups else [],
        },
        "model": {
            "parameters": Layout.of_module(components.make_model()).num_parameters,
        },
        MADE_OF: made_of(components.configuration, components.digest),
    }


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
