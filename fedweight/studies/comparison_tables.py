"""The tables of a comparison's report."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import DataError
from ..core.extras import Imported
from ..core.texts import in_bytes, listed
from .comparison_lines import rows_of
from .group_rates import LESS_IS_BETTER
from .pages import Part, section, table
from .plots.groups import RATES
from .summarizing import ALL_DATA, JUDGES, Row, metric_of, within_bounds
from .telling import (
    choices_of,
    interval_text,
    number_text,
    positive_of,
    target_of,
    title_of,
    to_target,
)

if TYPE_CHECKING:
    import pandas as pd

    from .comparison import Comparison
else:
    pd = Imported("pandas", "studies", "a run's folder")

# Columns of a table of verdicts, and how much of its width each takes.
_WIDTHS = {
    **{"strategy": 15.0, "verdict": 9.0, "runs": 6.0, "mean": 7.0},
    **{"95% interval": 14.5, "difference": 9.5, "95% interval ": 15.5},
    **{"p": 6.5, "Holm p": 7.0, "Wilcoxon p": 10.5},
}
_WORDS = ("strategy", "verdict")
_NOTHING = {"mean": math.nan, "low": math.nan, "high": math.nan}
_OF_CLASS = ("selection_rate", "tpr", "fpr")
_ALONE = ("strategy", "runs", "mean", "95% interval")


def verdict_tables(found: Comparison) -> Iterable[Part]:
    """Return what was compared, metric by metric, with the winners marked."""
    summary = found.summary
    for metric in dict.fromkeys(summary["metric"]):
        for data in [*found.data_sets, ALL_DATA]:
            own = summary[(summary["metric"] == metric) & (summary["data"] == data)]
            if own.empty:
                continue
            rows = [_verdict_row(row, _digits(own)) for row in rows_of(own)]
            frame = pd.DataFrame(rows)
            if len(found.strategies) == 1:
                frame = frame[[*_ALONE]]
            widths = [_WIDTHS[str(name)] for name in frame]
            if data == ALL_DATA:
                frame = frame.rename(columns={"runs": "data sets"})
            where = f", {data}" if len(found.data_sets) > 1 else ""
            yield table(
                capital(f"{title_of(found, metric)}{where}"),
                frame,
                _beside(found, rows_of(own)),
                widths=[round(100 * w / sum(widths), 2) for w in widths],
                right=[str(name) for name in frame if name not in _WORDS],
            )


def _beside(found: Comparison, rows: Iterable[Row]) -> str:
    """Return what the accuracy did of those whose gap is told apart."""
    told = [
        f"{row['strategy']}: {beside}."
        for row in rows
        if row["verdict"] in ("better", "worse")
        and (beside := found.accuracy_beside(row))
    ]
    return " ".join(told)


def _digits(rows: pd.DataFrame) -> int:
    """Return how many decimals a metric's numbers have: four of a share."""
    largest = float(rows["mean"].abs().max())
    if metric_of(rows["metric"].iloc[0]).is_share or not 0 < largest < math.inf:
        return 4
    return min(max(3 - math.floor(math.log10(largest)), 0), 6)


def _verdict_row(row: Row, digits: int) -> dict[str, str]:
    """Return a row as it is read: what the test finds better is marked, no other."""
    mean, signed = f".{digits}f", f"+.{digits}f"
    reaches = row["wilcoxon_verdict"] != "cannot reach"
    # A mean of differences that are 0 in sum is some 1e-17.
    difference = round(row["difference"], digits) + 0.0
    star = "* " * (row["verdict"] == "better")
    return {
        "strategy": row["strategy"],
        "verdict": f"{star}{row['verdict']}" if row["against"] else "baseline",
        "runs": f"{row['n']:.0f}",
        "mean": number_text(row["mean"], mean),
        "95% interval": interval_text(
            *within_bounds(row["metric"], row["low"], row["high"]), mean
        ),
        "difference": number_text(difference, signed),
        "95% interval ": interval_text(
            row["difference_low"], row["difference_high"], signed
        ),
        "p": _p_text(row["p"]),
        "Holm p": _p_text(row["p_holm"]),
        "Wilcoxon p": _p_text(row["wilcoxon_p"]) if reaches else "cannot reach",
    }


