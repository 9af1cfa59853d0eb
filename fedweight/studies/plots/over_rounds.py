"""Figures of what a run measured round by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...core.errors import DataError, closest
from ...core.extras import Imported
from ...core.texts import listed
from ...metrics.measures import MEASURES
from ..columns import CLIENT_COLUMNS, ROUND_COLUMNS
from ..reader import RunFolder
from . import style
from .style import BLUE, FEW, GREEN, VERMILION, Array, finished, short

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd
else:
    alt = Imported("altair", "studies", "a plot")

_PLACES = {
    "test": ("server’s test set", BLUE),
    "evaluate": ("clients’ held-out data", VERMILION),
    "train": ("clients’ training", GREEN),
}
COLOURS = dict(_PLACES.values())

# What a client's own model reached: it is drawn beside what the global one did.
PERSONAL = {"personal_accuracy": "accuracy", "personal_loss": "loss"}


def called(measure: str) -> str:
    """Return what a measure is called where a reader sees it.

    Examples
    --------
    >>> called("macro_f1"), called("rmse"), called("test_loss")
    ('Macro F1', 'RMSE', 'Test loss')
    """
    known = {"rmse": "RMSE", "r2": "R²", "auc": "AUC", "f1": "F1", "iou": "IoU"}
    words = [known.get(word, word) for word in measure.split("_")]
    return words[0][:1].upper() + " ".join(words)[1:]


def better(measure: str) -> int:
    """Return 1 where more of a measure is better, -1 where less, 0 for neither.

    Examples
    --------
    >>> better("accuracy"), better("rmse"), better("auc_error")
    (1, -1, 0)
    """
    found = MEASURES.get(PERSONAL.get(measure, measure).replace("_", "-"))
    return 0 if found is None else found.sign


def bounds(measure: str) -> tuple[float, float]:
    """Return between what a measure lies."""
    found = MEASURES[measure.replace("_", "-")]
    return (max(found.low, 0.0) if measure == "loss" else found.low, found.high)


def measures(run: RunFolder) -> list[str]:
    """Return what a run measured over the rounds, loss and accuracy first."""
    names = [name.replace("-", "_") for name in MEASURES if name != "confusion"]
    known = [name for name in names if better(name) and _series(run, name)]
    first = [name for name in ("accuracy", "loss") if name in known]
    return first + [name for name in known if name not in first]


def over_rounds(run: RunFolder, measure: str = "accuracy") -> alt.LayerChart:
    """Draw what a measure of the global model was, round by round.

    Parameters
    ----------
    run : RunFolder
        What to draw.
    measure : str
        ``"accuracy"``, ``"loss"``, ``"rmse"``, ... as in the columns ``test_rmse`` and
        ``evaluate_rmse``.

    Raises
    ------
    DataError
        The run holds nothing of it.
    """
    series = _series(run, measure)
    if not series:
        raise DataError(f"{run.folder / 'rounds.csv'} holds nothing of {measure}.")
    failed = failed_rounds(run)
    drawn = style.lines(
        series,
        COLOURS,
        called(measure),
        percent=measure == "accuracy",
        bounds=bounds(measure) if measure in ("accuracy", "loss") else (-1e300, 1e300),
        shaded=failed,
    )
    words = style.failed_words(failed)
    return finished(drawn, f"{called(measure)} over rounds", words, height=250)


def _series(run: RunFolder, measure: str) -> dict[str, list[tuple[int, float]]]:
    series = {}
    for place, (label, _) in _PLACES.items():
        values = run.measured(f"{place}_{measure}")
        if len(values):
            series[label] = list(zip(values.index.tolist(), values, strict=True))
    return series


def failed_rounds(run: RunFolder) -> list[tuple[int, str]]:
    """Return the rounds that failed, and why."""
    if "status" not in run.rounds:
        return []
    rows = run.rounds[run.rounds["status"] == "failed"]
    reasons = rows["reason"] if "reason" in rows else [""] * len(rows)
    return [(int(n), str(why)) for n, why in zip(rows["round"], reasons, strict=True)]


def clients_by_round(run: RunFolder, measure: str = "accuracy") -> alt.LayerChart:
    """Draw how a measure spreads over the clients, round by round.

    The line is the median client; the bands hold half, and four fifths, of them (all
    where they are ten or fewer).

    Parameters
    ----------
    run : RunFolder
        What to draw.
    measure : str
        A column of ``clients.csv``, such as ``"accuracy"`` or ``"rmse"``.

    Raises
    ------
    DataError
        No client was evaluated so.
    """
    frame = client_values(run, measure)
    frame = frame.iloc[style.thinned(len(frame), style.MOST_ROUNDS)]
    few = int(frame.count(axis=1).max()) <= FEW
    bands = quantiles(frame.to_numpy(), few)
    sign = better(measure) or 1
    order = np.where(np.isfinite(frame), sign * frame, np.inf)
    worst, best = order.argmin(axis=1), np.where(order == np.inf, -np.inf, order)
    best = best.argmax(axis=1)
    clients = [run.name_of(int(client)) for client in frame.columns]
    rows = []
    for place, number in enumerate(frame.index.tolist()):
        row = {key: short(bands[k, place]) for k, key in enumerate("abcde")}
        row |= {"round": number, "worst": clients[worst[place]]}
        rows.append(row | {"best": clients[best[place]]})
    percent = measure.endswith("accuracy")
    domain = style.limits(
        [row[key] for row in rows for key in "ae"],
        (0.0, 1.0) if percent else (-1e300, 1e300),
    )
    base = alt.Chart(style.data_of(rows))
    x = style.rounds_axis([rows[0]["round"] - 0.2, rows[-1]["round"] + 0.2])
    drawn: list[alt.Chart] = [
        base.mark_area(color=BLUE, opacity=opacity, clip=True).encode(
            x=x,
            y=style.value_axis(low, called(measure), domain, percent=percent),
            y2=high,
        )
        for low, high, opacity in (("a", "e", 0.16), ("b", "d", 0.3))
    ]
    y = style.value_axis("c", called(measure), domain, percent=percent)
    alone = len(rows) < 3
    median = base.mark_line(color=BLUE, strokeWidth=2, clip=True, point=alone)
    low, high = ends(few)
    told = [
        style.number("e", high, percent=percent),
        style.number("c", "median client", percent=percent),
        style.number("a", low, percent=percent),
        alt.Tooltip("best:N", title="best client"),
        alt.Tooltip("worst:N", title="worst client"),
    ]
    drawn += [style.zoomable(median.encode(x=x, y=y))]
    return finished(
        style.layered(*drawn, style.at_pointer(base, told)),
        f"{_plural(measure)} over rounds",
        "The line is the median client; the dark band holds the middle half of the "
        f"clients, the light one {'all of them' if few else 'the middle four fifths'}.",
        height=250,
    )


def _plural(measure: str) -> str:
    if measure == "accuracy":
        return "Clients’ accuracies"
    name = called(measure)
    return f"Clients’ {name if name[1:2].isupper() or name == 'R²' else name.lower()}"


def client_values(run: RunFolder, measure: str) -> pd.DataFrame:
    """Return a measure of all clients as ``[rounds, clients]``, or say it is missing.

    Raises
    ------
    DataError
        No client was evaluated so.
    """
    path = run.folder / "clients.csv"
    if path.is_file():
        frame = run.by_number(measure)
        frame = frame.where(np.isfinite(frame)).dropna(how="all")
        if not frame.empty:
            return frame
    raise DataError(f"{path} holds no client's {measure}.")


def client_measure(run: RunFolder) -> str:
    """Return what tells how the clients fare: accuracy, or what was measured instead.

    Raises
    ------
    DataError
        Nothing was measured of single clients.
    """
    if (run.folder / "clients.csv").is_file():
        names = [name.replace("-", "_") for name in MEASURES if name != "loss"]
        for name in ("accuracy", *names, "loss"):
            known = name in run.clients and run.clients[name].notna().any()
            if known and better(name):
                return name
    raise DataError(f"{run.folder / 'clients.csv'} holds no client's accuracy.")


def quantiles(values: Array, few: bool) -> Array:
    """Return what bounds the bands over clients, ``[5, rounds]``, the median third."""
    ends = (0.0, 1.0) if few else (0.1, 0.9)
    shares = [ends[0], 0.25, 0.5, 0.75, ends[1]]
    return np.asarray(np.nanquantile(values, shares, axis=1))


def ends(few: bool) -> tuple[str, str]:
    """Return what bounds the outer band, below and above."""
    return ("lowest", "highest") if few else ("a tenth is below", "a tenth is above")


def personal(run: RunFolder) -> alt.LayerChart:
    """Draw how the clients' own models do beside the global one, round by round.

    Raises
    ------
    DataError
        No client has a personal model, or none was evaluated.
    """
    for column, measure in PERSONAL.items():
        if (run.folder / "clients.csv").is_file() and column in run.clients:
            frames = {"personal models": run.by_number(column)}
            frames["global model"] = run.by_number(measure)
            series = {
                label: list(zip(f.index.tolist(), f.mean(axis=1), strict=True))
                for label, f in frames.items()
                if not f.empty
            }
            if "personal models" not in series:
                continue
            drawn = style.lines(
                series,
                {"personal models": VERMILION, "global model": BLUE},
                f"Clients’ mean {measure}",
                percent=measure == "accuracy",
                bounds=bounds(measure),
            )
            title = f"Personal models’ {measure} over rounds"
            return finished(drawn, title, height=250)
    raise DataError(f"{run.folder} holds nothing of personal models.")


# ------------------------------------------------------------------ the method's own


def recorded(run: RunFolder, name: str = "") -> alt.LayerChart:
    """Draw a number that the method itself recorded of each round.

    A number of the round is a line. Of a number of each client the line is the median
    client, and the band holds four fifths of them (all where they are ten or fewer).

    Parameters
    ----------
    run : RunFolder
        What to draw.
    name : str
        A column of ``rounds.csv`` or ``clients.csv``; by default the first.

    Raises
    ------
    DataError
        The method recorded nothing of its own, or nothing by this name.
    """
    frames = own_numbers(run, name)
    if not frames:
        known = own_numbers(run)
        if not known:
            said = f"the strategy '{run.strategy}' recorded nothing of its own."
            raise DataError(said)
        raise DataError(
            f"the strategy '{run.strategy}' recorded no '{name}'."
            f"{closest(name, known)} It recorded {listed(known, most=20)}."
        )
    name, frame = next(iter(frames.items()))
    frame = frame.iloc[style.thinned(len(frame), style.MOST_ROUNDS)]
    several = frame.shape[1] > 1
    few = frame.shape[1] <= FEW
    bands = quantiles(frame.to_numpy(dtype=float), few)
    rows = [
        {"round": number}
        | {key: short(bands[k, place]) for k, key in zip((0, 2, 4), "ace", strict=True)}
        for place, number in enumerate(frame.index.tolist())
    ]
    domain = style.limits(row[key] for row in rows for key in "ae")
    base = alt.Chart(style.data_of(rows))
    x = style.rounds_axis([rows[0]["round"] - 0.2, rows[-1]["round"] + 0.2])
    line = base.mark_line(color=BLUE, strokeWidth=2, clip=True, point=len(rows) < 3)
    drawn = [style.zoomable(line.encode(x=x, y=style.value_axis("c", None, domain)))]
    told = [style.number("c", "median client" if several else _readable(name))]
    if several:
        area = base.mark_area(color=BLUE, opacity=0.2, clip=True)
        low = style.value_axis("a", None, domain)
        drawn.insert(0, area.encode(x=x, y=low, y2=alt.Y2("e")))
        lowest, highest = ends(few)
        told = [style.number("e", highest), *told, style.number("a", lowest)]
    title = f"{_readable(name)}{' of a client' if several else ''}"
    return finished(
        style.layered(*drawn, style.at_pointer(base, told)),
        title,
        width=250,
        height=150,
    )


def _readable(name: str) -> str:
    return name.replace("_", " ")


def own_columns(frame: pd.DataFrame, known: Sequence[str]) -> list[str]:
    """Return the numbers of a table that only the method or its clients know of."""
    numbers = frame.select_dtypes("number")
    apart = {*known, *PERSONAL, *(f"evaluate_{name}" for name in PERSONAL)}
    return [str(name) for name in numbers if name not in apart]


def own_numbers(run: RunFolder, name: str = "") -> Mapping[str, pd.DataFrame]:
    """Return the method's numbers as frames ``[rounds, 1 or clients]``, by column.

    With a name, that one alone, where there is such a number.
    """
    rounds = run.rounds.set_index("round")
    of_rounds, of_clients = own_columns(rounds, ROUND_COLUMNS), list[str]()
    if (run.folder / "clients.csv").is_file():
        of_clients = own_columns(run.clients, CLIENT_COLUMNS)
    known = {}
    for one in dict.fromkeys([*of_rounds, *of_clients]):
        if name in ("", one):
            # What all clients have says more than the mean of it.
            frame = run.by_number(one) if one in of_clients else rounds[[one]]
            values = frame.astype(float)
            values = values.where(np.isfinite(values)).dropna(how="all")
            if not values.empty:
                known[one] = values
    return known
