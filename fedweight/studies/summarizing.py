"""What a comparison's runs reached, what of them was chosen, and how they differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import DataError
from ..core.texts import one_of
from ..metrics.measures import MEASURES
from .endings import FAILED, lost_groups_of
from .failures import failed_rounds_of
from .folder import ERRORS, Table
from .gaps import GAPS, OF, gap_named, gaps_by_attribute
from .ranks import Ranking, SignedRanks, rank_methods, signed_ranks
from .reader import table_of
from .result import Run
from .statistics import compare_pairs, settled, t_interval

CELLS = "cells.csv"
SUMMARY = "summary.csv"
WARNINGS = "warnings.csv"

# What a row over all data sets has for one.
ALL_DATA = "all data sets"


@dataclass(frozen=True)
class Metric:
    """What is compared: its title, whether less is better, and if it is a share."""

    title: str
    less_is_better: bool = False
    is_share: bool = False


# By the keys of a run's summary.
METRICS = {
    "test_accuracy": Metric("test accuracy of the last model", is_share=True),
    **{
        f"test_{name.replace('-', '_')}": Metric(
            f"{name} of the last model on the test set",
            less_is_better=one.sign < 0,
            is_share=(one.low, one.high) == (0.0, 1.0),
        )
        for name, one in MEASURES.items()
        if one.sign and name not in ("loss", "accuracy")
    },
    "client_accuracy_mean": Metric("mean of the clients' accuracies", is_share=True),
    "client_accuracy_worst10": Metric(
        "mean accuracy of the worst tenth of the clients", is_share=True
    ),
    # Only where some strategy has personal models: the others' use the global one.
    "used_accuracy": Metric(
        "held-out accuracy of the models that clients use, their own or the global one",
        is_share=True,
    ),
    **{
        gap_named(name): Metric(
            f"gap in {name.replace('_', ' ')} between groups",
            less_is_better=True,
            is_share=True,
        )
        for name in GAPS
    },
}


def metric_of(name: str) -> Metric:
    """Return one of :data:`METRICS`, or what a gap of one of several attributes is.

    Examples
    --------
    >>> metric_of("accuracy_gap of sex").title
    'gap in accuracy between groups of sex'
    """
    own, _, attribute = name.partition(OF)
    one = METRICS[own]
    return replace(one, title=f"{one.title}{OF}{attribute}") if attribute else one


def is_gap(name: str) -> bool:
    """Tell whether a metric is a gap between groups.

    Examples
    --------
    >>> is_gap("accuracy_gap of sex"), is_gap("test_accuracy")
    (True, False)
    """
    return name.partition(OF)[0] in map(gap_named, GAPS)


def metrics_in(cells: Iterable[Row]) -> list[str]:
    """Return all metrics that rows of runs may have, by name."""
    of_groups = [key for cell in cells for key in cell if OF in key]
    return [*dict.fromkeys([*METRICS, *of_groups])]


# What a sweep chooses by; less of the second is better.
JUDGES = ("validation_accuracy", "validation_loss")

WARNING_COLUMNS = ("strategy", "data", "seed", "folder", "warning")
CELL_COLUMNS = (
    *("strategy", "data", "seed", "candidate", "chosen", "folder", "status"),
    *("rounds", "failed_rounds", "reason", *METRICS, *JUDGES),
    *("rounds_to_target", "bytes_to_target", "bytes_down", "bytes_up"),
)
SUMMARY_COLUMNS = (
    *("metric", "data", "strategy", "n", "mean", "low", "high", "against", "pairs"),
    *("difference", "difference_low", "difference_high"),
    *("bootstrap_low", "bootstrap_high", "effect_size", "p", "p_holm"),
    *("wilcoxon_p", "wilcoxon_p_holm", "wilcoxon_verdict", "verdict", "sentence"),
    *("average_rank", "target", "reached", "rounds_to_target", "bytes_to_target"),
    *("chosen", "note"),
)

Row = dict[str, Any]


def reached(folder: Path) -> Row:
    """Return what a run that has ended has reached, and why what is not known."""
    try:
        run = Run(folder)
        summary = run.summary()
    except DataError as error:
        return {"reason": " ".join(str(error).split())}
    names = ("rounds", "failed_rounds", *METRICS, *JUDGES)
    row = {name: summary.get(name) for name in (*names, "bytes_down", "bytes_up")}
    if not _has_personal(run):
        row["used_accuracy"] = summary["held_out_accuracy"]
    elif "personal_accuracy" in summary:
        row["used_accuracy"] = summary["personal_accuracy"]
    by_attribute = gaps_by_attribute(run)
    if len(by_attribute) > 1:
        # The largest would be another attribute's with another seed or strategy.
        row |= dict.fromkeys(map(gap_named, GAPS))
        row |= {
            f"{name}{OF}{attribute}": value
            for attribute, gaps in by_attribute.items()
            for name, value in gaps.items()
        }
    failed, no_model = failed_rounds_of(run)
    # Gaps that there are not would be missed without a word.
    lines = [*filter(None, [failed]), *lost_groups_of(run)]
    status = "failed" if no_model else "complete"
    row["warnings"] = [] if no_model else told_of(summary["warnings"])
    return {"status": status, "reason": "; ".join(lines), **row}


def told_of(warnings: Iterable[str]) -> list[str]:
    """Return the warnings of a run that a comparison does not say in its own words."""
    return [line for line in warnings if FAILED not in line and ERRORS not in line]


def _has_personal(run: Run) -> bool:
    return bool(table_of(run.config, "personal").get("name", "none") != "none")


def write_comparison(
    folder: Path, cells: Sequence[Row], target: float | None = None
) -> None:
    """Write ``cells.csv``, ``warnings.csv`` and ``summary.csv``, each whole or not.

    Parameters
    ----------
    folder : Path
        The comparison's.
    cells : Sequence[dict]
        Rows of :data:`CELL_COLUMNS`, and gaps of several attributes and ``warnings``
        beside them; the first strategy's first. What was chosen, and when the target
        was reached, is filled in.
    target : float, optional
        The test accuracy that rounds and bytes are counted to. By default what the
        first strategy ends with, on average over the seeds, on the same data.
    """
    choose(cells)
    targets = {
        data: _first_reaches(cells, data) if target is None else target
        for data in dict.fromkeys(cell["data"] for cell in cells)
    }
    runs = [
        Run(folder / cell["folder"]) if cell["status"] == "complete" else None
        for cell in cells
    ]
    personal = any(run is not None and _has_personal(run) for run in runs)
    for cell, run in zip(cells, runs, strict=True):
        if run is not None:
            cell |= _time_to(run, targets[cell["data"]])
        if not personal:  # All have the held-out accuracy of the global model.
            cell["used_accuracy"] = None
    of_groups = [name for name in metrics_in(cells) if name not in METRICS]
    warned = [
        {column: cell[column] for column in WARNING_COLUMNS[:-1]} | {"warning": line}
        for cell in cells
        for line in cell.pop("warnings", ())
        if cell["chosen"]
    ]
    for name, columns, rows in (
        (WARNINGS, WARNING_COLUMNS, warned),
        (CELLS, (*CELL_COLUMNS, *of_groups), cells),
        (SUMMARY, SUMMARY_COLUMNS, summary_of(cells, targets)),
    ):
        table = Table(folder / name, columns)
        table.append(rows)


# --------------------------------------------------------------------------- choosing


def choose(cells: Sequence[Row]) -> None:
    """Mark what is compared: of a sweep's candidates the one that validation likes.

    That of the highest mean validation accuracy over the seeds, or of the least loss
    where there is no accuracy. One of which some runs failed, or have a loss that is no
    number, is taken only where no other has more that can be judged; of equal ones the
    first is.
    """
    several: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for cell in cells:
        group = several.setdefault((cell["strategy"], cell["data"]), {})
        group.setdefault(cell.get("candidate", ""), []).append(cell)
    for candidates in several.values():
        best = max(candidates.values(), key=_liked)
        for rows in candidates.values():
            for row in rows:
                row["chosen"] = int(rows is best)


def _liked(rows: Sequence[Row]) -> tuple[int, float, float]:
    accuracy, loss = (_known(rows, judge) for judge in JUDGES)
    # A loss counts where it is all there is.
    less = 0.0 if accuracy else -_mean(loss, math.inf)
    return len(accuracy or loss), _mean(accuracy, -math.inf), less


def _known(rows: Iterable[Row], key: str) -> list[float]:
    values = [row.get(key) for row in rows if row["status"] == "complete"]
    return [value for value in values if value is not None and math.isfinite(value)]


def _mean(values: Sequence[float], otherwise: float = math.nan) -> float:
    return float(np.mean(values)) if values else otherwise


def _choice(rows: Sequence[Row]) -> str:
    """Return what was chosen from what, in words; empty where nothing was."""
    by: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("candidate"):
            by.setdefault(row["candidate"], []).append(row)
    if not by:
        return ""
    judge = JUDGES[0] if _known(rows, JUDGES[0]) else JUDGES[1]
    means = {name: _mean(_known(own, judge)) for name, own in by.items()}
    chosen = next(name for name, own in by.items() if own[0]["chosen"])
    others = ", ".join(f"{name} {means[name]:.4f}" for name in by)
    return f"{chosen}, by {judge.replace('_', ' ')}: {others}"


# ------------------------------------------------------------------------- the target


def _first_reaches(cells: Sequence[Row], data: str) -> float:
    first = cells[0]["strategy"]
    own = [c for c in cells if (c["strategy"], c["data"]) == (first, data)]
    return _mean(_known([c for c in own if c["chosen"]], "test_accuracy"))


def _time_to(run: Run, target: float) -> Row:
    """Return in how many rounds and bytes a run reaches a test accuracy, if it does."""
    measured = run.measured("test_accuracy")
    there = measured.index[measured >= target]
    if not len(there):
        return {}
    rounds = run.rounds[run.rounds["round"] <= there[0]]
    columns = [c for c in ("bytes_down", "bytes_up") if c in rounds]
    return {
        "rounds_to_target": int(there[0]),
        "bytes_to_target": int(rounds[columns].sum().sum()),
    }


# ------------------------------------------------------------------------ the summary


def summary_of(
    cells: Sequence[Row], targets: Mapping[str, float] | None = None
) -> list[Row]:
    """Return the rows of ``summary.csv``: metric by metric, data set by data set.

    After those of several data sets come rows over all of them, in which each data set
    counts once (:mod:`fedweight.studies.statistics`).
    """
    data_sets = [*dict.fromkeys(cell["data"] for cell in cells)]
    rows: list[Row] = []
    measured = [metric for metric in metrics_in(cells) if _known(cells, metric)]
    for metric in measured or ["test_accuracy"]:
        for data in data_sets:
            own = [cell for cell in cells if cell["data"] == data]
            rows += _compared(metric, data, own, (targets or {}).get(data))
        if len(data_sets) > 1:
            ranks = ranking_of(cells, metric).average_ranks
            for row in _compared(metric, ALL_DATA, cells, None):
                rank = ranks.get(row["strategy"], math.nan)
                rows.append(row | {"average_rank": rank})
    return rows


def values_of(cells: Sequence[Row], metric: str) -> dict[str, np.ndarray[Any, Any]]:
    """Return a metric by strategy, of data sets and seeds ``[D, S]``, or NaN."""
    data_sets = [*dict.fromkeys(cell["data"] for cell in cells)]
    seeds = [*dict.fromkeys(cell["seed"] for cell in cells)]
    shape = len(data_sets), len(seeds)
    found: dict[str, np.ndarray[Any, Any]] = {}
    for cell in cells:
        own = found.setdefault(cell["strategy"], np.full(shape, math.nan))
        value = cell.get(metric)
        if cell["chosen"] and cell["status"] == "complete" and value is not None:
            own[data_sets.index(cell["data"]), seeds.index(cell["seed"])] = value
    return found


def ranking_of(cells: Sequence[Row], metric: str) -> Ranking:
    """Rank strategies over data sets, each by its mean over the seeds.

    Those that have no value on any data set are left out.
    """
    values = values_of(cells, metric)
    there = {name: own for name, own in values.items() if np.isfinite(own).any()}
    return rank_methods(
        _means_of(there or values), less_is_better=metric_of(metric).less_is_better
    )


def signed_ranks_of(
    cells: Sequence[Row], metric: str, rope: float
) -> dict[str, SignedRanks]:
    """Compare strategies with the first over data sets, each by its means."""
    (first, ours), *others = values_of(cells, metric).items()
    less = metric_of(metric).less_is_better
    found = {}
    for name, own in others:
        means = _means_of({first: ours, name: own})
        found[name] = signed_ranks(*means.values(), rope=rope, less_is_better=less)
    return found


def _means_of(
    values: Mapping[str, np.ndarray[Any, Any]],
) -> dict[str, list[float]]:
    """Return each strategy's mean over the seeds on each data set, ``[D]``."""
    # A mean over other seeds than the others' would be no pair.
    every = np.isfinite(np.array([*values.values()])).all(axis=0)
    return {
        name: _over_seeds(np.where(every, own, math.nan)).tolist()
        for name, own in values.items()
    }


