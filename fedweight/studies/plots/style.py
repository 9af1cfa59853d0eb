"""How every figure looks, and what several of them draw alike."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from ...core.extras import Imported

if TYPE_CHECKING:
    import altair as alt
    import vl_convert

    Chart: TypeAlias = alt.Chart | alt.LayerChart | alt.VConcatChart | alt.ConcatChart
else:
    alt = Imported("altair", "studies", "a plot")
    vl_convert = Imported("vl_convert", "studies", "a plot")

C = TypeVar("C", bound="Chart")
Array = npt.NDArray[Any]
Row = dict[str, Any]

# Each of these colours has one role, so that a report can exchange it for another one
# in dark mode. Blue, vermilion and green differ for every kind of colour vision.
INK = "#1f2933"
MUTED = "#5f6b7a"
GRID = "#e3e7ec"
PAPER = "#fffffe"
BLUE = "#0b6bb1"
VERMILION = "#cc4e0c"
GREEN = "#0b8468"
VIOLET = "#7a4fa3"
OCHRE = "#a87400"
SEVERAL = (BLUE, VERMILION, GREEN, VIOLET, OCHRE, MUTED)

# What a canvas paints cannot follow the page: this one suits light and dark.
MISSING = "rgba(125,135,150,0.28)"
HELD = "rgba(125,135,150,0.65)"

HALF, FULL = 440, 900  # widths in pixels, where no page gives another
EDGE = 50  # pixels left of stacked axes, so that these stand one above the other

FEW = 10  # of so many clients a tenth is one client, and is called so
MOST_ROUNDS = 1000  # drawn of a curve; beyond, every second, third, ...

_CONFIG: Row = {
    "aria": False,  # What a figure shows is said of it as a whole.
    "font": 'system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif',
    "view": {"stroke": None},
    "title": {
        **{"anchor": "start", "frame": "group", "fontSize": 14, "offset": 12},
        **{"color": INK, "subtitleColor": MUTED, "subtitleFontSize": 11},
    },
    "axis": {
        **{"labelColor": MUTED, "labelFontSize": 11, "labelLimit": 110},
        **{"titleColor": INK, "titleFontSize": 12, "titleFontWeight": "normal"},
        **{"domainColor": MUTED, "tickColor": MUTED, "gridColor": GRID},
        **{"labelOverlap": True, "titlePadding": 8},
    },
    "axisX": {"grid": False, "labelSeparation": 8},
    "legend": {
        **{"orient": "bottom", "columns": 2, "title": None, "symbolStrokeWidth": 2.5},
        **{"labelColor": MUTED, "labelFontSize": 11, "labelLimit": 320},
        **{"titleColor": INK, "titleFontSize": 11, "titleFontWeight": "normal"},
        **{"titleLimit": 400, "gradientLength": 240, "gradientThickness": 10},
    },
}


def finished(
    chart: C,
    title: str,
    note: str = "",
    *,
    width: int = HALF,
    height: int | None = None,
    marks: int = 0,
) -> C:
    """Return a chart with its title, what is to be known of it, its size and looks."""
    words: Row = {"subtitle": note} if note else {}
    given: Row = {"title": alt.TitleParams(title, **words), "background": PAPER}
    given |= {"usermeta": {"marks": marks}} if marks else {}
    given |= {"width": width, "height": height} if height is not None else {}
    made: C = chart.properties(**given).configure(**_CONFIG)
    return made


def svg(chart: Any) -> str:
    """Return a chart as a drawing that stands in a page, made without a browser."""
    drawn: str = vl_convert.vegalite_to_svg(chart.to_dict(validate=False))
    return drawn


def layered(*charts: alt.Chart) -> alt.LayerChart:
    """Return charts one over the other."""
    drawn = alt.layer(*charts)
    assert isinstance(drawn, alt.LayerChart)
    return drawn


def data_of(rows: Iterable[Mapping[str, Any]]) -> alt.InlineData:
    """Return rows as a chart's data, however many there are.

    A tuple, as Altair copies a list of rows whenever it copies a chart.
    """
    return alt.InlineData(values=tuple(dict(row) for row in rows))


def short(value: Any, digits: int = 5) -> float | int | None:
    """Return a number with as many digits as a reader takes in; ``None`` for NaN.

    Examples
    --------
    >>> short(0.123456789), short(1234567.0), short(float("nan"))
    (0.12346, 1234567, None)
    """
    if value is None or not np.isfinite(number := float(value)):
        return None
    rounded = float(f"{number:.{digits}g}")
    whole = number if number.is_integer() else rounded
    return int(whole) if whole.is_integer() and abs(whole) < 2**53 else rounded


def thinned(count: int, most: int) -> list[int]:
    """Return which of so many places in a row are shown: the last one always is.

    Examples
    --------
    >>> thinned(4, 10), thinned(10, 4)
    ([0, 1, 2, 3], [0, 3, 6, 9])
    """
    step = max(1, math.ceil(count / most))
    return list(range(count - 1, -1, -step))[::-1]


def limits(
    values: Iterable[float | None], bounds: tuple[float, float] = (-math.inf, math.inf)
) -> list[float]:
    """Return an axis' ends: some air around the values, none beyond what is possible.

    Examples
    --------
    >>> limits([0.0, 0.5, None], (0.0, 1.0))
    [-0.0075, 0.53]
    """
    known = [v for v in values if v is not None and math.isfinite(v)] or [0.0, 1.0]
    low, high = min(known), max(known)
    air = 0.06 * (high - low) or 0.05 * max(abs(high), 0.1)
    # A dot or a line at the very bound still needs its own thickness.
    edge = 0.25 * air
    return [max(low - air, bounds[0] - edge), min(high + air, bounds[1] + edge)]


def literal(value: Any) -> str:
    """Return a value as it stands in an expression of Vega."""
    return json.dumps(value)


# ------------------------------------------------------------------ axes over rounds


def zoomable(chart: alt.Chart, *axes: str) -> alt.Chart:
    """Return a chart that is moved by dragging, and widened by Ctrl and the wheel.

    The wheel alone scrolls the page; a double click shows all again. Without axes it
    is along the first.
    """
    chosen: Any = list(axes or ("x",))
    # Names of our own: those that Altair counts up would differ from call to call.
    chosen = alt.selection_interval(
        name="zoom",
        bind="scales",
        encodings=chosen,
        zoom="wheel![event.ctrlKey || event.metaKey]",
    )
    named: alt.Chart = chart.properties(name="marks")
    return named.add_params(chosen)


def rounds_axis(domain: Sequence[float] | None = None, title: str = "Round") -> alt.X:
    """Return the axis of the rounds: whole numbers, from the first to the last."""
    scale: Row = {"nice": False, "zero": False}
    if domain is not None:
        scale["domain"] = list(domain)
    axis = alt.Axis(format="d", tickMinStep=1, tickCount=8)
    return alt.X("round:Q", title=title, scale=alt.Scale(**scale), axis=axis)


def value_axis(
    field: str, title: str | None, domain: Sequence[float], *, percent: bool = False
) -> alt.Y:
    """Return the axis of what is measured, in percent or as a plain number."""
    axis = alt.Axis(tickCount=6, **value_format(percent))
    scale = alt.Scale(domain=list(domain), nice=False, zero=False)
    return alt.Y(f"{field}:Q", title=title, scale=scale, axis=axis)


def value_format(percent: bool) -> Row:
    """Return how an axis writes its numbers."""
    if percent:
        return {"labelExpr": "format(100 * datum.value, '~g') + ' %'"}
    return {"format": "~g"}


def number(field: str, title: str, *, percent: bool = False) -> alt.Tooltip:
    """Return how a number is told where the pointer is."""
    return alt.Tooltip(
        field, type="quantitative", title=title, format=".1%" if percent else ".4~g"
    )


def at_pointer(chart: alt.Chart, told: Sequence[alt.Tooltip]) -> alt.Chart:
    """Return a line at the round nearest to the pointer, which tells its numbers."""
    near = alt.selection_point(
        name="near",
        nearest=True,
        on="pointerover",
        fields=["round"],
        empty=False,
    )
    shown = alt.when(near).then(alt.value(0.7)).otherwise(alt.value(0))
    drawn: alt.Chart = (
        chart.properties(name="pointer")
        .mark_rule(color=MUTED, strokeWidth=1)
        .encode(
            x=alt.X("round:Q"),
            opacity=alt.OpacityValue(**shown),
            tooltip=[alt.Tooltip("round:Q", title="round"), *told],
        )
        .add_params(near)
    )
    return drawn


def lines(
    series: Mapping[str, Sequence[tuple[int, float]]],
    colours: Mapping[str, str],
    title: str | None,
    *,
    percent: bool = False,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    shaded: Sequence[tuple[int, str]] = (),
) -> alt.LayerChart:
    """Draw several numbers over the rounds.

    Parameters
    ----------
    series : Mapping[str, sequence of (int, float)]
        Rounds and values by what a line is called.
    colours : Mapping[str, str]
        Each line's.
    title : str, optional
        What is measured, at the axis.
    percent : bool
        Whether it is told in percent.
    bounds : (float, float)
        Between what it may lie.
    shaded : sequence of (int, str)
        Rounds that failed, and why.
    """
    rows: list[Row] = [
        {"round": place, "series": label, "key": f"v{which}", "value": short(value)}
        for which, (label, points) in enumerate(series.items())
        for place, value in (points[k] for k in thinned(len(points), MOST_ROUNDS))
    ]
    rounds = [row["round"] for row in rows]
    edges = [min(rounds) - 0.2, max(rounds) + 0.2]
    base = alt.Chart(data_of(rows))
    alone = len(set(rounds)) < 3
    x = rounds_axis(edges)
    drawn = base.mark_line(strokeWidth=2, clip=True, point=alone).encode(
        x=x,
        y=value_axis(
            "value", title, limits((r["value"] for r in rows), bounds), percent=percent
        ),
        color=alt.Color(
            "series:N",
            scale=alt.Scale(
                domain=list(series), range=[colours[label] for label in series]
            ),
            legend=alt.Legend() if len(series) > 1 else None,
        ),
    )
    told = at_pointer(
        base.transform_pivot("key", value="value", groupby=["round"]),
        [
            number(f"v{which}", label, percent=percent)
            for which, label in enumerate(series)
        ],
    )
    return layered(*shades(shaded, edges), zoomable(drawn), told)


def shades(
    shaded: Sequence[tuple[int, str]], edges: Sequence[float]
) -> list[alt.Chart]:
    """Return what shades rounds that failed, and tells why."""
    if not shaded:
        return []
    half = max(0.5, (edges[1] - edges[0]) / 400)
    rows = [
        {"low": place - half, "high": place + half, "at": place, "why": why}
        for place, why in shaded[:MOST_ROUNDS]
    ]
    return [
        alt.Chart(data_of(rows))
        .mark_rect(color=MISSING, clip=True)
        .encode(
            x=alt.X("low:Q", title=None),
            x2=alt.X2("high:Q"),
            tooltip=[
                alt.Tooltip("at:Q", title="round failed"),
                alt.Tooltip("why:N", title="reason"),
            ],
        )
    ]


def failed_words(shaded: Sequence[tuple[int, str]]) -> str:
    """Say what the shade means, where there is one."""
    if not shaded:
        return ""
    count = len(shaded)
    return f"Grey: {'a round' if count == 1 else f'{count} rounds'} that failed."
