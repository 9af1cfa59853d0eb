"""Figures of single clients: how they fare, and what data they hold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ...core.errors import DataError, check_choice
from ...core.extras import Imported
from ...core.texts import plain
from ..reader import RunFolder, label_columns
from . import style
from .heat import (
    averaged,
    block_means,
    height_of,
    lines_between,
    names_axis,
    overlap,
)
from .over_rounds import PERSONAL, better, called, client_measure, client_values
from .style import BLUE, EDGE, FEW, FULL, MUTED, VERMILION, finished
from .weights import MOST_DOTS, ordered_clients

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd
else:
    alt = Imported("altair", "studies", "a plot")

_MANY = 400  # dots would merge into a line


def ranked(run: RunFolder, measure: str = "") -> alt.LayerChart:
    """Draw how every client fares in the last evaluated round, worst first.

    Parameters
    ----------
    run : RunFolder
        What to draw.
    measure : str
        A column of ``clients.csv``; by default accuracy, or what was measured instead.

    Raises
    ------
    DataError
        No client was evaluated.
    """
    measure = measure or client_measure(run)
    frame = client_values(run, measure)
    number = int(frame.index[-1])
    sign = better(measure) or 1
    last = frame.iloc[-1].dropna().astype(float)
    last = (sign * last).sort_values(kind="stable") * sign
    count, tenth = len(last), max(1, math.ceil(len(last) / 10))
    percent = measure.endswith("accuracy")
    values = last.to_numpy()
    rows: list[style.Row] = [
        {
            "rank": k + 1,
            "client": run.name_of(int(last.index[k])),
            "value": style.short(values[k]),
            "worst": k < tenth,
        }
        for k in style.thinned(count, MOST_DOTS)
    ]
    # The first tenth may have been thinned out; the very worst client never is.
    if rows[0]["rank"] != 1:
        worst = run.name_of(int(last.index[0]))
        first = {"rank": 1, "client": worst, "value": style.short(values[0])}
        rows.insert(0, first | {"worst": True})
    domain = style.limits(values, (0.0, 1.0) if percent else (-1e300, 1e300))
    edges = [0.5 - 0.02 * count, count + 0.5 + 0.02 * count]
    base = alt.Chart(style.data_of(rows)).encode(
        x=alt.X(
            "rank:Q",
            title=f"The {count} evaluated clients, worst to best",
            scale=alt.Scale(domain=edges, nice=False, zero=False),
            axis=alt.Axis(format="d", tickMinStep=1, tickCount=6),
        ),
        y=style.value_axis(
            "value", f"{called(measure)} on held-out data", domain, percent=percent
        ),
        tooltip=[
            alt.Tooltip("client:N"),
            style.number("value", called(measure).lower(), percent=percent),
            alt.Tooltip("rank:Q", title="place, from the worst"),
        ],
    )
    size = float(np.clip(700 / count, 14, 45)) if count <= _MANY else 10
    colour = alt.when("datum.worst").then(alt.value(VERMILION))
    dots = base.mark_circle(size=size, opacity=1).encode(
        color=alt.ColorValue(**colour.otherwise(alt.value(BLUE)))
    )
    mean = _told(values.mean(), percent)
    level = alt.Chart(style.data_of([{"value": style.short(values.mean())}]))
    shade = alt.Chart(style.data_of([{"rank": 0.5, "end": tenth + 0.5}]))
    worst_of = _recorded(run, number, measure, values[:tenth])
    who = "client" if count <= FEW else "10 %"
    return finished(
        style.layered(
            shade.mark_rect(color=VERMILION, opacity=0.12, clip=True).encode(
                x=alt.X("rank:Q"), x2=alt.X2("end:Q")
            ),
            level.mark_rule(color=MUTED, strokeDash=[5, 3]).encode(y=alt.Y("value:Q")),
            style.zoomable(dots),
        ),
        f"Clients’ {'accuracies' if measure == 'accuracy' else called(measure)}, "
        f"round {number}",
        f"Worst {who}: {_told(worst_of, percent)} (shaded). Mean: {mean} (dashed).",
        height=250,
    )


def _told(value: float, percent: bool) -> str:
    return f"{100 * value:.1f} %" if percent else f"{value:.4g}"


def _recorded(run: RunFolder, number: int, measure: str, values: style.Array) -> float:
    """Return what the round's record says; without it the mean of the values."""
    found = run.measured(f"client_{measure}_worst10")
    return float(found[number] if number in found.index else values.mean())


