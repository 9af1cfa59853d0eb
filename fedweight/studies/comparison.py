"""A comparison: several runs' folders as frames, and what their differences are worth.

Accuracy on the test set is what a comparison reports. Nothing is chosen by it.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import DataError
from ..core.extras import Imported
from ..core.paths import clean_path
from ..core.texts import listed, plain
from .folder import Table
from .result import Run
from .statistics import LEVEL, compare_pairs, pairs_needed, t_interval

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = Imported("pandas", "studies", "a run's folder")

PLAN = "comparison.toml"
CELLS = "cells.csv"
SUMMARY = "summary.csv"

# What is compared, by the keys of a run's summary; more is better.
METRICS = {
    "test_accuracy": "test accuracy of the last model",
    "client_accuracy_mean": "mean of the clients' accuracies",
    "client_accuracy_worst10": "mean accuracy of the worst tenth of the clients",
}
CELL_COLUMNS = (
    *("strategy", "seed", "folder", "status", "rounds", "failed_rounds", "reason"),
    *METRICS,
    *("bytes_down", "bytes_up"),
)
SUMMARY_COLUMNS = (
    *("metric", "strategy", "n", "mean", "low", "high", "against", "pairs"),
    *("difference", "difference_low", "difference_high"),
    *("bootstrap_low", "bootstrap_high", "effect_size", "p", "p_holm"),
    *("wilcoxon_p", "wilcoxon_p_holm", "wilcoxon_verdict", "verdict", "sentence"),
    "note",
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """What ``fedweight compare`` wrote: frames, a summary, and every run.

    Parameters
    ----------
    folder : str or Path
        The comparison's. Each run has a folder of its own in it.

    Raises
    ------
    DataError
        The folder is not a comparison's, or it was stopped before its end.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", clean_path("the folder", self.folder))
        for name in (PLAN, CELLS, SUMMARY):
            if not (self.folder / name).is_file():
                raise DataError(
                    f"{self.folder / name} is missing. A comparison's folder is what "
                    "'fedweight compare' writes; one that was stopped goes on with the "
                    "same command."
                )

    @cached_property
    def _plan(self) -> Mapping[str, Any]:
        path = self.folder / PLAN
        try:
            content: Mapping[str, Any] = tomllib.loads(path.read_text("utf-8"))
            return content["comparison"]  # type: ignore[no-any-return]
        except (ValueError, KeyError) as error:
            raise DataError(f"{path} is no comparison's: {plain(error)}.") from error

    @property
    def strategies(self) -> list[str]:
        """What is compared; all others are held against the first."""
        return [str(label) for label in self._plan["strategies"]]

    @property
    def seeds(self) -> list[int]:
        """The seeds that each was run with."""
        return [int(seed) for seed in self._plan["seeds"]]

    @cached_property
    def cells(self) -> pd.DataFrame:
        """``cells.csv``: a row per run, with what it reached, or why it failed."""
        return self._frame(CELLS, ["strategy", "folder", "status", "reason"])

    @cached_property
    def summary(self) -> pd.DataFrame:
        """``summary.csv``: a row per metric and strategy; NaN is what is not known.

        ``n``, ``mean``, and its 95% t interval ``low`` and ``high``; then, against the
        first strategy, what :class:`~fedweight.studies.statistics.Paired` holds. Holm's
        correction is for the strategies that are held against the first, metric by
        metric. ``note`` names the runs that failed.
        """
        text = ["metric", "strategy", "against", "wilcoxon_verdict", "verdict"]
        return self._frame(SUMMARY, [*text, "sentence", "note"])

    @property
    def failures(self) -> dict[tuple[str, int], str]:
        """Why runs failed, by strategy and seed; empty where none did."""
        failed = self.cells[self.cells["status"] == "failed"]
        return {(r["strategy"], int(r["seed"])): r["reason"] for r in _rows(failed)}

    @property
    def failed_rounds(self) -> int:
        """How many rounds failed in all runs."""
        return int(self.cells["failed_rounds"].sum())

    def run(self, strategy: str, seed: int) -> Run:
        """Return one run, whether it failed or not."""
        names = dict(zip(self.strategies, self._plan["folders"], strict=True))
        if strategy not in names or seed not in self.seeds:
            raise DataError(
                f"there is no run of {strategy!r} with seed {seed!r}. There are "
                f"{listed(self.strategies, 20)}, with seeds {listed(self.seeds, 20)}."
            )
        return Run(self.folder / f"{names[strategy]}-seed{seed}")

    @cached_property
    def rounds(self) -> pd.DataFrame:
        """Every run's ``rounds``, with ``strategy`` and ``seed`` before them."""
        return self._every("rounds")

    @cached_property
    def clients(self) -> pd.DataFrame:
        """Every run's ``clients``, with ``strategy`` and ``seed`` before them."""
        return self._every("clients")

    def _every(self, table: str) -> pd.DataFrame:
        frames = []
        for row in _rows(self.cells[self.cells["status"] == "complete"]):
            run = self.run(row["strategy"], int(row["seed"]))
            frame = run.rounds if table == "rounds" else run.clients
            named = {"strategy": row["strategy"], "seed": row["seed"]}
            frames.append(frame.assign(**named)[[*named, *frame.columns]])
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def _frame(self, name: str, text: Sequence[str]) -> pd.DataFrame:
        path = self.folder / name
        try:
            frame = pd.read_csv(path, dtype="str", keep_default_na=False)
            numbers = [column for column in frame if column not in text]
            return frame.assign(**{str(c): _numbers(frame[c]) for c in numbers})
        except ValueError as error:
            raise DataError(f"{path} cannot be read: {plain(error)}.") from error

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, ready for JSON; None is what is not known."""
        return {
            "folder": str(self.folder),
            "strategies": self.strategies,
            "seeds": self.seeds,
            "summary": [_no_nan(row) for row in _rows(self.summary)],
            "cells": [_no_nan(row) for row in _rows(self.cells)],
        }

    def __str__(self) -> str:
        """Return the summary as tables for a terminal."""
        parts = [
            "\n".join([title, *_text_rows(header, rows)])
            for title, header, rows in self._tables()
        ]
        return "\n\n".join([*parts, "\n".join(self.notes)])

    @property
    def notes(self) -> list[str]:
        """What a reader of the tables must know, one line each."""
        others = max(len(self.strategies) - 1, 1)
        notes = [
            f"* better than {self.strategies[0]} by the paired t test at {LEVEL:g}"
            + (f", Holm over {others} comparisons" if others > 1 else "")
            + ". Intervals are 95% t intervals. The test set chose nothing."
        ]
        if len(self.strategies) == 1:
            notes = ["Intervals are 95% t intervals. The test set chose nothing."]
        elif self.summary["wilcoxon_verdict"].eq("cannot reach").any():
            notes.append(
                f"cannot reach: Wilcoxon's test needs {pairs_needed(others)} pairs "
                f"that differ to find anything at {LEVEL:g}, whatever they are"
                + (f", in {others} comparisons." if others > 1 else ".")
            )
        for (strategy, seed), reason in self.failures.items():
            notes.append(f"failed: {strategy}, seed {seed}: {reason}")
        if self.failed_rounds:
            notes.append(f"{self.failed_rounds} rounds failed; see {CELLS}.")
        return notes

    def _tables(self) -> Iterable[tuple[str, list[str], list[list[str]]]]:
        first = self.strategies[0]
        for metric, name in METRICS.items():
            rows = _rows(self.summary[self.summary["metric"] == metric])
            if not rows:
                continue
            header = ["", "strategy", "n", "mean", "95% interval"]
            if len(self.strategies) > 1:
                header += [f"minus {first}", "95% interval"]
                header += ["p", "Holm p", "Wilcoxon p", "verdict"]
            yield name, header, [_cells_of(row) for row in rows]

    def __repr__(self) -> str:
        better = [
            f"{row['strategy']} better in {METRICS[row['metric']]}"
            for row in _rows(self.summary)
            if row["verdict"] == "better"
        ]
        done = int((self.cells["status"] == "complete").sum())
        names = listed(self.strategies, 6)
        return (
            f"Comparison({str(self.folder)!r}: {names}, {len(self.seeds)} seeds, "
            f"{done} of {len(self.cells)} runs complete; "
            f"{listed(better, 3) if better else 'nothing is better than the first'})"
        )

    def _repr_html_(self) -> str:
        parts = []
        for title, header, rows in self._tables():
            head = "".join(f"<th>{escape(name)}</th>" for name in header[1:])
            body = ""
            for mark, *cells in rows:
                tag = "th" if mark else "td"
                inner = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
                body += f"<tr>{inner}</tr>"
            parts.append(
                f"<table><caption style='text-align:left'><b>{escape(title)}</b>"
                f"</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            )
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        return "".join(parts) + f"<ul>{notes}</ul>"


# ------------------------------------------------------------------------ what is shown


def _cells_of(row: Mapping[str, Any]) -> list[str]:
    mark = "*" if row["verdict"] == "better" else ""
    own = [
        row["strategy"],
        f"{row['n']:.0f}",
        _number(row["mean"]),
        _interval(row["low"], row["high"]),
    ]
    if not row["against"]:
        return [mark, *own]
    return [
        mark,
        *own,
        _number(row["difference"], "+.4f"),
        _interval(row["difference_low"], row["difference_high"], "+.4f"),
        _number(row["p"], ".3g"),
        _number(row["p_holm"], ".3g"),
        "cannot reach"
        if row["wilcoxon_verdict"] == "cannot reach"
        else _number(row["wilcoxon_p"], ".3g"),
        row["verdict"],
    ]


def _number(value: float, form: str = ".4f") -> str:
    return "" if math.isnan(value) else format(value, form)


def _interval(low: float, high: float, form: str = ".4f") -> str:
    return "" if math.isnan(low) else f"{low:{form}} to {high:{form}}"


def _text_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines: texts to the left, numbers to the right."""
    every = [header, *[[*row, *[""] * (len(header) - len(row))] for row in rows]]
    widths = [max(len(row[k]) for row in every) for k in range(len(header))]
    left = {0, 1, len(header) - 1}
    lines = []
    for row in every:
        cells = [
            cell.ljust(width) if k in left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _numbers(column: pd.Series[str]) -> pd.Series[Any]:
    """Return numbers to their last digit; NaN is what is not there."""
    if len(column) and column.str.fullmatch(r"[0-9]+").all():
        return column.map(int)
    return column.map(lambda text: float(text) if text else math.nan).astype(float)


def _rows(frame: pd.DataFrame) -> list[Row]:
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def _no_nan(row: Row) -> Row:
    """JSON has no NaN, and what is not there is null."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v
        for k, v in row.items()
    }


# ---------------------------------------------------------------------- what is written


def write_comparison(folder: Path, cells: Sequence[Row]) -> None:
    """Write ``cells.csv`` and ``summary.csv``, whole or not at all.

    Parameters
    ----------
    folder : Path
        The comparison's.
    cells : Sequence[dict]
        Rows of :data:`CELL_COLUMNS`, the first strategy's first.
    """
    for name, columns, rows in (
        (CELLS, CELL_COLUMNS, cells),
        (SUMMARY, SUMMARY_COLUMNS, summary_of(cells)),
    ):
        table = Table(folder / name, columns)
        table.append(rows)


def summary_of(cells: Sequence[Row]) -> list[Row]:
    """Return the rows of ``summary.csv``."""
    strategies = [*dict.fromkeys(cell["strategy"] for cell in cells)]
    seeds = [*dict.fromkeys(cell["seed"] for cell in cells)]
    rows: list[Row] = []
    for metric in METRICS:
        values = {name: np.full(len(seeds), math.nan) for name in strategies}
        for cell in cells:
            value = cell.get(metric)
            if cell["status"] == "complete" and value is not None:
                values[cell["strategy"]][seeds.index(cell["seed"])] = value
        some = any(np.isfinite(v).any() for v in values.values())
        if not some and metric != "test_accuracy":
            continue  # It was not measured.
        first, *others = strategies
        rest = {name: values[name].tolist() for name in others}
        found = compare_pairs(values[first].tolist(), rest)
        for name in strategies:
            known = values[name][np.isfinite(values[name])]
            low, high = t_interval(known)
            row: Row = {
                "metric": metric,
                "strategy": name,
                "n": len(known),
                "mean": float(known.mean()) if len(known) else math.nan,
                "low": low,
                "high": high,
                "note": _note(name, cells),
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
            rows.append(row)
    return rows


def _note(strategy: str, cells: Sequence[Row]) -> str:
    notes = []
    for cell in cells:
        if cell["strategy"] != strategy:
            continue
        if cell["status"] == "failed":
            notes.append(f"seed {cell['seed']} failed: {cell['reason']}")
        elif cell["failed_rounds"]:
            notes.append(f"seed {cell['seed']}: {cell['failed_rounds']} rounds failed")
    return "; ".join(notes)
