"""What a run wrote: its folder as tables and settings, read when they are asked for."""

from __future__ import annotations

import csv
import io
import json
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..core.errors import DataError
from ..core.extras import Imported
from ..core.paths import clean_path
from ..core.texts import NAME_LENGTH, clients_called, plain
from .columns import CLIENT_COLUMNS, ROUND_COLUMNS
from .folder import CHECKPOINT, whole_rows

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor
else:
    pd = Imported("pandas", "studies", "a run's folder")

# What makes a folder a run; the rest may be missing where a run was stopped early.
_REQUIRED = ("config.toml", "rounds.csv")

# What makes it a comparison's instead.
PLAN = "comparison.toml"

_TEXT = frozenset({"name", "status", "reason", "part", "attribute", "group"})
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
        "positives",
    }
)
_NUMBERS = frozenset(
    {*ROUND_COLUMNS, *CLIENT_COLUMNS, "seconds", "elapsed", "update_norm"}
)
_EMPTY = ["", "nan", "NaN", "None"]

BAD_REPLIES = ("rejected", "failed", "missing")


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, read when it is asked for and then kept.

    An interrupted run can be read like a finished one: it has fewer rounds and
    perhaps no model. To see rounds that were written later, make a new one.

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
        if (self.folder / PLAN).is_file():
            raise DataError(
                f"{self.folder} is a comparison's folder. Read it by "
                f"fedweight.Comparison({str(self.folder)!r}), whose run(strategy, "
                "seed) returns one of its runs; the command that began it goes on with "
                "it."
            )
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
        return self._frame("rounds.csv", ("round",), unique="round")

    @cached_property
    def clients(self) -> pd.DataFrame:
        """``clients.csv``: a row per round and client."""
        return self._frame("clients.csv", ("round", "client", "status"))

    @cached_property
    def groups(self) -> pd.DataFrame:
        """``groups.csv``: a row per round, group and client.

        ``part`` is ``held-out`` for clients' own data (``client`` is empty for all of
        them together) and ``test`` for the server's; ``attribute`` is the sensitive
        attribute, or two of them, and ``group`` its group.

        Raises
        ------
        DataError
            If no groups were measured.
        """
        if not (self.folder / "groups.csv").is_file():
            raise DataError(
                f"{self.folder / 'groups.csv'} is missing: a run has it where "
                "groups.attributes or data.sensitive names sensitive attributes."
            )
        required = ("round", "part", "client", "attribute", "group", "examples")
        return self._frame("groups.csv", required, gaps="client")

    @cached_property
    def partition(self) -> pd.DataFrame:
        """``partition.csv``: a row per client, with its count of each class."""
        return self._frame("partition.csv", ("client",), unique="client")

    @cached_property
    def personal(self) -> pd.DataFrame:
        """``personal.csv``: a row per client, with what it made of the last model.

        It is there where personal models are trained once the rounds are over; those
        that are trained in every round are in :attr:`clients`.
        """
        return self._frame("personal.csv", ("client", "status"), unique="client")

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
        return self._model(
            "model.safetensors",
            "the model is written when a run ends. Repeat the run: fedweight run "
            f"{self.folder / 'config.toml'}",
        )

    def models(self) -> list[dict[str, Tensor]]:
        """Return the final global models, of a method that keeps several.

        :meth:`model` is their mean, by the data of the clients that trained them.

        Raises
        ------
        DataError
            There are none: the method keeps one, or the run did not end.
        """
        return self._models(
            "models.safetensors",
            "it is written when a run ends whose method keeps several global models",
        )

    def best_model(self) -> dict[str, Tensor]:
        """Return the model that the clients' held-out data liked best, by name.

        It is the global model after :attr:`best_round`.

        Raises
        ------
        DataError
            There is none: the run was not told to keep it, or its method keeps several.
        """
        if self.keeps_several:
            raise DataError(
                f"the run in {self.folder} has several best models, of which each "
                "client measured its own. Take best_models()."
            )
        return self._model("best-model.safetensors", _NO_BEST)

    def best_models(self) -> list[dict[str, Tensor]]:
        """Return the global models after :attr:`best_round`, where there are several.

        Clients measured each the one that it uses; together those were best then.

        Raises
        ------
        DataError
            There are none: the run was not told to keep them, or its method keeps one.
        """
        return self._models("best-models.safetensors", _NO_BEST)

    @property
    def keeps_several(self) -> bool:
        """Whether what was best, by ``run.keep-best``, are several global models."""
        return (self.folder / "best-models.safetensors").is_file()

    def _models(self, name: str, otherwise: str) -> list[dict[str, Tensor]]:
        found: dict[int, dict[str, Tensor]] = {}
        for key, tensor in self._model(name, otherwise).items():
            which, _, part = key.partition("/")
            if not which.isdecimal():
                raise DataError(
                    f"{self.folder / name} has no several models: '{plain(key)}' does "
                    "not begin with the number of one."
                )
            found.setdefault(int(which), {})[part] = tensor
        return [found[which] for which in sorted(found)]

    def _model(self, name: str, otherwise: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        path = self.folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing: {otherwise}")
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {plain(error)}.") from error

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
        names = table_of(self.environment, "data").get("class_names")
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
        rounds = table_of(self.config, "run").get("rounds")
        return rounds if isinstance(rounds, int) else None

    @property
    def complete(self) -> bool:
        """Whether the run is over, all rounds done or stopped early, with its model.

        One that is there with a checkpoint was stopped when something was still to be
        written, and can be gone on with.
        """
        asked = self.rounds_asked
        over = asked is None or self.rounds_done >= asked or self.stopped is not None
        last = ["model.safetensors"]
        phase = self.environment.get("after_rounds")
        last += [phase] if isinstance(phase, str) else []
        whole = all((self.folder / name).is_file() for name in last)
        return over and whole and not (self.folder / CHECKPOINT).is_file()

    @property
    def stopped(self) -> str | None:
        """Why the run was over before all of its rounds; ``None`` if it was not.

        A run that was interrupted is not over: it can be gone on with.
        """
        stopped = table_of(self.environment, "stopped")
        if stopped.get("round") != self.rounds_done:
            return None
        return plain(stopped.get("reason") or "no reason was recorded")

    @cached_property
    def best_round(self) -> int | None:
        """The round of :meth:`best_model`, by ``run.keep-best``; ``None`` without."""
        name = "best-models" if self.keeps_several else "best-model"
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                return int((file.metadata() or {})["round"])
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{path} is no model that a run kept: {plain(error)}."
            ) from error

    @cached_property
    def names(self) -> dict[int, str]:
        """The clients' names by their numbers, of those that have one.

        A name that several clients share is followed by their numbers.
        """
        shared = Counter(self._own_names.values())
        return {
            client: f"{name} ({client})" if shared[name] > 1 else name
            for client, name in self._own_names.items()
        }

    @cached_property
    def _own_names(self) -> dict[int, str]:
        """What clients call themselves, which several may do alike."""
        found: dict[int, str] = {}
        for table in ("clients", "partition"):
            if (self.folder / f"{table}.csv").is_file():
                frame = getattr(self, table)
                if "name" in frame:
                    named = frame[["client", "name"]].drop_duplicates(
                        "client", keep="last"
                    )
                    pairs = zip(named["client"].tolist(), named["name"], strict=True)
                    found |= {client: name for client, name in pairs if name}
        shown = {c: plain(name, NAME_LENGTH) for c, name in sorted(found.items())}
        return {client: name for client, name in shown.items() if name != str(client)}

    def name_of(self, client: int) -> str:
        """Return what a client is called: its name, or else its number."""
        return self.names.get(client, str(client))

    def called(self, clients: Sequence[int]) -> str:
        """Return how a message calls some clients: by number, and by name if any."""
        return clients_called(
            clients, lambda client: self._own_names.get(client, str(client))
        )

    @cached_property
    def weights(self) -> pd.DataFrame:
        """How much each client counted: ``[rounds, clients]``.

        The index is the rounds' numbers; the columns are the clients', or their names
        (see :meth:`by_client`). NaN is a client that took no part, or whose reply was
        not used.
        """
        return self._named(self.weights_by_number)

    @cached_property
    def weights_by_number(self) -> pd.DataFrame:
        """As :attr:`weights`, with the clients' numbers whether they have names or not.

        Only clients that took part have a weight, if one of 0.
        """
        return self._pivot(self.clients[self.clients["status"] == "ok"], "weight")

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

        Its columns are the clients' numbers; where clients have names, the names, and
        the numbers as texts of those that have none.

        Parameters
        ----------
        column : str
            A column with numbers. NaN stands where a client has none in a round.
        """
        return self._named(self.by_number(column))

    def by_number(self, column: str) -> pd.DataFrame:
        """As :meth:`by_client`, with the clients' numbers also where they have names.

        Parameters
        ----------
        column : str
            A column with numbers.
        """
        return self._pivot(self.clients, column)

    @staticmethod
    def _pivot(rows: pd.DataFrame, column: str) -> pd.DataFrame:
        if column not in rows:
            return pd.DataFrame(dtype=float)
        rows = rows.dropna(subset=[column]).drop_duplicates(["round", "client"])
        return rows.pivot(index="round", columns="client", values=column).astype(float)

    def _named(self, frame: pd.DataFrame) -> pd.DataFrame:
        return frame.rename(columns=self.name_of) if self.names else frame

    def measured(self, column: str) -> pd.Series[float]:
        """Return one column of ``rounds`` by round, without gaps and infinities."""
        if column not in self.rounds:
            return pd.Series(dtype=float)
        values = self.rounds.set_index("round")[column].astype(float)
        return values[np.isfinite(values)]

    # -------------------------------------------------------------------- helpers

    def _file(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing. {_WHAT_A_RUN_IS}")
        return path

    def _frame(
        self, name: str, required: tuple[str, ...], unique: str = "", gaps: str = ""
    ) -> pd.DataFrame:
        """Read a table; what is not one of a run's is refused here, once for all.

        ``gaps`` is a column of keys that may be empty.
        """
        path = self._file(name)
        try:
            text_of_table = whole_rows(path)
            header = next(csv.reader(io.StringIO(text_of_table, newline="")), [])
            for column in required:
                if column not in header:
                    raise DataError(
                        f"{path} has no column '{column}'. {_WHAT_A_RUN_IS}"
                    )
            text = [column for column in header if column in _TEXT]
            others = [column for column in header if column not in _TEXT]
            # A reason may well read "NaN": text columns are never taken for empty.
            frame = pd.read_csv(
                io.StringIO(text_of_table, newline=""),
                dtype=dict.fromkeys(text, "str") | ({gaps: "UInt64"} if gaps else {}),
                keep_default_na=False,
                na_values=dict.fromkeys(others, _EMPTY),
            )
            # At once: there may be thousands of classes.
            frame = pd.DataFrame(
                {str(name): _typed(str(name), frame[name]) for name in frame},
                index=frame.index,
            )
        except (ValueError, TypeError, OverflowError, csv.Error) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise DataError(f"{path} cannot be read: {plain(reason)}.") from error
        if unique and frame[unique].duplicated().any():
            twice = frame[unique][frame[unique].duplicated()].iloc[0]
            raise DataError(f"{path} has {unique} {twice} more than once.")
        return frame

    def _setting(self, table: str, key: str) -> str:
        return str(table_of(self.config, table).get(key, ""))


def _typed(name: str, column: pd.Series[Any]) -> pd.Series[Any]:
    """Return a column of a table in the type that its name promises."""
    if name in _TEXT:
        return column.fillna("").astype("str")
    if isinstance(column.dtype, pd.UInt64Dtype):
        return column  # Keys, of which some are none.
    if name in _KEYS:
        # A real node's number may need all 64 bits.
        keys = column if column.dtype == "uint64" else column.astype("int64")
        if name == "round" and len(keys) and not 0 <= keys.min() <= keys.max() < 10**6:
            raise ValueError(f"a round is {keys.min()} or {keys.max()}")
        return keys
    if name in _COUNTS or name.startswith("label_"):
        return column.astype("Int64")
    if name in _NUMBERS or column.isna().all():
        return column.astype("float64")
    integers = pd.api.types.is_integer_dtype(column)
    return column.astype("float64") if integers else column


def label_columns(partition: pd.DataFrame) -> list[str]:
    """Return the columns ``label_0``, ``label_1``, ... in the classes' order."""
    columns = [name for name in partition.columns if name.startswith("label_")]
    return sorted(columns, key=lambda name: (len(name), name))


_NO_BEST = (
    "what is best is kept where run.keep-best says by what, for instance evaluate-loss"
)

_WHAT_A_RUN_IS = (
    "A run's folder is what `fedweight run` writes: config.toml, rounds.csv, "
    "clients.csv, partition.csv and, once the run has ended, model.safetensors and "
    "report.html."
)


def table_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a table of settings; an empty one where there is none."""
    table = config.get(name, {})
    return table if isinstance(table, Mapping) else {}