def _p_text(p: float) -> str:
    return "< 0.0001" if p < 0.00005 else number_text(p, ".4f")


def capital(title: str) -> str:
    """Return a title as it stands alone."""
    return f"{title[:1].upper()}{title[1:]}"


def group_tables(found: Comparison, data: str) -> Iterable[Part]:
    """Return how each group fares, attribute by attribute and rate by rate."""
    try:
        every = found.groups
    except DataError:
        return
    positive = positive_of(found)
    every = every[every["data"] == data]
    for (attribute, rate), own in every.groupby(["attribute", "rate"], sort=False):
        less = "highest" if rate in LESS_IS_BETTER else "lowest"
        names = [*dict.fromkeys(own["group"])]
        rows = []
        for strategy in dict.fromkeys(own["strategy"]):
            mine = own[own["strategy"] == strategy].set_index("group")
            most = mine["worst"].max()
            who = mine.index[mine["worst"] == most].tolist() if most else []
            told = f"{listed(who)}, in {most} of {mine['n'].max()}" if who else ""
            row = {"strategy": strategy, less: told}
            for place, name in enumerate(names):
                one = mine.loc[name] if name in mine.index else _NOTHING
                low, high = one["low"], one["high"]
                if rate != "loss":
                    low, high = np.clip([low, high], 0, 1)
                # Groups' names need not differ from other columns'.
                row[f"{name}{' ' * (place + 1)}"] = number_text(one["mean"])
                row[f"95% interval{' ' * place}"] = interval_text(low, high)
            rows.append(row)
        frame = pd.DataFrame(rows)
        wide = 74 / len(names)
        of = f" of class {positive}" if positive and rate in _OF_CLASS else ""
        title = f"{RATES[str(rate)]}{of} by {attribute}"
        yield table(
            title,
            frame,
            closed="" if rate == "accuracy" else title,
            widths=[14, 12, *[0.36 * wide, 0.64 * wide] * len(names)],
            right=[*frame][2:],
        )


def cost_table(found: Comparison, data: str, cells: pd.DataFrame) -> Part:
    """Return what a run cost, on average over the seeds, and what the target took."""
    rows = []
    for name in found.strategies:
        own = cells[cells["strategy"] == name]
        down, up = (own[f"bytes_{way}"].mean() for way in ("down", "up"))
        rows.append(
            {
                "strategy": name,
                "rounds": number_text(own["rounds"].mean(), ".1f"),
                "down": in_bytes(down) if len(own) else "",
                "up": in_bytes(up) if len(own) else "",
            }
        )
    frame, rest = pd.DataFrame(rows), ""
    if not math.isnan(target := target_of(found, data)):
        reach = to_target(found, data).drop(columns="strategy")
        reach.columns = pd.Index(["reached target", "in rounds", "with traffic"])
        frame = pd.concat([frame, reach], axis=1)
        rest = (
            f"The target is a test accuracy of {target:.4f}. Rounds and traffic to it "
            "are medians over all runs; one that did not reach it counts as later than "
            "all that did."
        )
    widths = [28, *[72 / (frame.shape[1] - 1)] * (frame.shape[1] - 1)]
    return table(
        "What a run cost, on average", frame, rest, widths=widths, right=[*frame][1:]
    )


def choices(found: Comparison) -> Part:
    """Return what a sweep chose from what, where there was one."""
    title, frame = "What the sweep chose", choices_of(found)
    if frame.empty:
        return section(title)
    if len(found.data_sets) == 1:
        frame = frame.drop(columns="data")
    judges = [name for name in JUDGES if name in frame]
    for name in judges:
        frame[name] = [number_text(value) for value in frame[name]]
    caption = "All candidates, by the mean over the seeds"
    return section(title, table(caption, frame, right=judges))
