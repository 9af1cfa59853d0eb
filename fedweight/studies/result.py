"""A finished, or interrupted, run: its folder as frames, numbers and figures."""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..errors import DataError
from ..paths import clean_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

# What makes a folder a run; the rest may be missing where a run was stopped early.
_REQUIRED = ("config.toml", "rounds.csv")

_TEXT = frozenset({"status", "reason", "name"})
_KEYS = frozenset({"round", "client"})
_COUNTS = frozenset(
    {
        "asked",
        "ok",
        "rejected",
        "failed",
        "missing",
        "dropped",
        "bytes_down",
        "bytes_up",
        "examples",
        "steps",
        "train_examples",
        "held_out_examples",
    }
)
_EMPTY = ["", "nan", "NaN", "None"]

BAD_REPLIES = ("rejected", "failed", "missing")


@dataclass(frozen=True)
class Run:
    """A run's folder, read when it is asked for and then kept.

    An interrupted run can be read like a finished one: it has fewer rounds and
    perhaps no model. To see rounds that were written later, make a new ``Run``.

    Parameters
    ----------
    folder : str or Path
        What ``fedweight run`` wrote. It needs ``config.toml`` and ``rounds.csv``.

    Raises
    ------
    DataError
        The folder is not a run's; the message names the file that is missing.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", clean_path("the folder", self.folder))
        if not self.folder.is_dir():
            raise DataError(f"{self.folder} is not a folder. {_WHAT_A_RUN_IS}")
        for name in _REQUIRED:
            self._file(name)

    # ------------------------------------------------------------ what was written

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved simulation file, table by table."""
        try:
            return tomllib.loads(self._file("config.toml").read_text("utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            path = self.folder / "config.toml"
            raise DataError(f"{path} is not TOML: {error}.") from error

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, machine and plan; empty where the run was stopped before."""
        path = self.folder / "environment.json"
        if not path.is_file():
            return {}
        try:
            content = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}.") from error
        if not isinstance(content, dict):
            raise DataError(
                f"{path} must hold an object, got {type(content).__name__}."
            )
        return content

    @cached_property
    def rounds(self) -> pd.DataFrame:
        """``rounds.csv``: a row per round; round 0 is before training."""
        return self._frame("rounds.csv", ("round",))

    @cached_property
    def clients(self) -> pd.DataFrame:
        """``clients.csv``: a row per round and client."""
        return self._frame("clients.csv", ("round", "client", "status"))

    @cached_property
    def partition(self) -> pd.DataFrame:
        """``partition.csv``: a row per client, with its count of each class."""
        return self._frame("partition.csv", ("client",))

    @cached_property
    def timings(self) -> pd.DataFrame:
        """``timings.csv``: the seconds of each round."""
        return self._frame("timings.csv", ("round",))

    def model(self) -> dict[str, Tensor]:
        """Return the final global model's parameters and buffers by name.

        Raises
        ------
        DataError
            There is none, since the run did not end.
        """
        from safetensors.torch import load_file

        path = self.folder / "model.safetensors"
        if not path.is_file():
            raise DataError(
                f"{path} is missing: the model is written when a run ends. Repeat "
                f"the run: fedweight run {self.folder / 'config.toml'}"
            )
        return dict(load_file(path))

    # --------------------------------------------------------------- what follows

    @property
    def name(self) -> str:
        """The run's name, or what was run on what."""
        name = self._setting("run", "name")
        return name or f"{self.strategy} on {self.data_set}"

    @property
    def strategy(self) -> str:
        """The strategy's name."""
        return self._setting("strategy", "name") or "unnamed strategy"

    @property
    def data_set(self) -> str:
        """The data set's name."""
        return self._setting("data", "name") or "unnamed data"

    @property
    def class_names(self) -> list[str]:
        """The classes' names, or their numbers where the data set names none."""
        names = self.environment.get("data", {})
        names = names.get("class_names") if isinstance(names, dict) else None
        columns = label_columns(self.partition)
        if isinstance(names, list) and len(names) >= len(columns):
            return [str(name) for name in names[: len(columns)]]
        return [column.removeprefix("label_") for column in columns]

    @property
    def rounds_done(self) -> int:
        """The number of the last round on record."""
        return int(self.rounds["round"].max()) if len(self.rounds) else 0

    @property
    def rounds_asked(self) -> int | None:
        """How many rounds the configuration asks for."""
        rounds = _table(self.config, "run").get("rounds")
        return rounds if isinstance(rounds, int) else None

    @property
    def complete(self) -> bool:
        """Whether all rounds are there, and the model."""
        asked = self.rounds_asked
        all_rounds = asked is None or self.rounds_done >= asked
        return all_rounds and (self.folder / "model.safetensors").is_file()

    @cached_property
    def weights(self) -> pd.DataFrame:
        """How much each client counted: ``[rounds, clients]``.

        Index and columns are the numbers of rounds and clients. NaN is a client that
        took no part, or whose reply was not used.
        """
        return self.by_client("weight")

    @property
    def accuracy(self) -> pd.Series[float]:
        """The global model's accuracy by round, on the server's test set.

        Where the server has none, on the clients' held-out data.
        """
        rounds = self.rounds.set_index("round")
        for column in ("test_accuracy", "evaluate_accuracy"):
            if column in rounds and rounds[column].notna().any():
                return rounds[column].dropna()
        return pd.Series(dtype=float, name="test_accuracy")

    @property
    def bad_replies(self) -> pd.DataFrame:
        """The rows of ``clients`` whose reply was rejected, failed or missing."""
        return self.clients[self.clients["status"].isin(BAD_REPLIES)]

    def by_client(self, column: str) -> pd.DataFrame:
        """Return one column of ``clients.csv`` as ``[rounds, clients]``.

        Parameters
        ----------
        column : str
            A column with numbers. NaN stands where a client has none in a round.
        """
        if column not in self.clients:
            return pd.DataFrame(dtype=float)
        rows = self.clients.dropna(subset=[column])
        rows = rows.drop_duplicates(["round", "client"])
        return rows.pivot(index="round", columns="client", values=column).astype(float)

    def summary(self) -> dict[str, Any]:
        """Return the run in numbers, ready for JSON; None is what was not measured.

        Returns
        -------
        dict
            ``name``, ``strategy``, ``data``, ``seed``, ``rounds``, ``rounds_asked``,
            ``complete``, ``clients``; accuracies in [0, 1]: ``test_accuracy`` (the
            last),
            ``mean_test_accuracy_last_10`` (rounds), ``held_out_accuracy``, and over
            the clients in the last evaluated round ``client_accuracy_mean``,
            ``_std``, ``_worst10``, ``_best10``; ``effective_clients`` in the last
            round that has it, ``failed_rounds``, ``bad_replies``, ``bytes_down``,
            ``bytes_up`` and ``seconds``, the last being the only one that depends on
            the clock.
        """
        trained = self.rounds[self.rounds["round"] > 0]
        test = self._measured("test_accuracy")
        last_ten = test[(test.index > 0) & (test.index > self.rounds_done - 10)]
        result: dict[str, Any] = {
            "name": self.name,
            "strategy": self.strategy,
            "data": self.data_set,
            "seed": _table(self.config, "run").get("seed"),
            "rounds": self.rounds_done,
            "rounds_asked": self.rounds_asked,
            "complete": self.complete,
            "clients": self._num_clients(),
            "test_accuracy": _last(test),
            "mean_test_accuracy_last_10": _number(last_ten.mean()),
            "held_out_accuracy": _last(self._measured("evaluate_accuracy")),
        }
        for statistic in ("mean", "std", "worst10", "best10"):
            column = f"client_accuracy_{statistic}"
            result[column] = _last(self._measured(column))
        result["effective_clients"] = _last(self._measured("effective_clients"))
        failed = trained["status"] == "failed" if "status" in trained else None
        result["failed_rounds"] = int(failed.sum()) if failed is not None else 0
        result["bad_replies"] = self._num_bad_replies(trained)
        for column in ("bytes_down", "bytes_up"):
            total = self.rounds[column].sum() if column in self.rounds else 0
            result[column] = int(total)
        result["seconds"] = self._seconds()
        return result

    # ------------------------------------------------------------------- figures

    def plot_accuracy(self) -> Figure:
        """Draw the accuracy over rounds."""
        from . import plots

        return plots.figure_of(plots.accuracy(self))

    def plot_loss(self) -> Figure:
        """Draw the loss over rounds."""
        from . import plots

        return plots.figure_of(plots.loss(self))

    def plot_weights(self, order: str = "number") -> Figure:
        """Draw how much each client counted in each round.

        Parameters
        ----------
        order : {"number", "size"}
            Clients by number, or those with most data first.
        """
        from . import plots

        return plots.figure_of(plots.weights_heatmap(self, order=order))

    def plot_weight_vs_size(self, round: int | None = None) -> Figure:
        """Draw the clients' weights against their shares of the data.

        Parameters
        ----------
        round : int, optional
            By default the last round with weights.
        """
        from . import plots

        return plots.figure_of(plots.weight_vs_size(self, round=round))

    def plot_client_accuracies(self) -> Figure:
        """Draw every client's accuracy in the last evaluated round."""
        from . import plots

        return plots.figure_of(plots.client_accuracies(self))

    def plot_client_accuracies_by_round(self) -> Figure:
        """Draw how the clients' accuracies spread, round by round."""
        from . import plots

        return plots.figure_of(plots.client_accuracies_by_round(self))

    def plot_labels(self, order: str = "number") -> Figure:
        """Draw which classes each client holds.

        Parameters
        ----------
        order : {"number", "size"}
            Clients by number, or those with most data first.
        """
        from . import plots

        return plots.figure_of(plots.labels(self, order=order))

    def plot_recorded(self) -> Figure:
        """Draw what the method itself recorded of each round."""
        from . import plots

        return plots.recorded(self)

    def report(self) -> Path:
        """Write ``report.html`` anew and return its path."""
        from .report import write_report

        return write_report(self)

    def _repr_html_(self) -> str:
        from .report import notebook_summary

        return notebook_summary(self)

    def __repr__(self) -> str:
        done = f"{self.rounds_done} rounds"
        if self.rounds_asked is not None and self.rounds_done < self.rounds_asked:
            done = f"{self.rounds_done} of {self.rounds_asked} rounds"
        accuracy = _last(self.accuracy)
        reached = "" if accuracy is None else f", accuracy {accuracy:.4f}"
        return f"Run({str(self.folder)!r}: {self.name}, {done}{reached})"

    # -------------------------------------------------------------------- helpers

    def _file(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing. {_WHAT_A_RUN_IS}")
        return path

    def _frame(self, name: str, required: tuple[str, ...]) -> pd.DataFrame:
        path = self._file(name)
        with path.open(encoding="utf-8", newline="") as lines:
            header = next(csv.reader(lines), [])
        for column in required:
            if column not in header:
                raise DataError(f"{path} has no column '{column}'. {_WHAT_A_RUN_IS}")
        numbers = [column for column in header if column not in _TEXT]
        try:
            # A reason may well read "NaN": text columns are never taken for empty.
            frame = pd.read_csv(
                path,
                dtype={column: "str" for column in header if column in _TEXT},
                keep_default_na=False,
                na_values=dict.fromkeys(numbers, _EMPTY),
                encoding="utf-8",
            )
            kinds = {}
            for column in numbers:
                if column in _COUNTS or column.startswith("label_"):
                    kinds[column] = "Int64"
                    continue
                values = frame[column]
                if column in _KEYS:
                    # A real node's number may need all 64 bits.
                    if values.dtype != "uint64":
                        kinds[column] = "int64"
                elif values.isna().all() or pd.api.types.is_integer_dtype(values):
                    kinds[column] = "float64"
            frame = frame.astype(kinds)  # At once: there may be thousands of classes.
        except (ValueError, TypeError) as error:
            raise DataError(f"{path} cannot be read: {error}.") from error
        return frame

    def _setting(self, table: str, key: str) -> str:
        return str(_table(self.config, table).get(key, ""))

    def _measured(self, column: str) -> pd.Series[float]:
        """Return one column of ``rounds`` by round, without gaps and infinities."""
        if column not in self.rounds:
            return pd.Series(dtype=float)
        values = self.rounds.set_index("round")[column].astype(float)
        return values[np.isfinite(values)]

    def _num_clients(self) -> int | None:
        # A partition that is computed lazily lists only who took part.
        known = self.environment.get("data", {}).get("clients")
        if known is not None:
            return int(known)
        for name in ("partition", "clients"):
            if (self.folder / f"{name}.csv").is_file():
                return int(getattr(self, name)["client"].nunique())
        return None

    def _num_bad_replies(self, rounds: pd.DataFrame) -> int:
        columns = [column for column in BAD_REPLIES if column in rounds]
        return int(rounds[columns].sum().sum()) if columns else 0

    def _seconds(self) -> float | None:
        if not (self.folder / "timings.csv").is_file():
            return None
        timings = self.timings
        # Not the last "elapsed": a resumed run may have counted from anew.
        return _number(timings["seconds"].sum()) if "seconds" in timings else None


def label_columns(partition: pd.DataFrame) -> list[str]:
    """Return the columns ``label_0``, ``label_1``, ... in the classes' order."""
    columns = [name for name in partition.columns if name.startswith("label_")]
    return sorted(columns, key=lambda name: (len(name), name))


_WHAT_A_RUN_IS = (
    "A run's folder is what `fedweight run` writes: config.toml, rounds.csv, "
    "clients.csv, partition.csv and, once the run has ended, model.safetensors and "
    "report.html."
)


def _table(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = config.get(name, {})
    return table if isinstance(table, Mapping) else {}


def _number(value: Any) -> float | None:
    number = float(value)
    return number if np.isfinite(number) else None


def _last(values: pd.Series[float]) -> float | None:
    return _number(values.iloc[-1]) if len(values) else None