def own_models(run: RunFolder) -> alt.LayerChart:
    """Draw what each client's own model reaches against the global one.

    Above the dashed line the client's own model is the better one (of accuracies; of
    losses below it).

    Raises
    ------
    DataError
        No client has a personal model, or none was evaluated.
    """
    for column, measure in PERSONAL.items():
        known, when = _personal(run, column, measure)
        if known is None:
            continue
        percent = measure == "accuracy"
        rows = [
            {
                "client": run.name_of(int(client)),
                "own": style.short(own),
                "global": style.short(whole),
            }
            for client, own, whole in zip(
                known["client"], known[column], known[measure], strict=True
            )
        ]
        helped = int((better(measure) * (known[column] - known[measure]) > 0).sum())
        count = len(rows)
        rows = [rows[k] for k in style.thinned(count, MOST_DOTS)]
        bounds = (0.0, 1.0) if percent else (0.0, math.inf)
        low, high = style.limits([*known[column], *known[measure]], bounds)
        x = alt.X(
            "global:Q",
            title=f"Global model’s {measure}",
            scale=alt.Scale(domain=[low, high], nice=False, zero=False),
            axis=alt.Axis(tickCount=6, **style.value_format(percent)),
        )
        y = style.value_axis(
            "own", f"Own model’s {measure}", [low, high], percent=percent
        )
        dots = alt.Chart(style.data_of(rows)).mark_circle(
            size=float(np.clip(900 / math.sqrt(count), 18, 80)),
            opacity=0.8,
            color=BLUE,
        )
        told = [
            alt.Tooltip("client:N"),
            style.number("own", "own model", percent=percent),
            style.number("global", "global model", percent=percent),
        ]
        ends = style.data_of([{"global": end, "own": end} for end in (low, high)])
        diagonal = alt.Chart(ends).mark_line(
            color=MUTED, strokeWidth=1, strokeDash=[5, 3]
        )
        return finished(
            style.layered(
                diagonal.encode(x=x, y=y),
                style.zoomable(dots.encode(x=x, y=y, tooltip=told), "x", "y"),
            ),
            f"Own against global model, {when}",
            f"A personal model is the better one for {helped} of {count} clients. "
            "Dashed: both alike.",
            height=290,
        )
    raise DataError(f"{run.folder} holds nothing of personal models.")


def _personal(
    run: RunFolder, column: str, measure: str
) -> tuple[pd.DataFrame | None, str]:
    """Return what clients' own models and the global one reached last, and when."""
    for name in ("personal", "clients"):  # Trained after the rounds, or in each.
        if not (run.folder / f"{name}.csv").is_file():
            continue
        frame = getattr(run, name)
        if not {column, measure} <= {*frame}:
            continue
        known = frame[np.isfinite(frame[[column, measure]]).all(axis=1)]
        if len(known) and name == "clients":
            number = int(known["round"].max())
            return known[known["round"] == number], f"round {number}"
        if len(known):
            return known, "after the last round"
    return None, ""


