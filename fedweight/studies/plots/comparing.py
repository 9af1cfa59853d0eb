"""Figures of a comparison: strategies side by side, over their seeds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.errors import DataError
from ...core.extras import Imported
from ..gaps import gap_named
from ..reader import RunFolder
from ..statistics import t_interval
from . import style
from .style import INK, MUTED, SEVERAL, finished

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd
else:
    alt = Imported("altair", "studies", "a plot")

Runs = Mapping[str, Sequence[tuple[int, RunFolder]]]  # by strategy: seeds and runs

_MOST_DOTS = 3000

# Longer names stand below each other in a legend.
_LONG = 28
# How long a line of a name is beside an axis.
_LABEL = 18

# By what strategies differ besides their colour.
_DASHES = ([1, 0], [6, 3], [2, 2])
_SHAPES = ("circle", "square", "triangle-up")


def curves(runs: Runs, measure: str, title: str, share: bool) -> alt.LayerChart:
    """Draw a measure over the rounds: the mean over the seeds, and how sure it is.

    Parameters
    ----------
    runs : Mapping[str, sequence of (int, RunFolder)]
        Each strategy's seeds and runs.
    measure : str
        A column of ``rounds.csv``.
    title : str
        What it is called.
    share : bool
        Whether it lies in [0, 1], within which intervals are shown.

    Raises
    ------
    DataError
        No run holds it.
    """
    bounds = (0.0, 1.0) if share else (-1e300, 1e300)
    rows: list[style.Row] = []
    for which, (strategy, several) in enumerate(runs.items()):
        values = [run.measured(measure) for _, run in several]
        rounds = sorted(set().union(*(one.index.tolist() for one in values)))
        for place in style.thinned(len(rounds), style.MOST_ROUNDS // len(runs)):
            number = rounds[place]
            known = np.array([one[number] for one in values if number in one.index])
            low, high = np.clip(t_interval(known), *bounds)
            row: style.Row = {"round": number, "strategy": strategy, "key": f"v{which}"}
            row |= {"mean": style.short(known.mean())}
            rows.append(row | {"low": style.short(low), "high": style.short(high)})
    if not rows:
        raise DataError(f"no run holds {measure}.")
    places = [row["round"] for row in rows]
    x = style.rounds_axis([min(places) - 0.2, max(places) + 0.2])
    ends = (row[key] for row in rows for key in ("mean", "low", "high"))
    domain = style.limits(ends, bounds)
    as_lines = _legend(list(runs), symbolType="stroke", symbolSize=500)
    colour = _colour(list(runs), legend=as_lines)
    dash = _told_apart(list(runs), _DASHES, as_lines)
    base = alt.Chart(style.data_of(rows))
    band = base.mark_area(opacity=0.16, clip=True).encode(
        x=x,
        y=style.value_axis("low", title, domain),
        y2=alt.Y2("high"),
        color=colour,
    )
    line = base.mark_line(strokeWidth=2, clip=True, point=len(set(places)) < 3)
    means = line.encode(
        x=x,
        y=style.value_axis("mean", title, domain),
        color=colour,
        strokeDash=alt.StrokeDash("strategy:N", **dash),
    )
    # The first one is seen also where others lie upon it; these have gaps in turn.
    first = next(iter(runs))
    below = (
        base.transform_filter(f"datum.strategy === {style.literal(first)}")
        .mark_line(clip=True, strokeWidth=6, opacity=0.45)
        .encode(x=x, y=style.value_axis("mean", title, domain), color=colour)
    )
    told = [style.number(f"v{which}", name) for which, name in enumerate(runs)]
    pointer = style.at_pointer(
        base.transform_pivot("key", value="mean", groupby=["round"]), told
    )
    cut = ", cut at 0 and 1" * share
    notes = [
        f"The line is the mean over the seeds, the band its 95% t interval{cut}."
        * (max(map(len, runs.values())) > 1),
        f"The wide line is {first}." * (len(runs) > 1),
    ]
    return finished(
        style.layered(band, below, style.zoomable(means), pointer),
        f"{title} over rounds",
        " ".join(filter(None, notes)),
        height=270,
    )


def _colour(strategies: Sequence[str], **more: Any) -> alt.Color:
    colours = [SEVERAL[k % len(SEVERAL)] for k in range(len(strategies))]
    scale = alt.Scale(domain=list(strategies), range=colours)
    return alt.Color(
        "strategy:N", scale=scale, **{"legend": _legend(strategies), **more}
    )


def _legend(strategies: Sequence[str], **more: Any) -> alt.Legend:
    # By default two side by side, and one where the page is narrow.
    alone: dict[str, Any] = {"columns": 1} if max(map(len, strategies)) > _LONG else {}
    return alt.Legend(symbolOpacity=1, **alone, **more)


def _told_apart(
    strategies: Sequence[str], kinds: Sequence[Any], legend: alt.Legend
) -> dict[str, Any]:
    """Return by what neighbours differ, and those of one colour; and so its legend."""
    own = [kinds[(k + k // len(SEVERAL)) % len(kinds)] for k in range(len(strategies))]
    scale = alt.Scale(domain=list(strategies), range=own)
    return {"scale": scale, "legend": legend}


def clients_beside(runs: Runs, measure: str, title: str, share: bool) -> alt.LayerChart:
    """Draw how all clients fare at the end, strategy below strategy.

    A dot is a client of one seed, the bar holds the middle half of them, its line is
    the median client.

    Parameters
    ----------
    runs, measure, title, share
        As :func:`curves` takes them; the measure is a column of ``clients.csv``.

    Raises
    ------
    DataError
        No run holds it.
    """
    dots: list[style.Row] = []
    bars: list[style.Row] = []
    for which, (strategy, several) in enumerate(runs.items()):
        found: list[tuple[str, int, float]] = []
        for seed, run in several:
            if (run.folder / "clients.csv").is_file():
                frame = run.by_number(measure)
                last = frame.to_numpy(float)[-1].tolist() if len(frame) else []
                found += [
                    (run.name_of(int(number)), seed, value)
                    for number, value in zip(frame.columns.tolist(), last, strict=False)
                    if math.isfinite(value)
                ]
        if not found:
            continue
        low, middle, high = np.quantile([f[2] for f in found], [0.25, 0.5, 0.75])
        bars.append(
            {"strategy": strategy, "at": which, "low": style.short(low)}
            | {"middle": style.short(middle), "high": style.short(high)}
        )
        for place in style.thinned(len(found), _MOST_DOTS // len(runs)):
            name, seed, value = found[place]
            # Dots beside each other, by the golden ratio: no draw, and no pattern.
            aside = (place * 0.618034) % 1 - 0.5
            dots.append(
                {"strategy": strategy, "at": style.short(which + 0.6 * aside, 4)}
                | {"client": name, "seed": seed, "value": style.short(value, 4)}
            )
    if not dots:
        raise DataError(f"no run holds the clients' {measure}.")
    names = list(runs)
    domain = style.limits(
        (dot["value"] for dot in dots), (0.0, 1.0) if share else (-1e300, 1e300)
    )
    told = f"Clients’ {title.lower()}"
    # A line each, so that names need not be cut, however many there are.
    y = alt.Y(
        "at:Q",
        title=None,
        scale=alt.Scale(domain=[len(names) - 0.5, -0.5], nice=False),
        axis=alt.Axis(
            values=list(range(len(names))),
            labelExpr=f"{style.literal(list(map(_wrapped, names)))}[datum.value]",
            ticks=False,
            grid=False,
            labelLimit=150,
            labelOverlap=False,
        ),
    )

    def x(field: str) -> alt.X:
        axis = alt.Axis(tickCount=6, **style.value_format(False))
        scale = alt.Scale(domain=domain, nice=False, zero=False)
        return alt.X(f"{field}:Q", title=told, scale=scale, axis=axis)

    cloud = alt.Chart(style.data_of(dots)).mark_circle(size=14, opacity=0.45, clip=True)
    base = alt.Chart(style.data_of(bars))
    half = base.mark_rule(strokeWidth=9, opacity=0.35, color=MUTED)
    median = base.mark_tick(thickness=3, size=24, color=INK, orient="vertical")
    return finished(
        style.layered(
            half.encode(x=x("low"), x2=alt.X2("high"), y=y),
            style.zoomable(
                cloud.encode(
                    x=x("value"),
                    y=y,
                    color=_colour(names, legend=None),
                    tooltip=[
                        alt.Tooltip("client:N"),
                        alt.Tooltip("seed:Q"),
                        alt.Tooltip("strategy:N"),
                        style.number("value", title.lower()),
                    ],
                )
            ),
            median.encode(
                x=x("middle"),
                y=y,
                tooltip=[
                    alt.Tooltip("strategy:N"),
                    style.number("middle", "median client"),
                    style.number("low", "a quarter is below"),
                    style.number("high", "a quarter is above"),
                ],
            ),
        ),
        f"All clients’ {title.lower()}, at the end",
        "A dot is a client; the bar holds the middle half, the line is the median.",
        height=max(200, 46 * len(names)),
    )


def _wrapped(name: str) -> list[str]:
    """Return a name in lines, broken where its parts meet.

    Examples
    --------
    >>> _wrapped("fedavg+plain"), _wrapped("global-group-dro:group=sex+plain")
    (['fedavg+plain'], ['global-group-dro:', 'group=sex+plain'])
    """
    lines = [""]
    for part in re.findall(r"[^:+=]*[:+=]|[^:+=]+", name):
        if lines[-1] and len(lines[-1]) + len(part) > _LABEL:
            lines.append("")
        lines[-1] += part
    return lines


@dataclass(frozen=True)
class Front:
    """Two numbers of a run that one would like to have both.

    Attributes
    ----------
    x, y : str
        Columns of ``cells.csv``: of the first more is better.
    x_title, y_title : str
        What they are called; both lie in [0, 1].
    less_is_better : bool
        Whether less of the second is better.
    title : str
        The figure's.
    """

    x: str
    y: str
    x_title: str
    y_title: str
    less_is_better: bool = False
    title: str = "Accuracy against fairness"


CLIENTS_FRONT = Front(
    "client_accuracy_mean",
    "client_accuracy_worst10",
    "Mean of the clients’ accuracies",
    "Worst tenth of the clients",
)


def gap_front(name: str, attribute: str = "", column: str = "") -> Front:
    """Return the front of accuracy and of a gap between groups, by the gap's name.

    ``column`` of ``cells.csv`` holds it; by default the only attribute's.
    """
    called = f"{name.replace('_', ' ')}{attribute and f' by {attribute}'}"
    title = f"Accuracy against the gap in {called}"
    told = f"Gap in {called}"
    y = column or gap_named(name)
    return Front("test_accuracy", y, "Test accuracy", told, True, title)


def front(
    cells: pd.DataFrame, strategies: Sequence[str], which: Front = CLIENTS_FRONT
) -> alt.LayerChart:
    """Draw how accurate strategies are against how fair.

    A large dot is a strategy's mean over the seeds, a small one a run. The line joins
    the strategies than which no other is better in both.

    Parameters
    ----------
    cells : DataFrame
        The comparison's, of one data set.
    strategies : sequence of str
        In their order.
    which : Front
        Of what; by default of all clients and of the worst tenth.

    Raises
    ------
    DataError
        No run has both.
    """
    there = which.x in cells and which.y in cells
    known = cells.dropna(subset=[which.x, which.y]) if there else cells[:0]
    if known.empty:
        raise DataError(f"no run has {which.x} and {which.y}.")
    runs: list[style.Row] = [
        {"strategy": row["strategy"], "seed": int(row["seed"])}
        | {"x": style.short(row[which.x]), "y": style.short(row[which.y])}
        for row in known.to_dict("records")
    ]
    means: list[style.Row] = [
        {"strategy": name, "x": style.short(own[which.x].mean())}
        | {"y": style.short(own[which.y].mean())}
        for name in strategies
        for own in [known[known["strategy"] == name]]
        if len(own)
    ]
    sign = -1.0 if which.less_is_better else 1.0
    points = [(float(one["x"]), sign * float(one["y"])) for one in means]
    best = [
        one
        for one, (x, y) in zip(means, points, strict=True)
        if not any((p, q) != (x, y) and p >= x and q >= y for p, q in points)
    ]
    across = alt.X(
        "x:Q",
        title=which.x_title,
        scale=alt.Scale(
            domain=style.limits([r["x"] for r in runs], (0.0, 1.0)), nice=False
        ),
        axis=alt.Axis(tickCount=6, **style.value_format(False)),
    )
    up = style.value_axis(
        "y",
        which.y_title,
        style.limits([r["y"] for r in runs], (0.0, 1.0)),
    )
    told = [
        alt.Tooltip("strategy:N"),
        style.number("x", which.x_title.lower()),
        style.number("y", which.y_title.lower()),
    ]
    colour = _colour(strategies)
    line = alt.Chart(style.data_of(sorted(best, key=lambda one: float(one["x"] or 0))))
    small = alt.Chart(style.data_of(runs)).mark_circle(size=22, opacity=0.4, clip=True)
    large = alt.Chart(style.data_of(means)).mark_point(
        size=130, opacity=1, clip=True, filled=True
    )
    shape = alt.Shape(
        "strategy:N", **_told_apart(strategies, _SHAPES, _legend(strategies))
    )
    fairer = "down" if which.less_is_better else "up"
    joined = " The dashed line joins those that no other beats in both."
    return finished(
        style.layered(
            line.mark_line(color=MUTED, strokeDash=[5, 3], strokeWidth=1).encode(
                x=across, y=up
            ),
            small.encode(
                x=across, y=up, color=colour, tooltip=[*told, alt.Tooltip("seed:Q")]
            ),
            style.zoomable(
                large.encode(x=across, y=up, color=colour, shape=shape, tooltip=told),
                "x",
                "y",
            ),
        ),
        which.title,
        f"Right is more accurate, {fairer} is fairer. Large: a strategy’s mean over "
        f"the seeds; small: one run.{joined * (len(best) > 1)}",
        height=290,
    )


def most_cells(count: int) -> int:
    """Return how many cells each of several heat maps may have."""
    return max(2000, math.floor(60_000 / count))


__all__ = [
    "CLIENTS_FRONT",
    "Front",
    "Runs",
    "clients_beside",
    "curves",
    "front",
    "gap_front",
    "most_cells",
]
