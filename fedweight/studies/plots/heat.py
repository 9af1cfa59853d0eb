"""What heat maps have in common: how many cells, how large, and what stands beside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.extras import Imported
from ...core.texts import plain
from . import style
from .style import FULL, Array

if TYPE_CHECKING:
    import altair as alt
else:
    alt = Imported("altair", "studies", "a plot")

MOST_ROWS = 500  # of a heat map: what exceeds it is averaged
MOST_CELLS = 100_000


def block_means(
    values: Array, most_rows: int = MOST_ROWS, most_cells: int = MOST_CELLS
) -> tuple[Array, int, int]:
    """Average blocks of a matrix that has more cells than a page can hold.

    Returns
    -------
    tuple
        The means, and how many rows and columns each of them is of.
    """
    rows = math.ceil(values.shape[0] / most_rows)
    left = math.ceil(values.shape[0] / rows)
    columns = math.ceil(values.shape[1] / max(1, min(most_cells // left, 1000)))
    if rows == columns == 1:
        return values, 1, 1
    padded = np.pad(
        values,
        [(0, -values.shape[0] % rows), (0, -values.shape[1] % columns)],
        constant_values=np.nan,
    )
    blocks = padded.reshape(padded.shape[0] // rows, rows, -1, columns)
    known = np.isfinite(blocks)
    count = known.sum(axis=(1, 3))
    total = np.where(known, blocks, 0.0).sum(axis=(1, 3))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan), rows, columns


def averaged(merged: int, what: str) -> str:
    """Say that a cell stands for several, where it does."""
    return f"A cell is the mean of {merged} {what}." if merged > 1 else ""


def height_of(rows: int, each: int = 15, least: int = 120, most: int = 500) -> int:
    """Return how many pixels so many rows of a heat map take: the same for each."""
    return max(rows * max(1, min(each, most // rows)), least)


def overlap(cells: int) -> float:
    """Return by how much of a cell the next one covers it: no seam shows between."""
    return 0.0 if cells <= 60 else round(cells / FULL, 3)


def lines_between(rows: int, columns: int) -> dict[str, Any]:
    """Part a heat map's cells by thin lines where there is room for them."""
    few = rows <= 50 and columns <= 60
    return {"stroke": style.PAPER, "strokeWidth": 1} if few else {}


def names_axis(names: Sequence[str], most: int = 20, extent: int = 0) -> alt.Axis:
    """Return an axis whose places are things with names: as many as there is room."""
    step = math.ceil(len(names) / most)
    shown = [plain(name, 16) for name in names]
    return alt.Axis(
        values=list(range(0, len(names), step)),
        labelExpr=f"{style.literal(shown[::step])}[datum.value / {step}]",
        minExtent=extent,
        grid=False,
        domain=False,
        ticks=False,
    )
