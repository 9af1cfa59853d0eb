"""Several strategies over several seeds: every cell a run, and what they are worth."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Literal

from ..core.errors import ConfigurationError, DataError
from ..core.extras import require
from ..core.options import MOST
from ..core.paths import clean_path
from ..core.signals import interruptible
from ..core.texts import listed, shown
from ..data import DataSet
from .axes import Asked
from .cells import Ended
from .comparison import Comparison
from .components import prepare
from .folder import alone_in
from .given import setting_map
from .own_strategies import try_own
from .pages import report_or_say
from .progress import watched
from .runner import as_of_now, flat_of, make_ready
from .study import Study, Wanted
from .summarizing import write_comparison

# Lines are printed, whether somebody watches or not.
LINES: Final = "lines"

Told = Callable[[Ended], None] | bool | Literal["lines"] | None


def compare(
    file: str | Path | None = None,
    strategies: Any = None,
    seeds: Any = None,
    *,
    objectives: Any = None,
    data_sets: Any = None,
    vary: Mapping[str, Sequence[Any]] | Sequence[str] | None = None,
    sweep: Mapping[str, Sequence[Any]] | Sequence[str] | None = None,
    target: float | None = None,
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
    the same call again ends a comparison that was stopped, and one that names more
    strategies, data sets or seeds beside those that are there adds them. One that would
    leave out runs of the folder that are complete, or that is of another configuration,
    is refused: no summary loses a result. Only the comparison has a report; that of a
    cell is written by :meth:`fedweight.Run.report`.

    Parameters
    ----------
    file : str or Path, optional
        A simulation file; the quick start by default. Its table ``[compare]`` may have
        the keys ``strategies``, ``objectives``, ``data-sets``, ``vary``, ``sweep``,
        ``seeds`` and ``target``, which hold where they are not given here.
    strategies : str, list or Mapping
        Names, classes or made objects; a text may have options:
        ``"fedavg,feddisco:a=0.2"``; or, by what they are to be called, settings each,
        ``{"ditto": {"strategy.name": "fedavg", "personal.name": "ditto"}}``. All are
        held against the first.
    seeds : str or list of int
        ``[0, 1, 2]``, ``"0,1,2"`` or ``"0-2"``; only 0 by default.
    objectives : str or list, optional
        Local objectives, likewise; every strategy is run with each.
    data_sets : str, list or Mapping, optional
        Data sets, likewise, with options of ``[data]``: ``"digits,adult"``; or, by what
        they are to be called, settings each: ``{"few": {"partition.clients": 5}}``.
        Everything is run and compared on each, and compared over all of them, where
        each counts once, by its mean over the seeds.
    vary : Mapping or sequence of str, optional
        Values of other keys of the file: ``{"training.learning-rate": [0.1, 0.01]}``,
        or ``["training.learning-rate=0.1,0.01"]``. Every strategy is run with each.
        Those of ``[data]`` and ``[partition]`` make other data, not other methods.
    sweep : Mapping or sequence of str, optional
        Likewise, of what is to be chosen: each strategy is run with all values of the
        keys that it has, on each of the data sets, and compared with the best one, by
        the mean over the seeds of the accuracy on ``data.validation``. Of equal ones
        the first is taken.
    target : float, optional
        A test accuracy in (0, 1]: in how many rounds, and bytes, it is reached. By
        default the mean of what the first strategy ends with.
    settings, dataset : optional
        As :func:`fedweight.run` takes them, for all cells.
    out : str or Path, optional
        The comparison's folder; by default ``runs/<name>-comparison``.
    workers : int, optional
        How many cells are run side by side, each in a process of its own that takes its
        share of the cores; 1 runs them one after another in this process. By default as
        many as there are cores, or GPUs where clients train on those, each process on
        one; and 1 where clients train on Ray or a GPU that is named, or where data or
        classes are this process's own. It changes no bit: how clients train is decided
        before.
    progress : bool, "lines" or Callable[[Ended], None], optional
        Lines on what is run, and one for each cell, where somebody watches (True), in
        any case, or never; or what is called when a cell has ended.

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
    require("a comparison", "studies", "pandas", "scipy")
    given = Asked(strategies, objectives, data_sets, vary, sweep, seeds, target)
    asked = given.beside(file)
    study = Study(file, asked.axes())
    study.read(setting_map(settings), dataset, bool(asked.objectives))
    dataset = as_of_now(dataset)
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
    tell, say = _told(progress)
    with ExitStack() as stack:
        there = folder.is_dir()
        if there:
            stack.enter_context(alone_in(folder))
        study.look(folder, dataset)
        for line in study.told(folder):
            say(line)
        study.choose_plans(dataset)
        study.make(folder)
        if not there:
            stack.enter_context(alone_in(folder))
            study.refuse_begun(folder)
        study.write_plan(folder)
        with interruptible():
            try:
                ended = study.run(dataset, workers, tell)
            except BaseException as stop:
                stop.add_note(
                    f"What was recorded is in {folder}. To go on, give the same "
                    "command."
                )
                raise
        study.refuse_mixed(folder, dataset)
        write_comparison(folder, study.rows(ended), study.axes.target)
        found = Comparison(folder)
        report_or_say(found)
    return found


def check_comparison(
    file: str | Path, settings: Mapping[str, Any] | Sequence[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Resolve all that a file's ``[compare]`` asks for, and make every method ready.

    Returns
    -------
    tuple
        What would be run, and why some of it would be refused, a line each.

    Raises
    ------
    ConfigurationError
        If there is nothing that could be resolved.
    """
    asked = Asked().beside(file)
    study = Study(file, asked.axes())
    study.read(setting_map(settings), None, bool(asked.objectives))
    first: dict[tuple[str, str], Wanted] = {}
    for one in study.wanted:
        first.setdefault((one.key.method, one.key.data), one)
    refused = []
    for (method, data), one in first.items():
        try:
            there = study.last.of(one.configuration)
            components = prepare(one.configuration, there)
            strategy, _, initial = make_ready(components)
            try_own(components, strategy, flat_of(initial))
        except (ConfigurationError, DataError) as error:
            refused.append(f"'{method}' on {data}: {error}")
    facts = {
        "strategies": listed([*dict.fromkeys(method for method, _ in first)], 40),
        "data sets": listed([*dict.fromkeys(data for _, data in first)], 40),
        "seeds": listed(list(map(str, study.axes.seeds)), 40),
        "runs": len(study.wanted),
    }
    return facts, refused


def _told(progress: Any) -> tuple[Callable[[Ended], None], Callable[[str], None]]:
    """Return what is told how a cell ended, and what is said besides."""
    if callable(progress):
        return progress, _mute
    if not (progress is None or progress == LINES or isinstance(progress, bool)):
        raise ConfigurationError(
            "progress must be a function of how a cell ended, or True, False or "
            f"'{LINES}', got {shown(progress)}."
        )
    shows = progress == LINES or (progress and watched())
    return (_print, _print) if shows else (_mute, _mute)


def _print(line: object) -> None:
    print(line, file=sys.stderr, flush=True)


def _mute(line: object) -> None:
    """Tell nobody."""