def _over_seeds(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the means ``[D]`` of what is known of ``[D, S]``; NaN where nothing is."""
    return np.array([_mean(own[np.isfinite(own)].tolist()) for own in values])


def _compared(
    metric: str, data: str, cells: Sequence[Row], target: float | None
) -> list[Row]:
    """Return a row for each strategy, held against the first, seed by seed.

    Over all data sets it is data set by data set, by means over the seeds.
    """
    values, over_all = values_of(cells, metric), data == ALL_DATA
    first, *others = values
    # Of the seeds that both have, so that means are over the same ones.
    apart = {name: settled(values[first], values[name]) for name in others}
    if over_all:
        values = {name: _over_seeds(own) for name, own in values.items()}
        apart = {name: _over_seeds(own) for name, own in apart.items()}
    found = compare_pairs(
        [0.0] * values[first].size,
        {name: own.ravel().tolist() for name, own in apart.items()},
        less_is_better=metric_of(metric).less_is_better,
        pair="data set" if over_all else "pair",
    )
    rows = []
    for name, own in values.items():
        known = own[np.isfinite(own)]
        low, high = t_interval(known)
        mine = [cell for cell in cells if cell["strategy"] == name]
        row: Row = {
            "metric": metric,
            "data": data,
            "strategy": name,
            "n": len(known),
            "mean": _mean(known.tolist()),
            "low": low,
            "high": high,
            "chosen": "" if over_all else _choice(mine),
            "note": _note(mine, over_all, metric),
        }
        if target is not None and metric == "test_accuracy":
            picked = [cell for cell in mine if cell["chosen"]]
            rounds = _known(picked, "rounds_to_target")
            row |= {
                "target": target,
                "reached": len(rounds),
                "rounds_to_target": _mean(rounds),
                "bytes_to_target": _mean(_known(picked, "bytes_to_target")),
            }
        if name in found:
            pair = found[name]
            row |= {
                "against": first,
                "pairs": pair.pairs,
                "difference": pair.difference,
                "difference_low": pair.low,
                "difference_high": pair.high,
                "bootstrap_low": pair.bootstrap_low,
                "bootstrap_high": pair.bootstrap_high,
                "effect_size": pair.effect_size,
                "p": pair.p,
                "p_holm": pair.p_holm,
                "wilcoxon_p": pair.wilcoxon_p,
                "wilcoxon_p_holm": pair.wilcoxon_p_holm,
                "wilcoxon_verdict": pair.wilcoxon_verdict,
                "verdict": pair.verdict,
                "sentence": pair.sentence,
            }
        if failed := _all_failed(mine):
            row |= {"verdict": "failed", "sentence": failed}
        rows.append(row)
    return rows


def _all_failed(cells: Sequence[Row]) -> str:
    """Return why not one run of a strategy came to its end; empty if one did."""
    picked = [cell for cell in cells if cell["chosen"]]
    if not picked or any(cell["status"] != "failed" for cell in picked):
        return ""
    reasons = [str(cell.get("reason", "")) for cell in picked]
    runs = f"all {len(picked)} runs" if picked[1:] else "its only run"
    return f"failed in {runs}: {one_of(reasons)}"


def within_bounds(metric: str, low: float, high: float) -> tuple[float, float]:
    """Return an interval of a metric's mean, to be shown: of a share within [0, 1].

    The mean of shares lies there for sure, so that an interval holds it as often with
    what is cut off as without.
    """
    if not metric_of(metric).is_share:
        return low, high
    return float(np.clip(low, 0, 1)), float(np.clip(high, 0, 1))


def _note(cells: Sequence[Row], says_data: bool, metric: str) -> str:
    notes = []
    for cell in cells:
        names = [cell["data"]] if says_data else []
        which = ", ".join([*names, *filter(None, [cell.get("candidate")])])
        where = f"{which}{', ' if which else ''}seed {cell['seed']}"
        if cell["status"] == "failed":
            notes.append(f"{where} failed: {cell['reason']}")
        elif cell["failed_rounds"]:
            notes.append(f"{where}: {cell['failed_rounds']} rounds failed")
        elif is_gap(metric) and cell.get("reason"):
            notes.append(f"{where}: {cell['reason']}")
    return "; ".join(notes)
