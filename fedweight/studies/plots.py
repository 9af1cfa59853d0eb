"""Figures of a run, for a notebook, a paper or the report.

Every function takes a :class:`~fedweight.studies.Run` and, optionally, axes to draw
in; it returns the axes. Without axes it makes a figure of its own, which shows itself
in a notebook. Nothing here touches pyplot or matplotlib's global settings.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..core.errors import DataError, check_choice
from ..core.texts import plain
from .columns import CLIENT_COLUMNS, ROUND_COLUMNS
from .reader import RunFolder, label_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.transforms import Transform

Array = npt.NDArray[np.float64]

# Each of these colours has one role, so that the report can exchange it for another
# one in dark mode. Blue, vermilion and green differ for every kind of colour vision.
INK = "#1f2933"
MUTED = "#5f6b7a"
GRID = "#e3e7ec"
PAPER = "#fffffe"
MISSING = "#dde1e6"
BLUE = "#0b6bb1"
VERMILION = "#cc4e0c"
GREEN = "#0b8468"

HALF, FULL = 5.3, 10.8  # widths in inches: half of the report's page, and all of it

FEW = 10  # of so many clients a tenth is one client, and is called so

_MOST_PANELS = 12  # of what a method recorded

# No screen shows more cells than this one by one; what exceeds it is averaged.
_MAX_ROWS, _MAX_COLUMNS = 400, 400


# ------------------------------------------------------------------------ over rounds


def accuracy(run: RunFolder, ax: Axes | None = None) -> Axes:
    """Draw the global model's accuracy over rounds.

    Parameters
    ----------
    run : RunFolder
        What to draw.
    ax : Axes, optional
        Where to draw; by default a new figure.

    Raises
    ------
    DataError
        The run holds no accuracy.
    """
    ax = _over_rounds(
        run,
        ax,
        {
            "test_accuracy": ("server’s test set", BLUE),
            "evaluate_accuracy": ("clients’ held-out data", VERMILION),
            "train_accuracy": ("clients’ training", GREEN),
        },
        (0.0, 1.0),
    )
    _titles(ax, "Accuracy over rounds", "Round", "Accuracy")
    _percent(ax.yaxis)
    return ax


def loss(run: RunFolder, ax: Axes | None = None) -> Axes:
    """Draw the global model's loss over rounds.

    Parameters
    ----------
    run : RunFolder
        What to draw.
    ax : Axes, optional
        Where to draw; by default a new figure.

    Raises
    ------
    DataError
        The run holds no loss.
    """
    ax = _over_rounds(
        run,
        ax,
        {
            "test_loss": ("server’s test set", BLUE),
            "evaluate_loss": ("clients’ held-out data", VERMILION),
            "train_loss": ("clients’ training", GREEN),
        },
        (0.0, math.inf),
    )
    _titles(ax, "Loss over rounds", "Round", "Loss")
    return ax


def client_accuracies_by_round(run: RunFolder, ax: Axes | None = None) -> Axes:
    """Draw how the clients' accuracies spread, round by round.

    The line is the median client; the bands hold half, and four fifths, of them (all
    where they are ten or fewer).

    Parameters
    ----------
    run : RunFolder
        What to draw.
    ax : Axes, optional
        Where to draw; by default a new figure.

    Raises
    ------
    DataError
        No client was evaluated.
    """
    frame = _clients_accuracy(run)
    rounds = frame.index.to_numpy()
    few = int(frame.count(axis=1).max()) <= FEW
    low, quarter, median, three, high = _quantiles(frame.to_numpy(), few)
    ax = ax or _new_axes(HALF, 3.1)
    marker = "o" if len(rounds) < 3 else ""
    ax.fill_between(rounds, low, high, color=BLUE, alpha=0.16, linewidth=0)
    ax.fill_between(rounds, quarter, three, color=BLUE, alpha=0.30, linewidth=0)
    ax.plot(rounds, median, color=BLUE, linewidth=1.8, marker=marker, markersize=4)
    _limits(ax, np.concatenate([low, high]), (0.0, 1.0))
    _round_axis(ax, rounds.min(), rounds.max())
    _titles(ax, "Clients’ accuracies over rounds", "Round", "Accuracy")
    _percent(ax.yaxis)
    _label_ends(
        ax,
        [
            (low[-1], "worst client" if few else "worst 10 %", MUTED),
            (median[-1], "median client", BLUE),
            (high[-1], "best client" if few else "best 10 %", MUTED),
        ],
    )
    _style(ax)
    return ax


# ---------------------------------------------------------------------------- weights


def weights_heatmap(
    run: RunFolder, ax: Axes | None = None, order: str = "number"
) -> Axes:
    """Draw how much each client counted in each round.

    The colour is the client's weight relative to the uniform weight, one over the
    number of clients that counted in the round, on a logarithmic scale: cream is
    uniform, orange counts for more, blue for less, grey took no part.

    Parameters
    ----------
    run : RunFolder
        What to draw.
    ax : Axes, optional
        Where to draw; by default a new figure.
    order : {"number", "size"}
        Clients by number, or those with most data first.

    Raises
    ------
    DataError
        The run holds no weights.
    """
    check_choice("order", order, ["number", "size"])
    clients = _ordered_clients(run, order)
    weights = _weights(run)
    weights = weights.reindex(
        index=range(1, max(run.rounds_done, int(weights.index.max())) + 1),
        columns=clients,
    )
    values = weights.to_numpy().T
    counted = np.isfinite(values).sum(axis=0)
    relative = values * np.where(counted, counted, np.nan)
    relative, rows, columns = _block_means(relative)

    # Weights at or below zero have no logarithm: they stand at the scale's low end.
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(relative > 0, np.log2(relative), -np.inf)
    logs[np.isnan(relative)] = np.nan
    limit = _scale_limit(logs)
    cells = relative.shape
    ax = ax or _new_axes(FULL, _height(cells[0]))
    image = _image(
        ax,
        np.clip(logs, -limit, limit),
        _diverging(),
        (-limit, limit),
        (0.5, weights.shape[0] + 0.5, len(clients) - 0.5, -0.5),
    )
    ax.set_facecolor(MISSING)
    _titles(
        ax,
        "How much each client counted",
        "Round" + _averaged(columns, "rounds"),
        ("Client" if order == "number" else "Client, most data first")
        + _averaged(rows, "clients"),
    )
    _round_axis(ax, 0.5, weights.shape[0] + 0.5, margin=0)
    _client_ticks(ax.yaxis, run, clients, order)
    _style(ax, grid=None)
    _cell_lines(ax, *relative.shape)

    finite = logs[~np.isnan(logs)]
    ticks, labels = _ratio_ticks(
        limit, bool((finite < -limit).any()), bool((finite > limit).any())
    )
    uniform = set(counted[counted > 0].tolist())
    share = f" = {1 / uniform.pop():.3g}" if len(uniform) == 1 else ""
    _colour_bar(ax, image, ticks, labels, f"weight ÷ uniform weight 1/K{share}")
    if np.isnan(values).any():
        _name_missing(ax)
    return ax


def weight_vs_size(
    run: RunFolder, ax: Axes | None = None, round: int | None = None
) -> Axes:
    """Draw the clients' weights against their shares of the data in one round.

    On the diagonal a client counts by its data, as in FedAvg; on the horizontal line
    all clients count the same. The clients farthest from the diagonal are named.

    Parameters
    ----------
    run : RunFolder
        What to draw.
    ax : Axes, optional
        Where to draw; by default a new figure.
    round : int, optional
        By default the last round with weights.

    Raises
    ------
    DataError
        The run holds no weights, or none in that round; or it is not known how much
        data the clients hold.
    """
    weights = _weights(run)
    number = int(weights.index.max()) if round is None else round
    if number not in weights.index:
        raise DataError(f"{run.folder} holds no weights of round {number}.")
    row = weights.loc[number].dropna()
    clients, weight = row.index.to_numpy(), row.to_numpy(dtype=float)
    share = data_shares(run, number, clients)
    if np.isnan(share).any():
        raise DataError(f"{run.folder} does not say how much data the clients hold.")

    ax = ax or _new_axes(HALF, 3.9)
    top = 1.08 * max(float(share.max()), float(weight.max()), 1 / len(weight))
    bottom = min(0.0, 1.08 * float(weight.min()))
    ax.plot(
        [0, top],
        [0, top],
        color=MUTED,
        linewidth=1,
        dashes=(5, 3),
        zorder=1,
        label="weight = share of data (FedAvg)",
    )
    ax.axhline(
        1 / len(weight),
        color=MUTED,
        linewidth=1,
        dashes=(1, 2),
        zorder=1,
        label=f"all alike, 1/{len(weight)}",
    )
    alike = np.abs(weight - share) <= 0.01 * share
    size = float(np.clip(35 / math.sqrt(len(weight)), 3, 6.5))
    for mask, colour, label in (
        (~alike & (weight > share), VERMILION, "counts for more than its data"),
        (~alike & (weight < share), BLUE, "counts for less than its data"),
        (alike, MUTED, "counts for its data, within 1 %"),
    ):
        if not mask.any():
            continue
        ax.plot(
            share[mask],
            weight[mask],
            linestyle="",
            marker="o",
            markersize=size,
            markerfacecolor=colour,
            markeredgecolor=PAPER,
            markeredgewidth=0.5 if len(weight) <= 300 else 0,
            alpha=0.85,
            label=label,
            clip_on=False,  # A dot at zero is a whole dot.
        )
    ax.set_xlim(0, top)
    ax.set_ylim(bottom, top)
    far = np.argsort(-np.abs(weight - share), kind="stable")[:3]
    named: list[int] = []
    for index in far[np.abs(weight - share)[far] > 0.02 * top]:
        # A name that would cover another one is left out.
        if any(
            abs(weight[index] - weight[other]) < 0.06 * top
            and abs(share[index] - share[other]) < 0.25 * top
            for other in named
        ):
            continue
        named.append(index)
        above = weight[index] > share[index]
        ax.annotate(
            _shortened(run.called([clients[index]])),
            (share[index], weight[index]),
            xytext=(-5, 3) if above else (5, -3),
            textcoords="offset points",
            ha="right" if above and share[index] > 0.15 * top else "left",
            va="bottom" if above else "top",
            fontsize=8,
            color=INK,
        )
    ax.legend(
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.16),
        ncols=2,
        fontsize=8,
        frameon=False,
        labelcolor=MUTED,
        handlelength=1.8,
        columnspacing=1.2,
        handletextpad=0.5,
    )
    _titles(
        ax,
        f"Weight against data, round {number}",
        f"Share of the round’s data ({len(weight)} clients)",
        "Weight",
    )
    _style(ax)
    return ax


# ---------------------------------------------------------------------------- clients


def client_accuracies(run: RunFolder, ax: Axes | None = None) -> Axes:
    """Draw every client's accuracy in the last evaluated round, worst first.

    Parameters
    ----------
    run : RunFolder
        What to draw.
    ax : Axes, optional
        Where to draw; by default a new figure.

    Raises
    ------
    DataError
        No client was evaluated.
    """
    frame = _clients_accuracy(run)
    number = int(frame.index[-1])
    values = np.sort(frame.iloc[-1].dropna().to_numpy(dtype=float))
    count = len(values)
    tenth = max(1, math.ceil(count / 10))
    ranks = np.arange(1, count + 1)

    ax = ax or _new_axes(HALF, 3.1)
    ax.axvspan(0.5, tenth + 0.5, color=VERMILION, alpha=0.12, linewidth=0)
    ax.axhline(values.mean(), color=MUTED, linewidth=1, dashes=(5, 3))
    many = count > 400  # dots would merge into a line, and cost a lot of space
    last = ranks <= tenth
    for mask, colour in ((last, VERMILION), (~last, BLUE)):
        ax.plot(
            ranks[mask],
            values[mask],
            linestyle="-" if many else "",
            linewidth=2.2,
            marker="" if many else "o",
            markersize=float(np.clip(90 / count, 2.5, 5.5)),
            color=colour,
            markeredgewidth=0,
        )
    _limits(ax, values, (0.0, 1.0))
    ax.set_xlim(0.5 - 0.02 * count, count + 0.5 + 0.02 * count)
    low, _ = ax.get_ylim()
    worst = _per_cent(_recorded(run, number, "worst10", values[:tenth]))
    ax.annotate(
        f"worst {'client' if count <= FEW else '10 %'}: {worst}",
        (tenth + 0.5, low),
        xytext=(5, 6),
        textcoords="offset points",
        fontsize=8.5,
        color=VERMILION,
    )
    ax.annotate(
        f"mean {_per_cent(float(values.mean()))}",
        (1.0, float(values.mean())),
        xycoords=("axes fraction", "data"),
        xytext=(-4, -11),
        textcoords="offset points",
        ha="right",
        fontsize=8.5,
        color=MUTED,
    )
    _titles(
        ax,
        f"Clients’ accuracies, round {number}",
        f"The {count} evaluated clients, worst to best",
        "Accuracy on held-out data",
    )
    _integer(ax.xaxis)
    _percent(ax.yaxis)
    _style(ax)
    return ax


def labels(run: RunFolder, ax: Axes | None = None, order: str = "number") -> Axes:
    """Draw which classes each client holds, and how much data above.

    The colour is the class's share of the client's training data. It grows with the
    share's square root, so that small shares stay visible.

    Parameters
    ----------
    run : RunFolder
        What to draw.
    ax : Axes, optional
        Where to draw; by default a new figure.
    order : {"number", "size"}
        Clients by number, or those with most data first.

    Raises
    ------
    DataError
        The partition holds no classes.
    """
    check_choice("order", order, ["number", "size"])
    columns = label_columns(run.partition)
    if not columns or run.partition.empty:
        raise DataError(f"{run.folder / 'partition.csv'} holds no classes.")
    clients = _ordered_clients(run, order)
    counts = (
        run.partition.set_index("client")
        .reindex(clients)[columns]
        .to_numpy(dtype=float, na_value=0.0)
        .T
    )
    sizes = counts.sum(axis=0)
    if sizes.sum() == 0:
        raise DataError(f"{run.folder / 'partition.csv'} holds no examples.")
    shares = counts / np.where(sizes > 0, sizes, np.nan)
    blocks, rows, merged = _block_means(shares)
    names = run.class_names

    ax = ax or _new_axes(FULL, 0.8 + _height(len(columns), 0.24, 1.0, 4.2))
    top = float(np.nanmax(blocks))
    image = _image(
        ax,
        np.sqrt(blocks),
        _sequential(),
        (0.0, math.sqrt(top)),
        (-0.5, len(clients) - 0.5, len(columns) - 0.5, -0.5),
    )
    ax.set_facecolor(PAPER)
    _titles(
        ax,
        "Which classes each client holds",
        ("Client" if order == "number" else "Client, most data first")
        + _averaged(merged, "clients"),
        "Class" + _averaged(rows, "classes"),
    )
    _client_ticks(ax.xaxis, run, clients, order)
    if len(names) <= 20:
        ax.set_yticks(range(len(names)), [_shortened(name) for name in names])
    else:
        _integer(ax.yaxis)
    _style(ax, grid=None)
    _cell_lines(ax, *blocks.shape)

    bars = ax.inset_axes((0.0, 0.06, 1.0, 0.5), transform=_above(ax))
    edges = np.arange(len(clients) + 1) - 0.5
    bars.stairs(sizes, edges, fill=True, color=MUTED, alpha=0.55, linewidth=0)
    bars.set_xlim(ax.get_xlim())
    bars.set_ylim(0, 1.05 * max(float(sizes.max()), 1.0))
    bars.set_xticks([])
    bars.set_yticks([0, int(sizes.max())])
    bars.set_ylabel("Examples", fontsize=9, color=INK)
    bars.set_title(ax.get_title(loc="left"), **_TITLE)
    ax.set_title("", loc="left")
    _style(bars, grid=None)
    bars.spines["bottom"].set_visible(False)

    ticks = [share for share in (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0) if share < top]
    ticks.append(top)
    _colour_bar(
        ax,
        image,
        [math.sqrt(tick) for tick in ticks],
        [f"{tick:.0%}".replace("%", " %") for tick in ticks],
        "share of the client’s data",
    )
    return ax


# ------------------------------------------------------------------ the method's own


def recorded(run: RunFolder) -> Figure:
    """Draw what the method itself recorded of each round, a panel a number.

    A number of the round is a line. Of a number of each client the line is the median
    client, and the band holds four fifths of them (all where they are ten or fewer).

    Parameters
    ----------
    run : RunFolder
        What to draw; the first twelve of its numbers.

    Raises
    ------
    DataError
        The method recorded nothing of its own.
    """
    frames = _own_numbers(run)
    if not frames:
        raise DataError(f"the strategy '{run.strategy}' recorded nothing of its own.")
    shown = dict(list(frames.items())[:_MOST_PANELS])
    across = min(max(len(shown), 2), 4)
    lines = math.ceil(len(shown) / across)
    figure = _figure_class()(
        figsize=(FULL, 2.1 * lines), layout="constrained", facecolor=PAPER
    )
    panels = figure.subplots(lines, across, squeeze=False).ravel()
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    for panel, (name, frame) in zip(panels, shown.items(), strict=False):
        low, _, middle, _, high = _quantiles(
            frame.to_numpy(dtype=float), frame.shape[1] <= FEW
        )
        rounds = frame.index.to_numpy()
        marker = "o" if len(rounds) < 3 else ""
        panel.set_facecolor("none")
        panel.fill_between(rounds, low, high, color=BLUE, alpha=0.2, linewidth=0)
        panel.plot(
            rounds, middle, color=BLUE, linewidth=1.6, marker=marker, markersize=4
        )
        _limits(panel, np.concatenate([low, high]), (-math.inf, math.inf))
        _round_axis(panel, float(rounds.min()), float(rounds.max()))
        whose = " of a client" if frame.shape[1] > 1 else ""
        panel.set_title(
            f"{_readable(name)}{whose}", loc="left", fontsize=9.5, color=INK
        )
        panel.set_xlabel("Round", fontsize=9, color=INK)
        _style(panel)
    if len(frames) > len(shown):
        figure.supxlabel(
            f"{len(frames) - len(shown)} more in rounds.csv and clients.csv",
            fontsize=8.5,
            color=MUTED,
        )
    return figure


def _own_numbers(run: RunFolder) -> dict[str, Any]:
    """Return the method's numbers as frames ``[rounds, 1 or clients]``, by column."""
    rounds = run.rounds.set_index("round").select_dtypes("number")
    frames = {name: rounds[[name]] for name in rounds if name not in ROUND_COLUMNS}
    if (run.folder / "clients.csv").is_file():
        numbers = run.clients.select_dtypes("number")
        own = [name for name in numbers if name not in CLIENT_COLUMNS]
        # What all clients have says more than the mean of it.
        frames |= {name: run.by_number(str(name)) for name in own}
    finite = {
        str(name): frame.astype(float).where(np.isfinite(frame.astype(float)))
        for name, frame in frames.items()
    }
    known = {name: frame.dropna(how="all") for name, frame in finite.items()}
    return {name: frame for name, frame in known.items() if not frame.empty}


