"""What a comparison is to run, and what of it is there already."""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from ..core.errors import ConfigurationError, FedweightError
from ..core.settings import kebab_key
from ..core.texts import listed
from ..core.threads import num_cores
from ..core.writing import write_whole
from ..data import DataSet
from .axes import Axes
from .cells import (
    CHOSEN,
    Cell,
    Ended,
    LastData,
    alike_data,
    is_complete,
    run_here,
    run_side_by_side,
    runs_beside,
    visible_cards,
    what_is_there,
)
from .choosing import as_chosen, choose
from .components import Components, prepare
from .configuration import Configuration
from .folder import check_repeats
from .given import as_settings, of_main, whole_tables
from .methods import Method, joined, refuse_taken
from .origins import DATA, called, others_in, recorded, tell_unknown
from .own_strategies import try_own
from .reader import PLAN, table_of
from .runner import flat_of, make_ready, name_of_own, preface_of
from .summarizing import CELLS, Row, reached
from .tables import COMPARE


class Key(NamedTuple):
    """Which cell: a method's label, the data's, the seed, a sweep's candidate."""

    method: str
    data: str
    seed: int
    candidate: str


@dataclass
class Wanted:
    """A cell as it is asked for; ``cell`` is known when its folder has been seen."""

    key: Key
    choice: Method
    configuration: Configuration
    preface: str = ""
    cell: Cell = field(init=False)

    @property
    def folder(self) -> str:
        """What its folder is called."""
        return f"{self.choice.folder}-seed{self.key.seed}"


