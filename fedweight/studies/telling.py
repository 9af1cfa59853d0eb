"""A comparison in words: who differs from the first, and how to read its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from ..core.errors import DataError
from ..core.extras import Imported
from ..core.texts import in_bytes, listed
from .comparison_lines import rows_of
from .gaps import OF
from .reader import table_of
from .result import Run
from .statistics import LEVEL, pairs_needed
from .summarizing import (
    ALL_DATA,
    JUDGES,
    SUMMARY,
    Row,
    is_gap,
    metric_of,
    within_bounds,
)

if TYPE_CHECKING:
    import pandas as pd

    from .comparison import Comparison
else:
    pd = Imported("pandas", "studies", "a run's folder")

# With fewer, 95% t intervals are so wide that a reader must be warned.
FEW_SEEDS = 5
FEW_DATA_SETS = 5

_IN_WORDS = {
    "better": "better than",
    "worse": "worse than",
    "same": "the same as",
    "undecided": "not told apart from",
}
_APART = ("better", "worse")

# Of what single data sets tell, so many stand above the tables.
_MOST_SINGLE = 6


def number_text(value: float, form: str = ".4f") -> str:
    """Return a number as text; nothing for NaN."""
    return "" if math.isnan(value) else format(value, form)


def interval_text(low: float, high: float, form: str = ".4f") -> str:
    """Return an interval as text; nothing for NaN."""
    return "" if math.isnan(low) else f"{low:{form}} to {high:{form}}"


def title_of(found: Comparison, metric: str) -> str:
    """Return what a metric is called here, and whether less of it is better."""
    less = " (less is better)" * metric_of(metric).less_is_better
    return f"{name_of(found, metric)}{less}"


def name_of(found: Comparison, metric: str) -> str:
    """Return what a metric is called here; of a gap also between which groups."""
    title = metric_of(metric).title
    if is_gap(metric) and OF not in metric and len(attributes_of(found)) == 1:
        title += f"{OF}{attributes_of(found)[0]}"
    return title


def attributes_of(found: Comparison) -> list[str]:
    """Return by which sensitive attributes groups were measured."""
    run = _a_run(found)
    named = table_of(run.environment, "data").get("grouped_by") if run else None
    return list(map(str, named)) if isinstance(named, list) else []


def positive_of(found: Comparison) -> str:
    """Return the class that rates of groups are of, by its name; empty if none is."""
    run = _a_run(found)
    if run is None:
        return ""
    given = str(table_of(run.config, "groups").get("positive", ""))
    names = table_of(run.environment, "data").get("class_names")
    names = list(map(str, names)) if isinstance(names, list) else []
    if not given and len(names) == 2:
        return str(names[1])
    if given not in names and given.isdecimal() and int(given) < len(names):
        return str(names[int(given)])
    return given


def _a_run(found: Comparison) -> Run | None:
    """Return a run that has ended, for what all have in common."""
    for row in rows_of(found.cells[found.cells["status"] == "complete"])[:1]:
        with suppress(DataError):
            run = Run(found.folder / row["folder"])
            return run if run.environment else None
    return None


# ---------------------------------------------------------------------- who differs


def verdicts_of(found: Comparison) -> list[str]:
    """Say how all do in the first metric, and then who is told apart in any other."""
    summary, first = found.summary, found.strategies[0]
    merit = summary["metric"][0]
    several = len(found.data_sets) > 1
    data = ALL_DATA if several else found.data_sets[0]
    held = summary[summary["against"] != ""]
    own = held[held["data"] == data]
    apart = own[(own["metric"] != merit) & own["verdict"].isin(_APART)]
    failed = summary["verdict"] == "failed"
    failed &= (summary["metric"] == merit) & (summary["data"] == data)
    said = [f"{r['strategy']} {r['sentence']}." for r in rows_of(summary[failed])]
    if summary[failed]["strategy"].eq(first).any():
        return [*said, f"Nothing can be held against {first}, which is the first."]
    held_in_it = own[(own["metric"] == merit) & (own["verdict"] != "failed")]
    said += _of_merit(rows_of(held_in_it), first, _in(found, merit))
    said += [
        _sentence(row, first, _in(found, row["metric"]), found.accuracy_beside(row))
        for row in rows_of(apart)
    ]
    if several:
        single = held[(held["data"] != ALL_DATA) & held["verdict"].isin(_APART)]
        told = [
            f"{row['strategy']} {row['verdict']} in the "
            f"{name_of(found, row['metric'])} on {row['data']}"
            for row in rows_of(single)
        ]
        if told:
            said.append(f"On single data sets: {_some(told, _MOST_SINGLE)}.")
    return said


def _in(found: Comparison, metric: str) -> str:
    over = f" over {ALL_DATA}" if len(found.data_sets) > 1 else ""
    return f"the {title_of(found, metric)}{over}"


def _of_merit(rows: Sequence[Row], first: str, where: str) -> Iterator[str]:
    """Yield who differs, each with its numbers, and the others in a sentence."""
    if len(rows) == 1:
        yield _sentence(rows[0], first, where)
        return
    apart = [row for row in rows if row["verdict"] in _APART]
    same = [row for row in rows if row["verdict"] == "same"]
    left = [row for row in rows if row not in apart and row not in same]
    yield from (_sentence(row, first, where) for row in apart)
    if left and not apart:
        yield f"No strategy is told apart from {first} in {where}{_why_none(left)}."
    elif left:
        names = listed([row["strategy"] for row in left], 8)
        yield f"Not told apart from {first} in it: {names}."
    if same:
        names = listed([row["strategy"] for row in same], 8)
        verb = "is" if len(same) == 1 else "are"
        why = same[0]["sentence"].partition(": ")[2]
        yield f"{names} {verb} the same as {first} in {where}: {why}."


def _why_none(rows: Sequence[Row]) -> str:
    """Return why no test could be made, where that is so of all of them."""
    reasons = {row["sentence"].partition(": ")[2] for row in rows}
    untested = all(math.isnan(row["p"]) for row in rows)
    return f": {reasons.pop()}" if untested and len(reasons) == 1 else ""


def _sentence(row: Row, first: str, where: str, beside: str = "") -> str:
    numbers = row["sentence"].partition(": ")[2]
    found = _IN_WORDS.get(row["verdict"], row["verdict"])
    with_it = f"; {beside}" if beside else ""
    return f"{row['strategy']} is {found} {first} in {where}: {numbers}{with_it}."


def _some(told: Sequence[str], most: int) -> str:
    more = len(told) - most
    return "; ".join(told[:most]) + (f"; and {more} more, below" * (more > 0))


# ------------------------------------------------------------------- how it is read


def legend_of(found: Comparison) -> str:
    """Say what the star means, where there is one; else nothing."""
    if not found.summary["verdict"].eq("better").any():
        return ""
    corrected = "Holm's p" if len(found.strategies) > 2 else "p"
    return f"* better than {found.strategies[0]}: {corrected} is at most {LEVEL:g}."


def cautions_of(found: Comparison) -> list[str]:
    """Return what few seeds, or few data sets, tell."""
    notes = []
    count = len(found.seeds)
    if count < FEW_SEEDS:
        notes.append(
            f"{count} seed{' tells' if count == 1 else 's tell'} little: at most "
            "large differences are found. 10 or more, --seeds 0-9, tell more."
        )
    if (several := len(found.data_sets)) > 1:
        little = f", of which {several} tell little" * (several < FEW_DATA_SETS)
        notes.append(
            f"Over {ALL_DATA} each counts once, with its mean over the seeds: such "
            f"a verdict is about further data sets{little}."
        )
    return notes


def reading_of(found: Comparison) -> list[str]:
    """Return how the tables are to be read, one line each."""
    others = max(len(found.strategies) - 1, 1)
    several = len(found.data_sets) > 1
    summary, notes = found.summary, list[str]()
    if len(found.strategies) > 1:
        over = f" by Holm's p over {others} comparisons" if others > 1 else ""
        notes.append(
            f"Verdicts are the paired t test's at {LEVEL:g}{over}; Wilcoxon's test "
            "stands beside it and decides nothing."
        )
        metrics = len(dict.fromkeys(summary["metric"]))
        if metrics > 1:
            within = "; Holm's correction goes over the strategies within one"
            notes.append(
                f"Each of the {metrics} metrics is tested by itself"
                f"{within * (others > 1)}. The more metrics there are, the likelier "
                "one of them differs by chance."
            )
        where = "On one data set, seeds" if several else "Seeds"
        notes.append(
            f"{where} redraw splits of the same data, the first model and who is "
            "sampled: intervals and verdicts are about these data and such splits, "
            "not about new data."
        )
    alone = (
        ", each of one comparison alone, as p is; Holm's p decides, so where an "
        "interval leaves out 0 the verdict may still be undecided"
        if others > 1
        else ""
    )
    notes.append(f"Intervals are 95% t intervals{alone}. The test set chose nothing.")
    if summary["wilcoxon_verdict"].eq("cannot reach").any():
        notes.append(
            f"cannot reach: Wilcoxon's test needs {pairs_needed(others)} pairs "
            f"that differ to find anything at {LEVEL:g}, whatever they are"
            + (f", in {others} comparisons." if others > 1 else ".")
        )
    known = summary.dropna(subset=["low", "high"])
    ends = known[["metric", "low", "high"]].itertuples(index=False, name=None)
    if any(within_bounds(*one) != one[1:] for one in ends):
        notes.append(
            f"Intervals of shares are cut at 0 and 1; {SUMMARY} has them whole."
        )
    of_rates = any(name.startswith("demographic_parity") for name in summary["metric"])
    if of_rates and (positive := positive_of(found)):
        notes.append(
            f"Gaps in rates are of class {positive}: demographic parity of how often "
            "it is predicted, equal opportunity of its true positive rate, equalized "
            "odds the larger of that and of its false positive rate."
        )
    return notes


# ---------------------------------------------------------------- targets and choices


def to_target(found: Comparison, data: str) -> pd.DataFrame:
    """Return in how many rounds and bytes each strategy came to the target.

    Medians over all runs, in which one that did not reach it counts as later than all
    that did: a mean over those that did would flatter who seldom does.
    """
    cells = found.cells
    cells = cells[(cells["data"] == data) & (cells["chosen"] == 1)]
    cells = cells[cells["status"] == "complete"]
    rows = []
    for name in found.strategies:
        own = cells[cells["strategy"] == name]
        times = own["rounds_to_target"]
        rounds, traffic = (
            float(own[f"{what}_to_target"].fillna(math.inf).median())
            for what in ("rounds", "bytes")
        )
        rows.append(
            {
                "strategy": name,
                "reached": f"{times.notna().sum()} of {len(own)}",
                "rounds": f"{rounds:g}" if math.isfinite(rounds) else "not reached",
                "traffic": in_bytes(traffic) if math.isfinite(traffic) else "",
            }
        )
    return pd.DataFrame(rows)


def target_of(found: Comparison, data: str) -> float:
    """Return the test accuracy that rounds are counted to; NaN where there is none."""
    known = found.summary[found.summary["data"] == data]["target"].dropna()
    return float(known.iloc[0]) if len(known) else math.nan


def choices_of(found: Comparison) -> pd.DataFrame:
    """Return what a sweep chose from what: a row for each candidate."""
    cells = found.cells[found.cells["candidate"] != ""]
    rows = []
    for keys, own in cells.groupby(["data", "strategy", "candidate"], sort=False):
        row: Row = dict(zip(("data", "strategy", "candidate"), keys, strict=True))
        row["chosen"] = "chosen" if own["chosen"].eq(1).any() else ""
        rows.append(row | {judge: own[judge].mean() for judge in _judges(cells)})
    return pd.DataFrame(rows)


def _judges(cells: pd.DataFrame) -> Iterable[str]:
    return [judge for judge in JUDGES if judge in cells and cells[judge].notna().any()]