# -------------------------------------------------------------------- what they share


def figure_of(ax: Axes) -> Figure:
    """Return the figure that axes belong to."""
    from matplotlib.figure import Figure

    figure = ax.get_figure(root=True)
    if not isinstance(figure, Figure):
        raise TypeError("the axes belong to no figure")
    return figure


_TITLE: dict[str, Any] = {
    "loc": "left",
    "fontsize": 11,
    "fontweight": "bold",
    "color": INK,
    "pad": 9,
}


@cache
def _figure_class() -> type[Figure]:
    from io import BytesIO

    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        """A figure that shows itself in a notebook, without pyplot."""

        def _repr_png_(self) -> bytes:
            buffer = BytesIO()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph .* missing from")
                self.savefig(buffer, format="png", dpi=144, facecolor=PAPER)
            return buffer.getvalue()

    return NotebookFigure


def _new_axes(width: float, height: float) -> Axes:
    figure = _figure_class()(
        figsize=(width, height), layout="constrained", facecolor=PAPER
    )
    ax = figure.add_subplot()
    ax.set_facecolor("none")
    return ax


def _style(ax: Axes, grid: str | None = "y") -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(MUTED)
        ax.spines[side].set_linewidth(0.7)
    ax.tick_params(colors=MUTED, labelsize=8.5, width=0.7, length=3)
    if grid == "y":
        ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)