class Study:
    """What is to be run, and what of it is there."""

    def __init__(self, file: str | Path | None, axes: Axes) -> None:
        self.file = file
        self.axes = axes
        self.name = ""
        self.wanted: list[Wanted] = []
        self.of_this_process = False
        self.alone = False
        self.on_cards = False
        self.chosen: dict[str, dict[str, Any]] = {}
        self.last = LastData()

    def read(
        self, settings: Mapping[str, Any], dataset: DataSet | None, objectives: bool
    ) -> None:
        """Resolve every cell's configuration, or say which key is wrong."""
        own = name_of_own(dataset)
        whole = {*whole_tables(settings), COMPARE}
        common = as_settings(settings)
        refuse_taken("settings", common, objectives)
        for taken in common:
            if kebab_key(taken) in self.axes.keys:
                raise ConfigurationError(
                    f"settings: {taken} is varied, swept or a data set's. Leave it out."
                )
        if dataset is not None and "data.name" in self.axes.keys:
            raise ConfigurationError(
                "dataset: the data are given in Python, and data-sets names others. "
                "Leave one of them out."
            )
        if self.file is not None and dataset is None and "data.name" not in common:
            check_repeats(Path(self.file))
        # What is wrong for all is said without a strategy's name.
        picks = ("strategy.", "objective.")
        plain = {k: v for k, v in common.items() if not k.startswith(picks)}
        base = Configuration.read(self.file, plain, own, whole)
        self.name = base["run"]["name"].replace("/", "-") or "unnamed"
        # Data set by data set, and seed by seed: the next cell's data are often there.
        for of_data in self.axes.data_sets:
            data = of_data.label or base["data"]["name"]
            for seed in self.axes.seeds:
                for method in self.axes.methods:
                    for candidate in self.axes.candidates[method.label]:
                        one = joined(method, candidate, of_data)
                        with _of(one):
                            read = Configuration.read(
                                self.file,
                                {**common, **one.settings, "run.seed": seed},
                                own,
                                {*whole, *one.whole},
                            )
                        key = Key(method.label, data, seed, candidate.label)
                        self.wanted.append(Wanted(key, one, read))
                        mine = {**common, **one.settings}
                        self.wanted[-1].preface = preface_of(mine, dataset)
                        self.of_this_process |= dataset is not None or bool(
                            of_main(mine)
                        )
                        if self.axes.chooses and not read["data"]["validation"]:
                            raise ConfigurationError(
                                "sweep: it chooses on validation data, and data."
                                "validation is 0. Give a share, such as "
                                "data.validation=0.1."
                            )

    def look(self, folder: Path, dataset: DataSet | None) -> None:
        """Find out what is there already; what differs is refused."""
        if folder.exists() and not folder.is_dir():
            raise ConfigurationError(
                f"--out '{folder}' is a file. Name a folder for the comparison."
            )
        self._refuse_to_lose(folder)
        self.chosen = _chosen_in(folder)
        for one in self.wanted:
            where = folder / one.folder
            how, chosen, differs = what_is_there(
                where, tomllib.loads(one.configuration.to_toml())
            )
            if differs:
                raise _holds_another(where, differs)
            for key, value in chosen.items():
                one.configuration = one.configuration.having("engine", key, value)
            if chosen:
                self.chosen.setdefault(one.choice.label, chosen)
            if how == "resume" and self.of_this_process:
                how = "anew"  # Its config.toml does not repeat it.
            one.cell = Cell(one.folder, str(where), "", how, one.preface)
        self._refuse_others(folder, dataset)

    def _refuse_others(self, folder: Path, dataset: DataSet | None) -> None:
        """Refuse to hold runs against others that were made of other data or code."""
        of: dict[str, list[str]] = {}
        unknown = []
        for one in self.wanted:
            if one.cell.how not in ("done", "resume"):
                continue
            last = self.last.digest
            digest = dataset.digest if dataset else last(one.configuration)
            others = others_in(folder / one.folder, one.configuration, digest)
            if others is None:
                unknown.append(one.folder)
            for other in others or ():
                of.setdefault(other, []).append(one.folder)
        if of:
            said = [
                f"{what} changed since {listed(n, 6)} ran" for what, n in of.items()
            ]
            old = [*dict.fromkeys(name for names in of.values() for name in names)]
            raise ConfigurationError(
                f"{'; '.join(said)}. They cannot be held against new runs. Nothing was "
                f"run. Put back what was there; or delete {_folders(old)} in {folder} "
                "and give the same command, which runs them again; or name another "
                "folder with --out."
            )
        if unknown:
            tell_unknown([f"{folder}: {listed(unknown, 6)}"])

    def refuse_mixed(self, folder: Path, dataset: DataSet | None) -> None:
        """Refuse to hold runs against each other if data or code changed meanwhile.

        Each of them may have loaded its own.
        """
        of: dict[tuple[Any, ...], dict[str, list[str]]] = {}
        for one in self.wanted:
            of_data = () if dataset else alike_data(one.configuration)
            for key, digest in recorded(folder / one.folder).items():
                what = called(key, one.configuration)
                alike = (what, of_data if key == DATA else ())
                of.setdefault(alike, {}).setdefault(digest, []).append(one.folder)
        several = {what: runs for (what, _), runs in of.items() if len(runs) > 1}
        for what, by_digest in several.items():
            apart = "; others ".join(listed(names, 40) for names in by_digest.values())
            raise ConfigurationError(
                f"{what} changed while this ran: one part of the runs are {apart}. "
                f"They cannot be held against each other, and no summary was written. "
                f"Delete in {folder} those that are not of what is there now, and give "
                "the same command."
            )

    def _refuse_to_lose(self, folder: Path) -> None:
        """Refuse to leave out what was compared before: the summary would lose it."""
        if not (folder / PLAN).is_file():
            return
        like = {one.choice.folder: one.configuration for one in self.wanted}
        lost = []
        for name, method, seed in runs_beside(folder, [w.folder for w in self.wanted]):
            if method in like:
                asked = like[method].having("run", "seed", seed).to_toml()
                differs = what_is_there(folder / name, tomllib.loads(asked))[2]
                if differs:
                    raise _holds_another(folder / name, differs)
            if is_complete(folder / name):
                lost.append((name, seed))
        if lost:
            seeds = sorted({*self.axes.seeds, *(seed for _, seed in lost)})
            raise ConfigurationError(
                f"{folder} holds runs that are not named, and that its summary would "
                f"lose: {listed([name for name, _ in lost], 6)}. Nothing was run. Name "
                "all strategies, data sets and seeds that are there beside what is to "
                f"be added (--seeds {','.join(map(str, seeds))}), or another folder "
                "with --out."
            )

    def told(self, folder: Path) -> Iterator[str]:
        """Return what is said before anything is run, a line each."""
        of: dict[str, list[Wanted]] = {}
        for one in self.wanted:
            of.setdefault(one.cell.how, []).append(one)
        done, every = len(of.get("done", ())), len(self.wanted)
        if done == every:
            yield f"nothing to run: {'all ' * (every > 1)}{_runs(every)} there already"
            return
        went_wrong = _failed_in(folder)
        for one in of.get("anew", ()):
            why = "was stopped before its first checkpoint"
            why = "failed" if one.folder in went_wrong else why
            yield f"{one.folder} {why} and begins anew"
        for one in of.get("resume", ()):
            yield f"{one.folder} was stopped and goes on from its checkpoint"
        there = f", of which {_runs(done)} there already" if done else ""
        yield f"{every} run{'s' * (every > 1)}{there}"
        if any(
            one.cell.how != "done"
            and one.choice.label not in self.chosen
            and one.configuration["engine"]["plan"] == "auto"
            for one in self.wanted
        ):
            yield "measuring how clients train fastest, before any of them starts"

    def choose_plans(self, dataset: DataSet | None) -> None:
        """Make every method once, or refuse it; decide how its clients train.

        It is decided, and written down, before anything is run: under load another plan
        could win, and give other bits.
        """
        measured: dict[str, dict[str, Any]] = {}
        seen: set[str] = set()
        for one in self.wanted:
            label = one.choice.label
            if one.cell.how == "done" or label in seen:
                continue
            seen.add(label)
            data = dataset or self.last.of(one.configuration)
            with _of(one.choice):
                components = prepare(one.configuration, data)
                strategy, client_app, initial = make_ready(components)
                try_own(components, strategy, flat_of(initial))
            if label not in self.chosen:
                like = _trains_like(components)
                if like not in measured:
                    choice = choose(components, client_app, initial)
                    to_be = as_chosen(components, one.configuration, choice)["engine"]
                    measured[like] = {key: to_be[key] for key in CHOSEN}
                self.chosen[label] = measured[like]
            device = self.chosen[label].get("device", "auto")
            device = components.device if device == "auto" else device
            # A card with a number is the only one that will do.
            self.on_cards |= device == "cuda"
            named = device not in ("cpu", "cuda")
            self.alone |= named or components.engine() != "local"
        for one in self.wanted:
            for key, value in self.chosen.get(one.choice.label, {}).items():
                if one.configuration["engine"][key] == "auto":
                    one.configuration = one.configuration.having("engine", key, value)
            one.cell = replace(one.cell, config=one.configuration.to_toml())

    def make(self, folder: Path) -> None:
        """Make the folder, if it is not there."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"the comparison's folder '{folder}' cannot be made: {error.strerror}. "
                "Choose another with --out."
            ) from error

    def refuse_begun(self, folder: Path) -> None:
        """Refuse a folder in which another comparison began since it was looked at."""
        if (folder / PLAN).exists():
            raise ConfigurationError(
                f"another 'fedweight compare' began in '{folder}' in the meantime. "
                "Nothing was run. Give the same command again, or name another folder "
                "with --out."
            )

    def write_plan(self, folder: Path) -> None:
        """Write down what is to be run, before any of it is."""
        content = {
            "comparison": {
                "strategies": [method.label for method in self.axes.methods],
                "data-sets": [*dict.fromkeys(one.key.data for one in self.wanted)],
                "seeds": self.axes.seeds,
                **({} if self.axes.target is None else {"target": self.axes.target}),
            },
            **self._chosen_by_label(),
        }
        write_whole(folder / PLAN, tomli_w.dumps(content))

    def _chosen_by_label(self) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {"plans": {}}
        for label, chosen in self.chosen.items():
            for key, value in chosen.items():
                if value != "auto":  # Where there is no card, the device stays open.
                    found.setdefault(f"{key}s", {})[label] = value
        return found

    def run(
        self,
        dataset: DataSet | None,
        workers: int | None,
        tell: Callable[[Ended], None],
    ) -> list[Ended]:
        """Run what is not there yet, seed by seed."""
        todo = [one.cell for one in self.wanted if one.cell.how != "done"]
        done = len(self.wanted) - len(todo)
        cores = num_cores()
        cards = visible_cards() if self.on_cards else []
        if workers is None:
            workers = min(cores, len(cards)) if cards else cores
            workers = 1 if self.alone or self.of_this_process else workers
        workers = min(workers, len(todo))
        if workers <= 1:
            return run_here(todo, dataset, self.last, tell, done)
        return run_side_by_side(todo, workers, cores, tell, done, cards)

    def rows(self, ended: Iterable[Ended]) -> list[Row]:
        """Return the rows of ``cells.csv``, the first strategy's first."""
        why = {one.cell.name: one for one in ended}
        labels = [method.label for method in self.axes.methods]
        rows = []
        # Sorting is stable: a method's data sets, seeds and candidates stay in order.
        for one in sorted(self.wanted, key=lambda one: labels.index(one.key.method)):
            row: Row = {
                "strategy": one.key.method,
                "data": one.key.data,
                "seed": one.key.seed,
                "candidate": one.key.candidate,
                "folder": one.folder,
                "status": "failed",
                "failed_rounds": 0,
            }
            how = why.get(one.folder)
            if how is not None and how.reason:
                row["reason"] = how.reason
            else:
                row |= reached(Path(one.cell.folder))
            rows.append(row)
        return rows


