"""What each client of a simulation contributes: runs in which others are left out."""

from __future__ import annotations

import hashlib
import logging
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import ConfigurationError
from ..core.paths import clean_path
from ..core.signals import interruptible
from ..core.texts import listed
from ..core.writing import write_whole
from ..data import DataSet
from ..metrics.contribution import (
    Contribution,
    Method,
    contribution_cost,
    leave_one_out,
    shapley,
)
from .cells import CHOSEN, LastData, what_is_there
from .components import prepare
from .configuration import Configuration
from .given import as_settings, of_main, setting_map, whole_tables
from .origins import check_same
from .progress import watched
from .result import Run
from .runner import as_of_now, name_of_own, preface_of, resume, run_configured

log = logging.getLogger("fedweight")

TABLE = "contributions.csv"

# A folder is called by the clients that take part; where that is longer, by a hash.
LONGEST_NAME = 80


def contribution(
    file: str | Path | None = None,
    method: Method = "shapley",
    permutations: int | None = None,
    *,
    tolerance: float = 0.0,
    settings: Mapping[str, Any] | Sequence[str] = (),
    out: str | Path | None = None,
    dataset: DataSet | None = None,
) -> Contribution:
    """Return what each client of a simulation contributes to the test accuracy.

    A set of clients is worth the accuracy (of masks: Dice) on the server's test set of
    the last model of a run in which all others are left out (``partition.leave-out``);
    nobody is worth that of the initial model. Each run stands in a folder of its own,
    and is not run again if it is there: the same call goes on with what was stopped,
    and more permutations add to what was run. :func:`contribution_runs` says beforehand
    how many runs it takes; where somebody watches, a line does before they start.

    Parameters
    ----------
    file : str or Path, optional
        A simulation file, such as the ``config.toml`` of a run that has ended; the
        quick start by default.
    method : {"shapley", "leave-one-out"}
        See :func:`fedweight.metrics.shapley`, :func:`fedweight.metrics.leave_one_out`.
    permutations : int, optional
        How many orders of the clients are drawn, from the run's seed, as ``shapley``
        takes it.
    tolerance : float
        0 or more; as ``shapley`` takes it, in accuracy.
    settings, dataset : optional
        As :func:`fedweight.run` takes them.
    out : str or Path, optional
        The folder of all runs; by default ``runs/<name>-contribution``. It has
        ``contributions.csv`` in the end.

    Returns
    -------
    Contribution
        By client, in accuracy: from -1 to 1. Clients without examples are not in it.

    Raises
    ------
    ConfigurationError, DataError
        Before anything is run; also if the data have no test set, or numbers are
        predicted, for which there is no score from 0 to 1.

    Notes
    -----
    Who is left out stays a client without examples: it is drawn, but not asked. So all
    sets share the partition, the initial model and the draws. Where ``fraction-train``
    is below 1, rounds in which only such clients are drawn fail, and the model stays.

    It measures, and decides nothing: what is chosen by it was chosen on the test set.

    Examples
    --------
    >>> from fedweight.studies import contribution
    >>> found = contribution("runs/mine/config.toml", permutations=20)  # doctest: +SKIP
    >>> found.values, found.errors  # doctest: +SKIP
    """
    worth = _Worth(file, settings, dataset)
    # What does not fit is refused before the folder is made.
    runs = _most_runs(len(worth.clients), method, permutations)
    if watched():
        line = f"{method} of {len(worth.clients)} clients: {runs} runs at most"
        print(line, file=sys.stderr, flush=True)
    name = worth.configuration["run"]["name"].replace("/", "-") or "unnamed"
    worth.folder = clean_path("out", out or f"runs/{name}-contribution")
    seed = worth.configuration["run"]["seed"]
    with interruptible(), _where_it_goes_on(worth.folder):
        if method == "leave-one-out":
            found = leave_one_out(worth.clients, worth)
        else:
            found = shapley(
                worth.clients, worth, permutations, tolerance=tolerance, seed=seed
            )
    rows = [f"{c},{value!r},{found.errors[c]!r}" for c, value in found.values.items()]
    text = "\n".join(["client,contribution,standard_error", *rows, ""])
    write_whole(worth.folder / TABLE, text)
    return found


