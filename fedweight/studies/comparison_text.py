"""The tables of a comparison as a terminal shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .summarizing import within_bounds
from .telling import interval_text, number_text


def cells_of(row: Mapping[str, Any], beside: str) -> list[str]:
    """Return a row of the summary as texts: a star first, and the verdict last.

    ``beside`` is what the accuracy did, where a gap between groups is told apart.
    """
    mark = "*" if row["verdict"] == "better" else ""
    told_apart = row["verdict"] in ("better", "worse")
    own = [
        row["strategy"],
        f"{row['n']:.0f}",
        number_text(row["mean"]),
        interval_text(*within_bounds(row["metric"], row["low"], row["high"])),
    ]
    if not row["against"]:
        return [mark, *own]
    return [
        mark,
        *own,
        number_text(row["difference"], "+.4f"),
        interval_text(row["difference_low"], row["difference_high"], "+.4f"),
        number_text(row["p"], ".3g"),
        number_text(row["p_holm"], ".3g"),
        "cannot reach"
        if row["wilcoxon_verdict"] == "cannot reach"
        else number_text(row["wilcoxon_p"], ".3g"),
        f"{row['verdict']}; {beside}" if beside and told_apart else row["verdict"],
    ]


def text_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
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