def _runs(count: int) -> str:
    return "1 is" if count == 1 else f"{count} are"


def _failed_in(folder: Path) -> set[str]:
    """Return the folders of the runs that failed when this was run last."""
    try:
        with (folder / CELLS).open(encoding="utf-8", newline="") as file:
            rows = [*csv.DictReader(file)]
    except (OSError, ValueError):
        return set()
    return {row.get("folder", "") for row in rows if row.get("status") == "failed"}


def _folders(names: Sequence[str]) -> str:
    """Return which folders to delete, all of them by name."""
    return f"the folder{'s' * (len(names) > 1)} {listed(names, len(names))}"


def _holds_another(where: Path, differs: str) -> ConfigurationError:
    return ConfigurationError(
        f"{where} holds another run: {differs}. Nothing was run. Name another folder "
        "with --out, or remove that one."
    )


def _trains_like(components: Components) -> str:
    """Return what a plan depends on, of a configuration."""
    tables = components.configuration.tables
    apart = {k: v for k, v in tables.items() if k not in ("run", "strategy", "server")}
    share = tables["strategy"].get("fraction-train")
    return json.dumps([apart, share], sort_keys=True, default=str)


def _chosen_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Return how clients of a comparison that was begun train, and where, by strategy.

    A file that was written before has no devices.
    """
    try:
        content = tomllib.loads((folder / PLAN).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    found: dict[str, dict[str, Any]] = {}
    for key in CHOSEN:
        for label, value in table_of(content, f"{key}s").items():
            found.setdefault(label, {})[key] = str(value)
    return found


@contextmanager
def _of(method: Method) -> Iterator[None]:
    """Say of an error in a ``with`` block which method it is about."""
    try:
        yield
    except FedweightError as error:
        raise type(error)(f"'{method.label}': {error}") from error.__cause__