def contribution_runs(
    file: str | Path | None = None,
    method: Method = "shapley",
    permutations: int | None = None,
    *,
    settings: Mapping[str, Any] | Sequence[str] = (),
    dataset: DataSet | None = None,
) -> int:
    """Return how many runs :func:`contribution` takes at most, and run none.

    Parameters
    ----------
    file, method, permutations, settings, dataset : optional
        As :func:`contribution` takes them.

    Examples
    --------
    >>> contribution_runs(settings={"partition.clients": 5})
    31
    >>> contribution_runs(method="leave-one-out", settings={"partition.clients": 5})
    6
    """
    clients = len(_Worth(file, settings, dataset).clients)
    return _most_runs(clients, method, permutations)


def _most_runs(clients: int, method: Method, permutations: int | None) -> int:
    # Nobody is worth what the initial model of another run is.
    nobody = method == "shapley"
    return contribution_cost(clients, method, permutations) - nobody


class _Worth:
    """What sets of clients reach, each in a run of its own."""

    def __init__(self, file: Any, settings: Any, dataset: DataSet | None) -> None:
        given = setting_map(settings)
        self.configuration = Configuration.read(
            file, as_settings(given), name_of_own(dataset), whole_tables(given)
        )
        self.preface = preface_of(given, dataset)
        self.of_this_process = dataset is not None or bool(of_main(given))
        self.dataset = as_of_now(dataset) or LastData().of(self.configuration)
        components = prepare(self.configuration, self.dataset)
        data, score = components.data, components.task.score
        if not score:
            raise ConfigurationError(
                "what clients contribute is measured in a score from 0 to 1, and "
                f"{data.task} has none."
            )
        if score not in components.statistics.measures:
            raise ConfigurationError(
                f"what clients contribute is measured in {score}. Add it to "
                "run.metrics, or leave that out."
            )
        self.column = f"test_{score}"
        if not len(data.test):
            raise ConfigurationError(
                f"what clients contribute is measured on a test set, but '{data.name}' "
                "has none."
            )
        self.clients: list[int] = np.flatnonzero(data.sizes).tolist()
        self.folder = Path()

    def __call__(self, some: frozenset[int]) -> float:
        """Return the score on the test set of some clients' last model."""
        whole = self._run(self.clients)
        if not some:
            return float(whole.measured(self.column).loc[0])
        # Under load another plan could win, and give other bits.
        chosen = {key: whole.config["engine"][key] for key in CHOSEN}
        made = self._run(sorted(some), chosen)
        return float(made.measured(self.column).iloc[-1])

    def _run(
        self, clients: Sequence[int], chosen: Mapping[str, str] | None = None
    ) -> Run:
        """Return the run of some clients, and run it if it is not there."""
        left_out = {*self.clients} - {*clients}
        left_out |= {*self.configuration["partition"]["leave-out"]}
        wanted = self.configuration.having("partition", "leave-out", sorted(left_out))
        for key, value in (chosen or {}).items():
            wanted = wanted.having("engine", key, value)
        name = "clients-" + "-".join(map(str, clients))
        if len(name) > LONGEST_NAME:
            name = "clients-" + hashlib.sha256(name.encode()).hexdigest()[:32]
        folder = self.folder / name
        how, before, differs = what_is_there(folder, tomllib.loads(wanted.to_toml()))
        if differs:
            raise ConfigurationError(
                f"{folder} holds another run: {differs}. Name another folder with "
                "'out', or remove that one."
            )
        if how == "done":
            check_same(folder, wanted, self.dataset.digest)
        if how == "done":
            return Run(folder)
        if how == "resume" and not self.of_this_process:
            return resume(folder, progress=False)
        for key, value in before.items():
            wanted = wanted.having("engine", key, value)
        log.info("running with the clients %s", listed(list(map(str, clients))))
        return run_configured(
            wanted,
            folder,
            name,
            dataset=self.dataset,
            preface=self.preface,
            report=False,
            progress=False,
            overwrite=False if how == "new" else "unfinished",
        )


@contextmanager
def _where_it_goes_on(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as stop:
        stop.add_note(f"What was run is in {folder}. To go on, give the same call.")
        raise