def _above(ax: Axes) -> Transform:
    """Return coordinates above axes: 0 to 1 from left to right, inches from their top.

    What is measured in shares of the axes' height is cut off where they are low: the
    layout makes room for it before it knows how high they are.
    """
    from matplotlib.transforms import ScaledTranslation, blended_transform_factory

    top = ScaledTranslation(0, 1, ax.transAxes)  # type: ignore[arg-type]
    return blended_transform_factory(ax.transAxes, figure_of(ax).dpi_scale_trans + top)


def _titles(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, **_TITLE)
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)


def _integer(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(
        MaxNLocator(nbins=9, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    )


def _percent(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def _per_cent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _round_axis(ax: Axes, low: float, high: float, margin: float = 0.02) -> None:
    space = margin * max(high - low, 1)
    ax.set_xlim(low - space, high + space)
    _integer(ax.xaxis)


def _limits(ax: Axes, values: Array, bounds: tuple[float, float]) -> None:
    """Give the values some air, but none beyond what is possible."""
    finite = values[np.isfinite(values)]
    low, high = float(finite.min()), float(finite.max())
    air = 0.06 * (high - low) or 0.05 * max(abs(high), 0.1)
    # A dot or a line at the very bound still needs its own thickness.
    edge = 0.25 * air
    ax.set_ylim(max(low - air, bounds[0] - edge), min(high + air, bounds[1] + edge))


def _over_rounds(
    run: RunFolder,
    ax: Axes | None,
    columns: dict[str, tuple[str, str]],
    bounds: tuple[float, float],
) -> Axes:
    rounds = run.rounds["round"].to_numpy()
    series = []
    for column, (label, colour) in columns.items():
        if column not in run.rounds:
            continue
        values = run.rounds[column].to_numpy(dtype=float)
        known = np.isfinite(values)
        if known.any():
            series.append((rounds[known], values[known], label, colour))
    if not series:
        raise DataError(
            f"{run.folder / 'rounds.csv'} holds nothing of {', '.join(columns)}."
        )
    ax = ax or _new_axes(HALF, 3.1)
    for x, y, label, colour in reversed(series):
        marker = "o" if len(x) < 3 else ""
        ax.plot(
            x, y, color=colour, linewidth=1.8, marker=marker, markersize=4, label=label
        )
    _limits(ax, np.concatenate([y for _, y, _, _ in series]), bounds)
    _round_axis(ax, rounds.min(), rounds.max())
    _mark_failed(run, ax, 0.0 if bounds[1] == 1.0 else 1.0)
    _label_ends(ax, [(float(y[-1]), label, colour) for _, y, label, colour in series])
    _style(ax)
    return ax


def _mark_failed(run: RunFolder, ax: Axes, height: float) -> None:
    """Shade failed rounds, and say so once, at the bottom (0) or the top (1)."""
    if "status" not in run.rounds:
        return
    failed = run.rounds.loc[run.rounds["status"] == "failed", "round"]
    half = max(0.5, run.rounds_done / 400)
    for number in failed:
        ax.axvspan(number - half, number + half, color=MISSING, linewidth=0, zorder=0)
    if len(failed):
        late = failed.iloc[0] > 0.7 * run.rounds_done
        ax.annotate(
            "round failed" if len(failed) == 1 else f"{len(failed)} rounds failed",
            (failed.iloc[0] + (-half if late else half), height),
            xycoords=("data", "axes fraction"),
            xytext=(-3 if late else 3, 4 if height == 0 else -4),
            textcoords="offset points",
            ha="right" if late else "left",
            va="bottom" if height == 0 else "top",
            fontsize=8,
            color=MUTED,
        )


def _label_ends(ax: Axes, lines: Sequence[tuple[float, str, str]]) -> None:
    """Name lines at their right ends, moved apart where they would overlap."""
    low, high = ax.get_ylim()
    figure = figure_of(ax)
    points = 72 * figure.get_size_inches()[1] * ax.get_position().height
    gap = 11.5 / max(float(points), 1.0)
    ordered = sorted(lines, key=lambda line: line[0])
    places: list[float] = []
    for value, _, _ in ordered:
        place = (value - low) / (high - low)
        places.append(max(place, places[-1] + gap) if places else place)
    # What was pushed up moves down again as one, so that a crowd stays centred.
    shift = sum(
        place - (line[0] - low) / (high - low)
        for place, line in zip(places, ordered, strict=True)
    ) / len(places)
    shift = min(max(shift, places[-1] - 1.0), max(places[0], 0.0))
    for place, (_, label, colour) in zip(places, ordered, strict=True):
        ax.annotate(
            label,
            (1.0, place - shift),
            xycoords="axes fraction",
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=colour,
            annotation_clip=False,
        )


def _weights(run: RunFolder) -> Any:
    weights = run.weights_by_number
    if weights.empty:
        raise DataError(
            f"{run.folder / 'clients.csv'} holds no weights: no round succeeded, or "
            f"the strategy '{run.strategy}' aggregates without weights."
        )
    return weights


def _clients_accuracy(run: RunFolder) -> Any:
    frame = run.by_number("accuracy")
    if frame.empty:
        raise DataError(f"{run.folder / 'clients.csv'} holds no client's accuracy.")
    return frame


def _quantiles(values: Array, few: bool) -> Array:
    """Return what bounds the bands over clients, ``[5, rounds]``, the median third."""
    ends = (0.0, 1.0) if few else (0.1, 0.9)
    shares = [ends[0], 0.25, 0.5, 0.75, ends[1]]
    return np.asarray(np.nanquantile(values, shares, axis=1))


def _recorded(run: RunFolder, number: int, statistic: str, values: Array) -> float:
    """Return what the round's record says; without it the mean of the values."""
    column = f"client_accuracy_{statistic}"
    if column in run.rounds:
        found = run.rounds.loc[run.rounds["round"] == number, column].dropna()
        if len(found):
            return float(found.iloc[-1])
    return float(values.mean())


def _ordered_clients(run: RunFolder, order: str) -> list[int]:
    """Return every client's number, by number or by falling size of its data."""
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


# -------------------------------------------------------------------------- heat maps


def _block_means(values: Array) -> tuple[Array, int, int]:
    """Average blocks of a matrix that has more cells than can be seen."""
    rows = math.ceil(values.shape[0] / _MAX_ROWS)
    columns = math.ceil(values.shape[1] / _MAX_COLUMNS)
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


def _averaged(merged: int, what: str) -> str:
    return f" (a cell is the mean of {merged} {what})" if merged > 1 else ""


def _image(
    ax: Axes,
    values: Array,
    colours: Colormap,
    limits: tuple[float, float],
    extent: tuple[float, float, float, float],
) -> AxesImage:
    rows, columns = values.shape
    # The last block may reach beyond the last client or round; the axes cut it off.
    left, right, bottom, top = extent
    width = math.ceil(round(abs(right - left)) / columns) * columns
    height = math.ceil(round(abs(bottom - top)) / rows) * rows
    image = ax.imshow(
        np.ma.masked_invalid(values),
        cmap=colours,
        vmin=limits[0],
        vmax=limits[1],
        extent=(left, left + width, top + height, top),
        aspect="auto",
        interpolation="none",
    )
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    return image


def _height(
    rows: int, each: float = 0.15, least: float = 1.8, most: float = 4.2
) -> float:
    return 0.9 + min(max(each * rows, least), most)


def _cell_lines(ax: Axes, rows: int, columns: int) -> None:
    """Part the cells by thin lines where there is room for them."""
    if rows > 50 or columns > 60:
        return
    left = ax.get_xlim()[0]
    for row in range(1, rows):
        ax.axhline(row - 0.5, color=PAPER, linewidth=1)
    for column in range(1, columns):
        ax.axvline(left + column, color=PAPER, linewidth=1)


def _client_ticks(
    axis: Any, run: RunFolder, clients: Sequence[int], order: str
) -> None:
    numbered = order == "number" and clients == list(range(len(clients)))
    if len(clients) > 20 and numbered and not run.names:
        _integer(axis)
        return
    step = math.ceil(len(clients) / 20)
    names = [_shortened(run.name_of(client)) for client in clients[::step]]
    axis.set_ticks(range(0, len(clients), step), names)
    if axis.axis_name == "x" and sum(map(len, names)) > 90:
        axis.set_tick_params(labelrotation=45)
        for label in axis.get_ticklabels():
            label.set(ha="right", rotation_mode="anchor")


def _scale_limit(logs: Array) -> float:
    """Return the smallest round limit that holds nearly all of the logarithms."""
    finite = np.abs(logs[np.isfinite(logs)])
    reach = float(np.quantile(finite, 0.98)) if finite.size else 0.0
    choices = [math.log2(1.1), math.log2(1.25), 0.5, 1.0, 2.0, 3.0, 4.0]
    return next((limit for limit in choices if limit >= reach), 5.0)


def _ratio_ticks(
    limit: float, below: bool, above: bool
) -> tuple[list[float], list[str]]:
    half = limit / 2 if limit in (2.0, 4.0) else (1.0 if limit > 1 else None)
    ticks = [-limit, 0.0, limit]
    if half is not None:
        ticks = [-limit, -half, 0.0, half, limit]
    marks = []
    for tick in ticks:
        ratio = 2.0 ** abs(tick)
        number = f"{ratio:.3g}"
        marks.append(f"÷ {number}" if tick < 0 else f"× {number}")
    marks[len(ticks) // 2] = "uniform"
    marks[0] = f"{marks[0]} or less" if below else marks[0]
    marks[-1] = f"{marks[-1]} or more" if above else marks[-1]
    return ticks, marks


@cache
def _diverging() -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    colours = [
        "#123c6b",
        "#2f78b7",
        "#8fc0dd",
        "#fbf2cf",
        "#f3b066",
        "#cf5a18",
        "#7a2405",
    ]
    # 64 steps are as many as the eye tells apart, and half the size in the report.
    return LinearSegmentedColormap.from_list("weight", colours, N=65).with_extremes(
        bad=(0, 0, 0, 0)
    )


@cache
def _sequential() -> Colormap:
    """From nothing to blue: the background, light or dark, is the scale's zero."""
    from matplotlib.colors import LinearSegmentedColormap

    ends = [(0.12, 0.5, 0.82, 0.0), (0.10, 0.46, 0.78, 1.0)]
    return LinearSegmentedColormap.from_list("share", ends, N=64).with_extremes(
        bad=(0, 0, 0, 0)
    )


def _colour_bar(
    ax: Axes,
    image: AxesImage,
    ticks: Sequence[float],
    names: Sequence[str],
    title: str,
) -> None:
    """Draw the scale beside the axes; as one small image, which stays small in SVG."""
    low, high = image.get_clim()
    points = 0.68 * 72 * float(figure_of(ax).get_size_inches()[1])
    length = max(1 - 38 / points, 0.5)
    kept = [0]
    for place in range(1, len(ticks)):
        last = place == len(ticks) - 1
        gap = 12 * (ticks[-1] - ticks[0]) / (length * points)
        if last or min(ticks[place] - ticks[kept[-1]], ticks[-1] - ticks[place]) > gap:
            kept.append(place)
    bar = ax.inset_axes((1.015, 0.0, 0.014, length))
    bar.imshow(
        np.linspace(low or 0.0, high or 1.0, 64)[:, None],
        cmap=image.get_cmap(),
        vmin=low,
        vmax=high,
        extent=(0, 1, low or 0.0, high or 1.0),
        origin="lower",
        aspect="auto",
        interpolation="none",
    )
    bar.set_xticks([])
    bar.yaxis.tick_right()
    bar.set_yticks([ticks[i] for i in kept], [names[i] for i in kept])
    bar.tick_params(colors=MUTED, labelsize=8.5, width=0.7, length=3)
    for spine in bar.spines.values():
        spine.set_visible(False)
    ax.annotate(
        title.replace(" weight 1/K", "\nweight 1/K").replace("client’s", "\nclient’s"),
        (1.015, 1.0),
        xycoords="axes fraction",
        va="top",
        fontsize=8.5,
        color=INK,
        annotation_clip=False,
    )


def _name_missing(ax: Axes) -> None:
    from matplotlib.patches import Patch

    ax.legend(
        handles=[Patch(facecolor=MISSING, edgecolor=MUTED, linewidth=0.4)],
        labels=["took no part"],
        loc="lower right",
        bbox_to_anchor=(1.005, 0.99),
        fontsize=8.5,
        frameon=False,
        labelcolor=MUTED,
        handlelength=1.1,
        handleheight=0.9,
        borderpad=0.2,
    )


def _readable(name: object) -> str:
    return _shortened(str(name).replace("_", " "), 40)


def _shortened(name: str, length: int = 16) -> str:
    """Return a name that fits, with no dollar that would begin a formula."""
    return plain(name, length).replace("$", r"\$")