def labels(run: RunFolder, order: str = "number") -> alt.VConcatChart:
    """Draw which classes each client holds, and how much data above.

    The colour is the share of the client's training examples that are of the class, or
    have the label. It grows with the share's square root, so that small shares stay
    visible.

    Parameters
    ----------
    run : RunFolder
        What to draw.
    order : {"number", "size"}
        Clients by number, or those with most data first.

    Raises
    ------
    DataError
        The partition holds no classes.
    """
    check_choice("order", order, ["number", "size"])
    path = run.folder / "partition.csv"
    columns = label_columns(run.partition) if path.is_file() else []
    if not columns or run.partition.empty:
        raise DataError(f"{path} holds no classes.")
    clients = ordered_clients(run, order)
    table = run.partition.set_index("client").reindex(clients)
    counts = table[columns].to_numpy(dtype=float, na_value=0.0)
    sizes = counts.sum(axis=1)
    if "train_examples" in table:  # Each may have several labels.
        sizes = table["train_examples"].to_numpy(dtype=float, na_value=0.0)
    if sizes.sum() == 0:
        raise DataError(f"{path} holds no examples.")
    shares = counts / np.where(sizes > 0, sizes, np.nan)[:, None]
    blocks, merged, classes = block_means(shares, most_cells=40_000)
    size, _, _ = block_means(sizes[:, None])
    names = [run.name_of(client) for client in clients]
    whose = names[::merged]
    rows = [
        {
            "k": k,
            "client": whose[k],
            "size": style.short(size[k, 0]),
            "s": [style.short(share, 3) for share in blocks[k]],
        }
        for k in range(len(blocks))
    ]
    called_classes = [plain(name, 40) for name in run.class_names][::classes]
    place = "Client" if order == "number" else "Client, most data first"
    x: style.Row = {"scale": alt.Scale(domain=[-0.5, len(rows) - 0.5], nice=False)}
    base = alt.Chart(style.data_of(rows)).transform_calculate(
        left="datum.k - 0.5", right=f"datum.k + {0.5 + overlap(len(rows))}"
    )
    bars = base.mark_rect(color=style.HELD, clip=True).encode(
        x=alt.X("left:Q", title=None, axis=None, **x),
        x2=alt.X2("right:Q"),
        y=alt.Y(
            "size:Q",
            title="Examples",
            axis=alt.Axis(
                tickCount=2, format="~s", grid=False, minExtent=EDGE, maxExtent=EDGE
            ),
        ),
        y2=alt.datum(0),
        tooltip=[alt.Tooltip("client:N"), alt.Tooltip("size:Q", title="examples")],
    )
    top = float(np.nanmax(blocks))
    count = blocks.shape[1]
    cells = (
        base.transform_calculate(c=f"sequence(0, {count})")
        .transform_flatten(["s", "c"])
        .transform_filter("datum.s > 0")
        .transform_calculate(
            top="datum.c - 0.5",
            bottom="datum.c + 0.5",
            called=f"{style.literal(called_classes)}[datum.c]",
        )
        .mark_rect(color="#1f80d1", clip=True, **lines_between(len(rows), count))
    )
    marks = [share for share in (0.0, 0.01, 0.1, 0.25, 0.5, 1.0) if share < 0.9 * top]
    shade = alt.Opacity(
        "s:Q",
        scale=alt.Scale(type="sqrt", domain=[0, top], range=[0, 1]),
        legend=alt.Legend(
            title="share of the client’s data",
            orient="bottom",
            direction="horizontal",
            columns=0,
            values=[*marks[1:], top],
            format=".0%",
            symbolType="square",
            symbolSize=150,
            symbolFillColor="#1f80d1",
            symbolStrokeWidth=0,
        ),
    )
    few = len(rows) <= 24 and sum(map(len, whose)) <= 90
    drawn = cells.encode(
        x=alt.X("left:Q", title=place, axis=names_axis(whose, 24 if few else 12), **x),
        x2=alt.X2("right:Q"),
        y=alt.Y(
            "top:Q",
            title="Class",
            scale=alt.Scale(domain=[count - 0.5, -0.5], nice=False),
            axis=names_axis(called_classes, extent=EDGE),
        ),
        y2=alt.Y2("bottom:Q"),
        opacity=shade,
        tooltip=[
            alt.Tooltip("client:N", title="client" if merged == 1 else "clients from"),
            alt.Tooltip("called:N", title="class"),
            alt.Tooltip("s:Q", title="share", format=".1%"),
        ],
    )
    notes = [averaged(merged, "clients"), averaged(classes, "classes")]
    return finished(
        alt.vconcat(
            bars.properties(width=FULL, height=50),
            drawn.properties(width=FULL, height=height_of(count, 22, 60)),
            spacing=6,
        ),
        "Which classes each client holds",
        " ".join(filter(None, notes)),
        marks=int((blocks > 0).sum()),
    )
