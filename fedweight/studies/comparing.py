"""Several strategies over several seeds: every cell a run, and what they are worth."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from ..core.errors import ConfigurationError, DataError, FedweightError
from ..core.extras import require
from ..core.options import MOST
from ..core.paths import clean_path
from ..core.signals import interruptible
from ..core.texts import shown
from ..core.threads import num_cores
from ..core.writing import write_whole
from ..data import DataSet
from .cells import Cell, Ended, LastData, run_here, run_side_by_side, what_is_there
from .comparison import METRICS, PLAN, Comparison, Row, write_comparison
from .components import Components, prepare
from .configuration import Configuration
from .folder import check_repeats
from .given import as_settings, of_main, setting_map, whole_tables
from .methods import Method, methods_of, seeds_of
from .progress import watched
from .result import Run
from .runner import make_ready, name_of_own, preface_of

Told = Callable[[Ended], None] | bool | None


def compare(
    file: str | Path | None = None,
    strategies: Any = (),
    seeds: Any = (0,),
    *,
    objectives: Any = (),
    settings: Mapping[str, Any] | Sequence[str] = (),
    out: str | Path | None = None,
    workers: int | None = None,
    dataset: DataSet | None = None,
    progress: Told = True,
) -> Comparison:
    """Run several strategies with the same seeds, and say what differs for real.

    Every cell is an ordinary run in a folder of its own, ``<strategy>-seed<seed>``. The
    same seed gives every strategy the same partition, the same initial model and the
    same sampling of clients, so differences are taken seed by seed. What is there
    already, with the same configuration, is not run again; what was stopped goes on. So
    the same call again ends a comparison that was stopped, and more strategies or seeds
    are added to one that is there.

    Parameters
    ----------
    file : str or Path, optional
        A simulation file; the quick start by default.
    strategies : str or list
        Names, classes or made objects; a text may have options:
        ``"fedavg,feddisco:a=0.2"``. All are held against the first.
    seeds : str or list of int
        ``[0, 1, 2]``, ``"0,1,2"`` or ``"0-2"``.
    objectives : str or list, optional
        Local objectives, likewise; every strategy is run with each.
    settings, dataset : optional
        As :func:`fedweight.run` takes them, for all cells.
    out : str or Path, optional
        The comparison's folder; by default ``runs/<name>-comparison``.
    workers : int, optional
        How many cells are run side by side, each in a process of its own that takes its
        share of the cores; 1 runs them one after another in this process. By default as
        many as there are cores, or 1 where clients train on a GPU or on Ray, or where
        data or classes are this process's own. It changes no bit: how clients train is
        decided before.
    progress : bool or Callable[[Ended], None], optional
        A line for each cell where somebody watches, or nothing; or what is called when
        a cell has ended.

    Returns
    -------
    Comparison
        The folder, as frames and tables. A cell that failed is in its ``failures``.

    Raises
    ------
    ConfigurationError, DataError
        Before anything is run.

    Examples
    --------
    >>> import fedweight
    >>> found = fedweight.compare(
    ...     strategies="fedavg,ida", seeds="0-9"
    ... )  # doctest: +SKIP
    >>> found.summary[["strategy", "mean", "verdict"]]  # doctest: +SKIP
    """
    require("a comparison", "studies")
    study = _Study(file, methods_of(strategies, objectives), seeds_of(seeds))
    study.read(setting_map(settings), dataset, bool(objectives))
    folder = clean_path("--out", out or f"runs/{study.name}-comparison")
    if workers is not None and not (type(workers) is int and 1 <= workers <= MOST):
        raise ConfigurationError(
            f"workers must be a whole number from 1, got {shown(workers)}."
        )
    if study.of_this_process and (workers or 1) > 1:
        raise ConfigurationError(
            f"workers must be 1, got {workers}: data or classes were given that only "
            "this process has. Put them into a module, and name that."
        )
    tell = _told(progress)
    study.look(folder)
    study.choose_plans(folder, dataset)
    with interruptible():
        try:
            ended = study.run(dataset, workers, tell)
        except BaseException as stop:
            stop.add_note(
                f"What was recorded is in {folder}. To go on, give the same command."
            )
            raise
    write_comparison(folder, study.rows(folder, ended))
    return Comparison(folder)


def _told(progress: Any) -> Callable[[Ended], None]:
    if callable(progress):
        return progress  # type: ignore[no-any-return]
    if not (progress is None or isinstance(progress, bool)):
        raise ConfigurationError(
            "progress must be a function of how a cell ended, or True or False, got "
            f"{shown(progress)}."
        )
    shows = progress and watched()
    return (lambda ended: print(ended, file=sys.stderr, flush=True)) if shows else _mute


def _mute(ended: Ended) -> None:
    """Tell nobody."""


class _Study:
    """What is to be run, and what of it is there."""

    def __init__(
        self, file: str | Path | None, methods: Sequence[Method], seeds: Sequence[int]
    ) -> None:
        self.file = file
        self.methods = methods
        self.seeds = seeds
        self.name = ""
        self.configurations: dict[tuple[str, int], Configuration] = {}
        self.prefaces: dict[str, str] = {}
        self.of_this_process = False
        self.alone = False
        self.cells: dict[tuple[str, int], Cell] = {}
        self.plans: dict[str, str] = {}
        self.last = LastData()

    def read(
        self, settings: Mapping[str, Any], dataset: DataSet | None, objectives: bool
    ) -> None:
        """Resolve every cell's configuration, or say which key is wrong."""
        own = name_of_own(dataset)
        whole = whole_tables(settings)
        common = as_settings(settings)
        taken = {"run.seed": "seeds", "strategy.name": "strategies"}
        taken |= {"objective.name": "objectives"} if objectives else {}
        for key, instead in taken.items():
            if key in common:
                raise ConfigurationError(
                    f"settings: {key} is what {instead} say. Leave it out."
                )
        if self.file is not None and dataset is None and "data.name" not in common:
            check_repeats(Path(self.file))
        # What is wrong for all is said without a strategy's name.
        picks = ("strategy.", "objective.")
        plain = {k: v for k, v in common.items() if not k.startswith(picks)}
        base = Configuration.read(self.file, plain, own, whole)
        self.name = base["run"]["name"].replace("/", "-") or "unnamed"
        for method in self.methods:
            mine = {**common, **method.settings}
            for seed in self.seeds:
                with _of(method):
                    read = Configuration.read(
                        self.file,
                        {**mine, "run.seed": seed},
                        own,
                        {*whole, *method.whole},
                    )
                self.configurations[method.label, seed] = read
            self.prefaces[method.label] = preface_of(mine, dataset)
            self.of_this_process |= dataset is not None or bool(of_main(mine))

    def look(self, folder: Path) -> None:
        """Find out what is there already; what differs is refused."""
        if folder.exists() and not folder.is_dir():
            raise ConfigurationError(
                f"--out '{folder}' is a file. Name a folder for the comparison."
            )
        self.plans = _plans_of(folder)
        for seed in self.seeds:
            for method in self.methods:
                name = f"{method.folder}-seed{seed}"
                wanted = self.configurations[method.label, seed]
                how, plan, differs = what_is_there(
                    folder / name, tomllib.loads(wanted.to_toml())
                )
                if differs:
                    raise ConfigurationError(
                        f"{folder / name} holds another run: {differs}. Nothing was "
                        "run. Name another folder with --out, or remove that one."
                    )
                if plan is not None:
                    self.configurations[method.label, seed] = wanted.having(
                        "engine", "plan", plan
                    )
                    self.plans.setdefault(method.label, plan)
                if how == "resume" and self.of_this_process:
                    how = "anew"  # Its config.toml does not repeat it.
                self.cells[method.label, seed] = Cell(
                    name, str(folder / name), "", how, self.prefaces[method.label]
                )

    def choose_plans(self, folder: Path, dataset: DataSet | None) -> None:
        """Make every method once, or refuse it; decide how its clients train.

        It is decided, and written down, before anything is run: under load another plan
        could win, and give other bits.
        """
        chosen: dict[str, str] = {}
        for method in self.methods:
            label = method.label
            missing = [s for s in self.seeds if self.cells[label, s].how != "done"]
            if not missing:
                continue
            configuration = self.configurations[label, missing[0]]
            data = dataset or self.last.of(configuration)
            with _of(method):
                components = prepare(configuration, data)
                _, client_app, initial = make_ready(components)
            gpus = components.device != "cpu"
            self.alone |= gpus or components.engine() != "local"
            if label not in self.plans:
                like = _trains_like(components)
                if like not in chosen:
                    chosen[like] = str(components.plan(client_app, initial))
                self.plans[label] = chosen[like]
        for (label, seed), cell in self.cells.items():
            configuration = self.configurations[label, seed]
            if configuration["engine"]["plan"] == "auto" and label in self.plans:
                configuration = configuration.having(
                    "engine", "plan", self.plans[label]
                )
            text = configuration.to_toml()
            self.cells[label, seed] = Cell(
                cell.name, cell.folder, text, cell.how, cell.preface
            )
        content = {
            "comparison": {
                "strategies": [method.label for method in self.methods],
                "folders": [method.folder for method in self.methods],
                "seeds": list(self.seeds),
            },
            "plans": self.plans,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"the comparison's folder '{folder}' cannot be made: {error.strerror}. "
                "Choose another with --out."
            ) from error
        write_whole(folder / PLAN, tomli_w.dumps(content))

    def run(
        self,
        dataset: DataSet | None,
        workers: int | None,
        tell: Callable[[Ended], None],
    ) -> list[Ended]:
        """Run what is not there yet, seed by seed."""
        todo = [cell for cell in self.cells.values() if cell.how != "done"]
        done = len(self.cells) - len(todo)
        cores = num_cores()
        if workers is None:
            workers = 1 if self.alone or self.of_this_process else cores
        workers = min(workers, len(todo))
        if workers <= 1:
            return run_here(todo, dataset, self.last, tell, done)
        return run_side_by_side(todo, workers, max(1, cores // workers), tell, done)

    def rows(self, folder: Path, ended: Iterable[Ended]) -> list[Row]:
        """Return the rows of ``cells.csv``, the first strategy's first."""
        why = {one.cell.name: one for one in ended}
        rows = []
        for method in self.methods:
            for seed in self.seeds:
                cell = self.cells[method.label, seed]
                row: Row = {
                    "strategy": method.label,
                    "seed": seed,
                    "folder": cell.name,
                    "status": "failed",
                    "failed_rounds": 0,
                }
                error = folder / f"{cell.name}.error.txt"
                error.unlink(missing_ok=True)
                one = why.get(cell.name)
                if one is not None and one.reason:
                    row["reason"] = one.reason
                    if one.traceback:
                        write_whole(error, one.traceback)
                else:
                    row |= _reached(Path(cell.folder))
                rows.append(row)
        return rows


def _reached(folder: Path) -> Row:
    """Return what a run that has ended has reached."""
    try:
        summary = Run(folder).summary()
    except DataError as error:
        return {"reason": " ".join(str(error).split())}
    names = ("rounds", "failed_rounds", *METRICS, "bytes_down", "bytes_up")
    return {"status": "complete", **{name: summary[name] for name in names}}


def _trains_like(components: Components) -> str:
    """Return what a plan depends on, of a configuration."""
    tables = components.configuration.tables
    apart = {k: v for k, v in tables.items() if k not in ("run", "strategy", "server")}
    share = tables["strategy"].get("fraction-train")
    return json.dumps([apart, share], sort_keys=True, default=str)


def _plans_of(folder: Path) -> dict[str, str]:
    """Return how the clients of a comparison that was begun train, by strategy."""
    try:
        content = tomllib.loads((folder / PLAN).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    plans = content.get("plans")
    return {k: str(v) for k, v in plans.items()} if isinstance(plans, dict) else {}


@contextmanager
def _of(method: Method) -> Iterator[None]:
    """Say of an error in a ``with`` block which method it is about."""
    try:
        yield
    except FedweightError as error:
        raise type(error)(f"'{method.label}': {error}") from error.__cause__
