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

from ..core.errors import DataError, check_choice
from ..core.extras import Imported
from ..core.paths import clean_path
from ..core.texts import listed, plain, shown
from .comparison_lines import failure_lines, rows_of, version_lines, warning_lines
from .comparison_text import cells_of, text_rows
from .group_rates import group_rates
from .ranks import ROPE, Ranking
from .reader import PLAN, table_of
from .result import Run
from .summarizing import (
    CELL_COLUMNS,
    CELLS,
    JUDGES,
    METRICS,
    SUMMARY,
    SUMMARY_COLUMNS,
    WARNING_COLUMNS,
    WARNINGS,
    Row,
    is_gap,
    metric_of,
    ranking_of,
    signed_ranks_of,
)
from .telling import (
    cautions_of,
    interval_text,
    legend_of,
    reading_of,
    target_of,
    title_of,
    to_target,
    verdicts_of,
)

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = Imported("pandas", "studies", "a run's folder")


_ANEW = (
    "It is spoilt, or of another version; the same 'fedweight compare' as before "
    "writes it anew."
)


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
        if (self.folder / "rounds.csv").is_file():
            raise DataError(
                f"{self.folder} is a run's folder. Read it by "
                f"fedweight.Run({str(self.folder)!r})."
            )
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
            content = tomllib.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is no comparison's: {plain(error)}.") from error
        table = table_of(content, "comparison")
        for key, kind in (("strategies", str), ("data-sets", str), ("seeds", int)):
            several = table.get(key)
            if not isinstance(several, list) or not several:
                raise DataError(f"{path} has no list '{key}'. {_ANEW}")
            if not all(type(one) is kind for one in several):
                raise DataError(f"{path}: {key} are {shown(several)}. {_ANEW}")
        return table

    @property
    def strategies(self) -> list[str]:
        """What is compared; all others are held against the first."""
        return [str(label) for label in self._plan["strategies"]]

    @property
    def data_sets(self) -> list[str]:
        """What they were run on."""
        return [str(label) for label in self._plan["data-sets"]]

    @property
    def seeds(self) -> list[int]:
        """The seeds that each was run with."""
        return [int(seed) for seed in self._plan["seeds"]]

    @cached_property
    def cells(self) -> pd.DataFrame:
        """``cells.csv``: a row per run, with what it reached, or why it failed.

        A run whose last round failed by an error has failed, too. Of one that did not
        ``reason`` says which rounds failed, and which groups it has not measured.
        Of a sweep all candidates; ``chosen`` is 1 for those that are compared.
        """
        text = ["strategy", "data", "candidate", "folder", "status", "reason"]
        measured = {*METRICS, *JUDGES}
        columns = [column for column in CELL_COLUMNS if column not in measured]
        return self._frame(CELLS, columns, text)

    @cached_property
    def summary(self) -> pd.DataFrame:
        """``summary.csv``: a row per metric, data set and strategy.

        ``n``, ``mean``, and its 95% t interval ``low`` and ``high``; then, against the
        first strategy, what :class:`~fedweight.studies.statistics.Paired` holds. Holm's
        correction is for the strategies that are held against the first, metric by
        metric. Of several sensitive attributes each has its gaps, ``accuracy_gap of
        sex``. Beside the test accuracy, ``reached`` says how many runs came to the
        ``target``, and ``rounds_to_target`` and ``bytes_to_target`` what that took them
        on average. Of several data sets there are rows over all of them, too, in which
        a data set counts once, by the means over its seeds: ``n`` and ``pairs`` count
        data sets. They have the ``average_rank`` of :meth:`ranking`.
        ``verdict`` is ``failed`` where not one run of a strategy came to its end.
        ``chosen`` says what a sweep chose from what; ``note`` names the runs that
        failed. NaN is what is not known.
        """
        text = ["metric", "data", "strategy", "against", "wilcoxon_verdict", "verdict"]
        text += ["sentence", "chosen", "note"]
        return self._frame(SUMMARY, SUMMARY_COLUMNS, text)

    def ranking(self, metric: str = "test_accuracy") -> Ranking:
        """Rank the strategies over several data sets, each by its mean over the seeds.

        Returns
        -------
        Ranking
            The numbers of a critical-difference diagram, as text and as SVG.
        """
        return ranking_of(self._measured(metric), metric)

    def signed_ranks(
        self, metric: str = "test_accuracy", rope: float = ROPE
    ) -> pd.DataFrame:
        """Return the Bayesian's answer over several data sets, each by its mean.

        Parameters
        ----------
        metric : str
            One of those in :attr:`summary`.
        rope : float
            0 or more, in the metric's unit: differences up to this are as good as none.

        Returns
        -------
        DataFrame
            A row for each strategy but the first: ``strategy``, ``against``,
            ``data_sets``, and how probable it is that it is ``better``, the ``same``
            or ``worse`` (:func:`fedweight.studies.ranks.signed_ranks`). Of few data
            sets the prior says most; verdicts do not rest on it.
        """
        found = signed_ranks_of(self._measured(metric), metric, rope)
        columns = ("data_sets", "better", "same", "worse")
        rows = [
            {"strategy": name, "against": self.strategies[0]}
            | {column: getattr(one, column) for column in columns}
            for name, one in found.items()
        ]
        return pd.DataFrame(rows, columns=["strategy", "against", *columns])

    def _measured(self, metric: str) -> list[Row]:
        """Return the rows of all runs, once it is sure that they have a metric."""
        check_choice("metric", metric, [*dict.fromkeys(self.summary["metric"])])
        return [_no_nan(row) for row in rows_of(self.cells)]

    @property
    def failures(self) -> dict[str, str]:
        """Why runs failed, by their folders' names; empty where none did."""
        failed = self.cells[self.cells["status"] == "failed"]
        return {row["folder"]: row["reason"] for row in rows_of(failed)}

    @property
    def failed_rounds(self) -> int:
        """How many rounds failed in all runs."""
        return int(self.cells["failed_rounds"].sum())

    def run(self, strategy: str, seed: int, data: str | None = None) -> Run:
        """Return one run, whether it failed or not; of a sweep the one it chose.

        ``data`` is one of :attr:`data_sets`; the first by default.
        """
        wanted = (strategy, seed, self.data_sets[0] if data is None else data)
        for row in rows_of(self.cells[self.cells["chosen"] == 1]):
            if (row["strategy"], row["seed"], row["data"]) == wanted:
                return Run(self.folder / row["folder"])
        raise DataError(
            f"there is no run of {strategy!r} with seed {seed!r} on {wanted[2]!r}. "
            f"There are {listed(self.strategies, 20)}, with seeds "
            f"{listed(self.seeds, 20)}, on {listed(self.data_sets, 20)}."
        )

    @cached_property
    def rounds(self) -> pd.DataFrame:
        """The ``rounds`` of all runs that are compared.

        ``strategy``, ``data`` and ``seed`` stand before the columns of a run.
        """
        return self._every("rounds")

    @cached_property
    def clients(self) -> pd.DataFrame:
        """The ``clients`` of all runs that are compared, likewise."""
        return self._every("clients")

    @cached_property
    def groups(self) -> pd.DataFrame:
        """How each group of a sensitive attribute fares with each strategy.

        A row per ``data``, ``attribute``, ``rate`` (``accuracy``, ``selection_rate``,
        ``tpr``, ``fpr`` or ``loss``, of the last model), ``strategy`` and ``group``:
        ``n`` runs, the ``mean`` over them with its 95% t interval ``low`` and ``high``,
        and in how many of them no other group did worse (``worst``): had less of it, or
        more of ``fpr`` and ``loss``. Of the test set where groups of it were measured,
        else of all clients' held-out data.

        Raises
        ------
        DataError
            If no run measured groups.
        """
        return group_rates(self)

    def _every(self, table: str) -> pd.DataFrame:
        frames = []
        compared = (self.cells["status"] == "complete") & (self.cells["chosen"] == 1)
        for row in rows_of(self.cells[compared]):
            run = Run(self.folder / row["folder"])
            frame = run.rounds if table == "rounds" else run.clients
            named = {key: row[key] for key in ("strategy", "data", "seed")}
            frames.append(frame.assign(**named)[[*named, *frame.columns]])
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def _frame(
        self, name: str, columns: Sequence[str], text: Sequence[str]
    ) -> pd.DataFrame:
        path = self.folder / name
        try:
            frame = pd.read_csv(path, dtype="str", keep_default_na=False)
            for column in columns:
                if column not in frame:
                    raise DataError(f"{path} has no column '{column}'. {_ANEW}")
            numbers = [column for column in frame if column not in text]
            return frame.assign(**{str(c): _numbers(frame[c]) for c in numbers})
        except ValueError as error:
            raise DataError(f"{path} cannot be read: {plain(error)}.") from error

    def report(self) -> Path:
        """Write ``report.html`` anew and return its path."""
        from .comparison_report import write_comparison_report

        return write_comparison_report(self)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, ready for JSON; None is what is not known."""
        return {
            "folder": str(self.folder),
            "strategies": self.strategies,
            "data_sets": self.data_sets,
            "seeds": self.seeds,
            "summary": [_no_nan(row) for row in rows_of(self.summary)],
            "cells": [_no_nan(row) for row in rows_of(self.cells)],
            "warnings": self.warnings,
        }

    def __str__(self) -> str:
        """Return the summary as tables for a terminal."""
        parts = [
            "\n".join([title, *text_rows(header, rows)])
            for title, header, rows in self._tables()
        ]
        if legend := legend_of(self):
            parts[0] += f"\n  {legend}"
        parts += self._targets()
        if len(self.data_sets) > 1:
            ranks = {m: self.ranking(m) for m in dict.fromkeys(self.summary["metric"])}
            parts += [f"{title_of(self, m)}, {ranking}" for m, ranking in ranks.items()]
        for lines in (self.warnings, self.verdicts):
            if lines:
                parts.append("\n".join(lines))
        return "\n\n".join([*parts, "\n".join(self.notes)])

    @cached_property
    def warnings(self) -> list[str]:
        """What must be known before a number is believed, one line each.

        In which strategies rounds failed, and what the ends of their runs say, such as
        an accuracy that is chance: by whom, and with which seeds.
        """
        frame = None
        if (self.folder / WARNINGS).is_file():  # One of before has none.
            text = [name for name in WARNING_COLUMNS if name != "seed"]
            frame = self._frame(WARNINGS, WARNING_COLUMNS, text)
        return warning_lines(self, frame)

    @property
    def verdicts(self) -> list[str]:
        """Who differs from the first strategy, and how surely, in sentences.

        Before all others who failed in every run. Then how all do in the first metric,
        and who is told apart in any other, of a gap with what the accuracy did; of
        several data sets over all of them, and in a line on single ones.
        """
        return verdicts_of(self)

    @property
    def cautions(self) -> list[str]:
        """What to know before the tables are trusted: how much was run, what failed."""
        return [*cautions_of(self), *failure_lines(self), *version_lines(self)]

    @property
    def notes(self) -> list[str]:
        """What a reader of the tables must know, one line each."""
        notes = [*cautions_of(self), *reading_of(self)]
        for row in rows_of(self.summary):
            if row["chosen"] and row["metric"] == self.summary["metric"][0]:
                on = f" on {row['data']}" if len(self.data_sets) > 1 else ""
                notes.append(f"chosen: {row['strategy']}{on}: {row['chosen']}.")
        return [*notes, *failure_lines(self), *version_lines(self)]

    def accuracy_beside(self, row: Mapping[str, Any]) -> str:
        """Return what the test accuracy did where a row of the summary is of a gap.

        A gap may close since nobody is served any more: by itself it says little.
        Empty for rows of other metrics, of the first strategy, and where there is no
        accuracy.
        """
        rows = self.summary
        same = (rows["data"] == row["data"]) & (rows["strategy"] == row["strategy"])
        rows = rows[same & (rows["metric"] == "test_accuracy")]
        if not is_gap(row["metric"]) or rows.empty or not row["against"]:
            return ""
        [of] = rows_of(rows)
        if math.isnan(of["difference"]):
            return ""
        span = interval_text(of["difference_low"], of["difference_high"], "+.4f")
        # Of several comparisons an interval may leave out 0 beside "undecided".
        alone = "by itself " * (len(self.strategies) > 2)
        within = f" ({alone}{span})" if span else ""
        return f"accuracy {of['verdict']}: {of['difference']:+.4f}{within}"

    def _tables(self) -> Iterable[tuple[str, list[str], list[list[str]]]]:
        first = self.strategies[0]
        several = len(self.data_sets) > 1
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in rows_of(self.summary):
            groups.setdefault((row["metric"], row["data"]), []).append(row)
        for (metric, data), rows in groups.items():
            title = title_of(self, metric) + (f", {data}" if several else "")
            header = ["", "strategy", "n", "mean", "95% interval"]
            if len(self.strategies) > 1:
                header += [f"minus {first}", "95% interval"]
                header += ["p", "Holm p", "Wilcoxon p", "verdict"]
            yield title, header, [cells_of(r, self.accuracy_beside(r)) for r in rows]

    def _targets(self) -> Iterable[str]:
        """Return in how many rounds and bytes the target was reached, as tables."""
        for data in self.data_sets:
            if not math.isnan(target := target_of(self, data)):
                on = f", {data}" if len(self.data_sets) > 1 else ""
                frame = to_target(self, data)
                rows = [["", *row] for row in frame.itertuples(index=False, name=None)]
                title = f"to a test accuracy of {target:.4f}, medians of all runs{on}"
                yield "\n".join([title, *text_rows(["", *frame.columns], rows)])

    def __repr__(self) -> str:
        better = [
            f"{row['strategy']} better in {metric_of(row['metric']).title}"
            for row in rows_of(self.summary)
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
        lines = [*self.warnings, *self.verdicts, *self.notes]
        notes = "".join(f"<li>{escape(line)}</li>" for line in lines)
        return "".join(parts) + f"<ul>{notes}</ul>"


def _numbers(column: pd.Series[str]) -> pd.Series[Any]:
    """Return numbers to their last digit; NaN is what is not there."""
    if len(column) and column.str.fullmatch(r"[0-9]+").all():
        return column.map(int)
    return column.map(lambda text: float(text) if text else math.nan).astype(float)


def _no_nan(row: Row) -> Row:
    """JSON has no NaN, and what is not there is null."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v
        for k, v in row.items()
    }
