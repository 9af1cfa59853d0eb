"""Figures of how much each client counted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.errors import DataError, check_choice
from ...core.extras import Imported
from ...core.texts import plain
from ..reader import RunFolder
from . import style
from .heat import (
    MOST_CELLS,
    MOST_ROWS,
    averaged,
    block_means,
    height_of,
    lines_between,
    names_axis,
    overlap,
)
from .style import BLUE, FULL, INK, MISSING, MUTED, VERMILION, Array, finished

if TYPE_CHECKING:
    import altair as alt
else:
    alt = Imported("altair", "studies", "a plot")

MOST_DOTS = 1500  # of a figure with a dot a client

_DIVERGING = (
    *("#123c6b", "#2f78b7", "#8fc0dd", "#fbf2cf"),
    *("#f3b066", "#cf5a18", "#7a2405"),
)


def heatmap(
    run: RunFolder,
    order: str = "number",
    most_cells: int = MOST_CELLS,
    limit: float | None = None,
) -> alt.Chart:
    """Draw how much each client counted in each round.

    The colour is the client's weight relative to the uniform weight, one over the
    number of clients that counted in the round, on a logarithmic scale: cream is
    uniform, orange counts for more, blue for less, grey took no part.

    Parameters
    ----------
    run : RunFolder
        What to draw.
    order : {"number", "size"}
        Clients by number, or those with most data first.
    most_cells : int
        What exceeds it is averaged.
    limit : float, optional
        Where the scale ends, as the binary logarithm of weight over uniform weight,
        such as 2 for a quarter to four times; by default :func:`reach`.

    Raises
    ------
    DataError
        The run holds no weights.
    """
    check_choice("order", order, ["number", "size"])
    clients = ordered_clients(run, order)
    weights = weights_of(run)
    rounds = max(run.rounds_done, int(weights.index.max()))
    values = weights.reindex(index=range(1, rounds + 1), columns=clients).to_numpy().T
    counted = np.isfinite(values).sum(axis=0)
    relative, merged, every = block_means(
        values * np.where(counted, counted, np.nan),
        min(MOST_ROWS, most_cells // 20),
        most_cells,
    )

    limit = _scale_limit(relative) if limit is None else limit
    rows, columns = relative.shape
    names = [run.name_of(client) for client in clients]
    called = [
        names[k * merged]
        if merged == 1
        else f"{names[k * merged]} to {names[min((k + 1) * merged, len(names)) - 1]}"
        for k in range(rows)
    ]
    # In thousandths, which are shorter to write; what all rows share is said once, in
    # what the figure computes of each row, which is less than of each cell.
    data = [
        {"k": k, "who": called[k], "w": [style.short(1000 * w, 3) for w in relative[k]]}
        for k in range(rows)
    ]
    ends = f"{rounds + 1}, {every}"
    edge = every + 0.5 + overlap(rounds)
    uniform = [_uniform(n) for n in counted[::every].tolist()]
    chart = (
        alt.Chart(style.data_of(data))
        .transform_calculate(
            round=f"sequence(1, {ends})",
            left=f"sequence(0.5, {ends})",
            right=f"sequence({edge}, {rounds + every + 1}, {every})",
            uniform=style.literal(uniform),
            top="datum.k - 0.5",
            bottom="datum.k + 0.5",
        )
        .transform_flatten(["w", "round", "left", "right", "uniform"])
        .transform_filter("isValid(datum.w)")
        .transform_calculate(
            # Weights at or below zero have no logarithm: they stand at the low end.
            log=f"clamp(log(max(datum.w, 1e-9) / 1000) / LN2, {-limit}, {limit})",
            weight="datum.w * datum.uniform",
            ratio="datum.w / 1000",
        )
    )
    logs = np.log2(np.where(relative > 0, relative, 2.0**-99))
    ticks, labels = _ratio_ticks(
        limit,
        bool((logs[np.isfinite(relative)] < -limit).any()),
        bool((logs[np.isfinite(relative)] > limit).any()),
    )
    colour = alt.Color(
        "log:Q",
        scale=alt.Scale(
            domain=[limit * (k - 3) / 3 for k in range(7)],
            range=list(_DIVERGING),
            interpolate="rgb",
        ),
        legend=alt.Legend(
            title=_legend_title(counted),
            orient="top",
            direction="horizontal",
            values=ticks,
            labelExpr=f"{style.literal(labels)}[round((datum.value + {limit}) "
            f"/ {ticks[1] - ticks[0]})]",
        ),
    )
    edges = [0.5, rounds + 0.5]
    rects = chart.mark_rect(clip=True, **lines_between(rows, columns)).encode(
        x=alt.X(
            "left:Q",
            title="Round",
            scale=alt.Scale(domain=edges, nice=False),
            axis=alt.Axis(format="d", tickMinStep=1, tickCount=10),
        ),
        x2=alt.X2("right:Q"),
        y=alt.Y(
            "top:Q",
            title="Client" if order == "number" else "Client, most data first",
            scale=alt.Scale(domain=[rows - 0.5, -0.5], nice=False),
            axis=names_axis(names[::merged]),
        ),
        y2=alt.Y2("bottom:Q"),
        color=colour,
        tooltip=[
            alt.Tooltip("who:N", title="client" if merged == 1 else "clients"),
            alt.Tooltip("round:Q", title="round" if every == 1 else "from round"),
            style.number("weight", "weight"),
            style.number("ratio", "÷ uniform"),
        ],
    )
    notes = [averaged(merged, "clients"), averaged(every, "rounds")]
    if np.isnan(values).any():
        notes.insert(0, "Grey took no part, or its reply was not used.")
        rects = rects.properties(view=alt.ViewBackground(fill=MISSING))
    return finished(
        style.zoomable(rects),
        "How much each client counted",
        " ".join(filter(None, notes)),
        width=FULL,
        height=height_of(rows),
        marks=relative.size,
    )


def _uniform(counted: int) -> float | None:
    return style.short(0.001 / counted) if counted else None


def _legend_title(counted: Array) -> str:
    uniform = set(counted[counted > 0].tolist())
    share = f" = {1 / uniform.pop():.3g}" if len(uniform) == 1 else ""
    return f"weight ÷ uniform weight 1/K{share}"


def reach(run: RunFolder) -> float:
    """Return where the scale of a run's weights ends, or say why it has none.

    Raises
    ------
    DataError
        The run holds no weights.
    """
    values = weights_of(run).to_numpy()
    return _scale_limit(values * np.isfinite(values).sum(axis=1, keepdims=True))


def _scale_limit(relative: Array) -> float:
    """Return the smallest round limit that holds nearly all of the logarithms."""
    logs = np.abs(np.log2(relative[relative > 0]))
    reach = float(np.quantile(logs, 0.98)) if logs.size else 0.0
    choices = [math.log2(1.1), math.log2(1.25), 0.5, 1.0, 2.0, 3.0, 4.0]
    return next((limit for limit in choices if limit >= reach), 5.0)


def _ratio_ticks(
    limit: float, below: bool, above: bool
) -> tuple[list[float], list[str]]:
    half = [limit / 2] if limit in (2.0, 4.0) else []
    ticks = [-limit, *[-h for h in half], 0.0, *half, limit]
    marks = [f"{'÷' if tick < 0 else '×'} {2.0 ** abs(tick):.3g}" for tick in ticks]
    marks[len(ticks) // 2] = "uniform"
    marks[0] = f"≤ {marks[0]}" if below else marks[0]
    marks[-1] = f"≥ {marks[-1]}" if above else marks[-1]
    return ticks, marks


# ------------------------------------------------------------- against the data's size


def against_data(run: RunFolder, round: int | None = None) -> alt.LayerChart:
    """Draw the clients' weights against their shares of the data in one round.

    On the dashed diagonal a client counts by its data, as in FedAvg; on the dotted
    line all clients count the same. The clients farthest from the diagonal are named.

    Parameters
    ----------
    run : RunFolder
        What to draw.
    round : int, optional
        By default the last round with weights.

    Raises
    ------
    DataError
        The run holds no weights, or none in that round; or it is not known how much
        data the clients hold.
    """
    weights = weights_of(run)
    number = int(weights.index.max()) if round is None else round
    if number not in weights.index:
        raise DataError(f"{run.folder} holds no weights of round {number}.")
    row = weights.loc[number].dropna()
    clients, weight = row.index.tolist(), row.to_numpy(dtype=float)
    share = data_shares(run, number, clients)
    if np.isnan(share).any():
        raise DataError(f"{run.folder} does not say how much data the clients hold.")

    top = 1.08 * max(float(share.max()), float(weight.max()), 1 / len(weight))
    bottom = min(0.0, 1.08 * float(weight.min()))
    alike = np.abs(weight - share) <= 0.01 * share
    kinds = {
        "counts for more than its data": (VERMILION, ~alike & (weight > share)),
        "counts for less than its data": (BLUE, ~alike & (weight < share)),
        "counts for its data, within 1 %": (MUTED, alike),
    }
    kind = np.select([mask for _, mask in kinds.values()], list(kinds), "")
    far = np.argsort(-np.abs(weight - share), kind="stable")
    # Of very many those that stand out, and of the others every few.
    shown = far[: MOST_DOTS // 2].tolist()
    rest = far[MOST_DOTS // 2 :].tolist()
    shown += [rest[k] for k in style.thinned(len(rest), MOST_DOTS // 2)]
    named = _apart(
        [k for k in far[:3] if abs(weight[k] - share[k]) > 0.02 * top],
        share / top,
        weight / top,
    )
    rows: list[style.Row] = [
        {
            "client": run.name_of(int(clients[k])),
            "share": style.short(share[k]),
            "weight": style.short(weight[k]),
            "ratio": style.short(weight[k] * len(weight), 4),
            "kind": str(kind[k]),
            "label": plain(run.called([int(clients[k])]), 24) if k in named else "",
        }
        for k in sorted(shown)
    ]
    there = [name for name, (_, mask) in kinds.items() if mask.any()]
    base = alt.Chart(style.data_of(rows)).encode(
        x=alt.X(
            "share:Q",
            title=f"Share of the round’s data ({len(weight)} clients)",
            scale=alt.Scale(domain=[0, top], nice=False),
            axis=alt.Axis(format="~g", tickCount=6),
        ),
        y=style.value_axis("weight", "Weight", [bottom, top]),
    )
    dots = base.mark_circle(
        size=float(np.clip(900 / math.sqrt(len(weight)), 18, 80)), opacity=0.85
    ).encode(
        color=alt.Color(
            "kind:N",
            scale=alt.Scale(domain=there, range=[kinds[name][0] for name in there]),
            legend=alt.Legend(columns=1),
        ),
        tooltip=[
            alt.Tooltip("client:N"),
            style.number("weight", "weight"),
            style.number("ratio", "÷ uniform"),
            style.number("share", "share of data"),
        ],
    )
    # Right of its dot, or left of it where it would leave the figure.
    right = f"datum.share < {0.6 * top}"
    texts = base.mark_text(
        align=alt.expr(f"{right} ? 'left' : 'right'"),
        dx=alt.expr(f"{right} ? 7 : -7"),
        fontSize=11,
        color=INK,
        clip=True,
    )
    ends: list[style.Row] = [{"share": 0, "weight": 0}, {"share": top, "weight": top}]
    diagonal = alt.Chart(style.data_of(ends)).mark_line(
        color=MUTED, strokeWidth=1, strokeDash=[5, 3], clip=True
    )
    level = alt.Chart(style.data_of([{"weight": style.short(1 / len(weight))}]))
    words = (
        "Dashed: weight = share of data, as in FedAvg. Dotted: all alike, "
        f"1/{len(weight)}."
    )
    if len(shown) < len(weight):
        words += f" {len(shown)} of the {len(weight)} clients are drawn: those "
        words += "farthest from the dashed line, and some of the others."
    return finished(
        style.layered(
            diagonal.encode(x=alt.X("share:Q"), y=alt.Y("weight:Q")),
            level.mark_rule(color=MUTED, strokeDash=[1, 3]).encode(y=alt.Y("weight:Q")),
            style.zoomable(dots, "x", "y"),
            texts.transform_filter("datum.label").encode(text=alt.Text("label:N")),
        ),
        f"Weight against data, round {number}",
        words,
        height=290,
    )


def _apart(places: Sequence[int], x: Array, y: Array) -> set[int]:
    """Return the places whose names would not cover an earlier one."""
    named: list[int] = []
    for place in places:
        near = (
            abs(y[place] - y[other]) < 0.06 and abs(x[place] - x[other]) < 0.25
            for other in named
        )
        if not any(near):
            named.append(int(place))
    return set(named)


# -------------------------------------------------------------------- what they share


def weights_of(run: RunFolder) -> Any:
    """Return the weights as ``[rounds, clients]``, or say why there are none.

    Raises
    ------
    DataError
        The run holds none.
    """
    path = run.folder / "clients.csv"
    if not path.is_file() or run.weights_by_number.empty:
        raise DataError(
            f"{path} holds no weights: no round succeeded, or "
            f"the strategy '{run.strategy}' aggregates without weights."
        )
    return run.weights_by_number


def ordered_clients(run: RunFolder, order: str = "number") -> list[int]:
    """Return every client's number, by number or by falling size of its data.

    Raises
    ------
    DataError
        The sizes are asked for and not known.
    """
    path = run.folder / "partition.csv"
    sizes: dict[int, float] = {}
    if path.is_file() and "train_examples" in run.partition:
        known = run.partition["train_examples"].fillna(0).tolist()
        sizes = dict(zip(run.partition["client"].tolist(), known, strict=True))
    elif order == "size":
        raise DataError(f"{path} is missing, which holds the clients' data sizes.")
    clients = set(sizes)
    if (run.folder / "clients.csv").is_file():
        took_part = run.clients["status"].isin(["ok", "dropped"]) | (not sizes)
        clients |= set(run.clients["client"][took_part].tolist())
    if order == "size":
        return sorted(clients, key=lambda client: (-sizes.get(client, 0), client))
    return sorted(clients)


def data_shares(run: RunFolder, number: int, clients: Iterable[int]) -> Array:
    """Return the share of the round's data that each of its clients holds, ``[K]``.

    All NaN where it is not known of some client how much it holds.

    Parameters
    ----------
    run : RunFolder
        The run.
    number : int
        The round.
    clients : iterable of int
        The clients that counted in it.
    """
    clients = list(clients)
    rows = run.clients[run.clients["round"] == number]
    sizes = np.full(len(clients), np.nan)
    if "examples" in rows:
        known = rows.dropna(subset=["weight"]).drop_duplicates("client")
        examples = known.set_index("client")["examples"].reindex(clients)
        sizes = examples.to_numpy(dtype="float64", na_value=np.nan)
    if np.isnan(sizes).any() and (run.folder / "partition.csv").is_file():
        table = run.partition.set_index("client").get("train_examples")
        if table is not None:
            told = table.reindex(clients).to_numpy(dtype=float, na_value=np.nan)
            sizes = np.where(np.isnan(sizes), told, sizes)
    return np.asarray(sizes / max(float(sizes.sum()), 1.0))
