"""What a comparison says in words: what failed, who differs, what must be known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..core.texts import in_bytes, listed, one_of, without_numbers
from .failures import ERRORS
from .statistics import LEVEL, pairs_needed
from .summarizing import ALL_DATA, SUMMARY, Row, is_gap, metric_of, within_bounds

if TYPE_CHECKING:
    import pandas as pd

    from .comparison import Comparison

# With fewer, 95% t intervals are so wide that a reader must be warned.
FEW_SEEDS = 5
FEW_DATA_SETS = 5

_IN_WORDS = {
    "better": "better than",
    "worse": "worse than",
    "same": "the same as",
    "undecided": "not told apart from",
}


def warning_lines(found: Comparison, told: pd.DataFrame | None) -> list[str]:
    """Return :attr:`Comparison.warnings`, of ``warnings.csv`` if there is one."""
    lines = []
    for strategy in found.strategies:
        own = found.cells[found.cells["strategy"] == strategy]
        bad = own[own["failed_rounds"] > 0]
        if len(bad):
            lines.append(
                f"{strategy}: {bad['failed_rounds'].sum():.0f} rounds failed in "
                f"{len(bad)} of {len(own)} runs, and left the model as it was: "
                f"{one_of(bad['reason'].tolist())}"
            )
    if told is not None:
        kinds = told["warning"].map(without_numbers)
        for _, alike in told.groupby(kinds, sort=False):
            said = one_of(alike["warning"].tolist())
            lines.append(f"{_whose(found, alike)}: {said}")
    return lines


def _whose(found: Comparison, rows: pd.DataFrame) -> str:
    """Return in which runs something is so, in words."""
    named = []
    for strategy in found.strategies:
        own = rows[rows["strategy"] == strategy]
        if own.empty:
            continue
        seeds = sorted({int(seed) for seed in own["seed"]})
        on = [data for data in found.data_sets if (own["data"] == data).any()]
        where = f"{listed(on)}; " if len(on) < len(found.data_sets) else ""
        named.append((strategy, f" ({where}{_seeds(seeds, len(found.seeds))})"))
    how = {where for _, where in named}
    if len(how) == 1:
        every = len(named) == len(found.strategies) > 1
        names = "all strategies" if every else listed([name for name, _ in named])
        return f"{names}{how.pop()}"
    return listed([f"{name}{where}" for name, where in named])


def verdict_lines(found: Comparison) -> list[str]:
    """Return :attr:`Comparison.verdicts`."""
    rows, first = found.summary, found.strategies[0]
    metric = rows["metric"][0]
    data = ALL_DATA if len(found.data_sets) > 1 else found.data_sets[0]
    there = rows[rows["data"] == data]
    rows = there[there["metric"] == metric]
    title = _in_which(metric, data)
    failed = rows["verdict"] == "failed"
    said = [f"{r['strategy']} {r['sentence']}." for r in rows_of(rows[failed])]
    if failed.iloc[0]:
        return [*said, f"Nothing can be held against {first}, which is the first."]
    rows = rows[(rows["against"] != "") & ~failed]
    if len(rows) > 1 and not rows["verdict"].isin(["better", "worse"]).any():
        said.append(f"No strategy is told apart from {first} in {title}.")
    for row in rows_of(rows):
        said.append(f"{row['strategy']} {_held_against_first(found, row)}.")
    gaps = there[there["metric"].map(is_gap)]
    for row in rows_of(gaps[gaps["verdict"].isin(["better", "worse"])]):
        held = _held_against_first(found, row)
        said.append(f"{row['strategy']} {held}; {found.accuracy_beside(row)}.")
    return said


def _in_which(metric: str, data: str) -> str:
    over = f" over {ALL_DATA}" if data == ALL_DATA else ""
    return f"the {metric_of(metric).title}{over}"


def _held_against_first(found: Comparison, row: Row) -> str:
    _, _, numbers = row["sentence"].partition(": ")
    verdict = _IN_WORDS.get(row["verdict"], row["verdict"])
    title = _in_which(row["metric"], row["data"])
    return f"is {verdict} {found.strategies[0]} in {title}: {numbers}"


def note_lines(found: Comparison) -> list[str]:
    """Return :attr:`Comparison.notes`."""
    others = max(len(found.strategies) - 1, 1)
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
    if len(found.strategies) > 1:
        notes.append(
            f"Verdicts are the paired t test's at {LEVEL:g}"
            + (f", Holm over {others} comparisons" if others > 1 else "")
            + "; Wilcoxon's test stands beside it and decides nothing."
        )
    notes.append("Intervals are 95% t intervals. The test set chose nothing.")
    if found.summary["verdict"].eq("better").any():
        notes.append(f"* better than {found.strategies[0]}.")
    if found.summary["wilcoxon_verdict"].eq("cannot reach").any():
        notes.append(
            f"cannot reach: Wilcoxon's test needs {pairs_needed(others)} pairs "
            f"that differ to find anything at {LEVEL:g}, whatever they are"
            + (f", in {others} comparisons." if others > 1 else ".")
        )
    known = found.summary.dropna(subset=["low", "high"])
    own = known[["metric", "low", "high"]].itertuples(index=False, name=None)
    if any(within_bounds(*one) != one[1:] for one in own):
        notes.append(
            f"Intervals of shares are cut at 0 and 1; {SUMMARY} has them whole."
        )
    notes += _targets(found)
    for row in rows_of(found.summary):
        if row["chosen"] and row["metric"] == found.summary["metric"][0]:
            on = f" on {row['data']}" if len(found.data_sets) > 1 else ""
            notes.append(f"chosen: {row['strategy']}{on}: {row['chosen']}.")
    return [*notes, *_failed(found)]


def _failed(found: Comparison) -> Iterable[str]:
    """Return what failed, where it is told in full, and how to run it again."""
    cells = found.cells
    failed = cells[cells["status"] == "failed"]
    kinds = failed["strategy"] + ": " + failed["reason"].map(without_numbers)
    for _, alike in failed.groupby(kinds, sort=False):
        names, reasons = alike["folder"].tolist(), alike["reason"].tolist()
        yield f"failed: {listed(names, 6)}: {one_of(reasons)}"
    odd = cells.loc[(cells["failed_rounds"] > 0) | (cells["status"] == "failed")]
    logs = [n for n in odd["folder"] if (found.folder / n / ERRORS).is_file()]
    if logs:
        yield f"{ERRORS} of {listed(logs, 6)} has it in full."
    ended = cells.loc[cells["failed_rounds"] > 0, "folder"].tolist()
    if ended:
        yield (
            f"What came to its end is not run again: delete {listed(ended, 20)} in "
            f"{found.folder}, and give the same command."
        )


def _targets(found: Comparison) -> Iterable[str]:
    """Return in how many rounds and bytes the target was reached, a line each."""
    rows = found.summary[found.summary["target"].notna()]
    for row in rows_of(rows):
        on = f" on {row['data']}" if len(found.data_sets) > 1 else ""
        took = (
            f", in {row['rounds_to_target']:.1f} rounds and "
            f"{in_bytes(row['bytes_to_target'])} on average"
            if row["reached"]
            else ""
        )
        yield (
            f"{row['strategy']}{on} reached {row['target']:.4f} in "
            f"{row['reached']:.0f} of {len(found.seeds)} runs{took}."
        )


def _seeds(seeds: Sequence[int], of: int) -> str:
    if len(seeds) == of > 1:
        return "all seeds"
    return f"seed{'s' * (len(seeds) > 1)} {listed(map(str, seeds), 6)}"


def rows_of(frame: pd.DataFrame) -> list[Row]:
    """Return the rows of a frame by their columns."""
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]
