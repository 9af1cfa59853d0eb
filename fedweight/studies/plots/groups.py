"""Figures of groups of a sensitive attribute: how the model treats each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...core.errors import DataError
from ...core.extras import Imported
from ..reader import RunFolder
from . import style
from .style import SEVERAL, finished

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd
else:
    alt = Imported("altair", "studies", "a plot")
    pd = Imported("pandas", "studies", "a run's folder")

# What is measured of a group, and what a reader calls it.
RATES = {
    "accuracy": "Accuracy",
    "selection_rate": "Selection rate",
    "tpr": "True positive rate",
    "fpr": "False positive rate",
    "loss": "Loss",
}
PARTS = {"test": "the server’s test set", "held-out": "all clients’ held-out data"}


def measured(run: RunFolder) -> pd.DataFrame:
    """Return what is known of the groups of all clients together, and of the test set.

    Raises
    ------
    DataError
        The run measured no groups.
    """
    frame = run.groups
    return frame[frame["client"].isna()].reset_index(drop=True)


def shown(run: RunFolder) -> list[tuple[str, str, str]]:
    """Return what there is to draw: part, attribute and rate, the test set's first."""
    try:
        frame = measured(run)
    except DataError:
        return []
    return [
        (part, str(attribute), rate)
        for part in PARTS
        for attribute in frame.loc[frame["part"] == part, "attribute"].unique()
        for rate in RATES
        if rate in frame
        and frame.loc[_rows(frame, part, str(attribute)), rate].notna().any()
    ]


def _rows(frame: pd.DataFrame, part: str, attribute: str) -> Any:
    return (frame["part"] == part) & (frame["attribute"] == attribute)


def over_rounds(run: RunFolder, part: str, attribute: str, rate: str) -> alt.LayerChart:
    """Draw a rate of each group of an attribute, round by round.

    Parameters
    ----------
    run : RunFolder
        What to draw; of many groups the largest.
    part : {"test", "held-out"}
        Of which data.
    attribute : str
        The sensitive attribute.
    rate : {"accuracy", "selection_rate", "tpr", "fpr", "loss"}
        What is measured.

    Raises
    ------
    DataError
        The run holds nothing of it.
    """
    frame = measured(run)
    frame = frame[_rows(frame, part, attribute)]
    if rate not in frame or frame[rate].notna().sum() == 0:
        raise DataError(f"{run.folder / 'groups.csv'} holds no {rate} of {attribute}.")
    frame = frame.dropna(subset=[rate])
    sizes = frame.groupby("group", sort=False)["examples"].max()
    drawn = [*sizes.sort_values(ascending=False, kind="stable").index[: len(SEVERAL)]]
    names = [name for name in sizes.index if name in drawn]
    series = {
        str(name): [
            (int(number), float(value))
            for number, value in zip(rows["round"], rows[rate], strict=True)
        ]
        for name in names
        for rows in [frame[frame["group"] == name]]
    }
    percent = rate != "loss"
    left = len(sizes) - len(names)
    return finished(
        style.lines(
            series,
            dict(zip(series, SEVERAL, strict=False)),
            RATES[rate],
            percent=percent,
            bounds=(0.0, 1.0) if percent else (0.0, 1e300),
        ),
        f"{RATES[rate]} by {attribute}",
        f"On {PARTS[part]}."
        + (f" {left} smaller groups are left out." if left > 0 else ""),
        height=200,
    )


def last(run: RunFolder) -> list[tuple[str, pd.DataFrame]]:
    """Return tables of the groups in the last round, with how far apart they are.

    Returns
    -------
    list of (str, DataFrame)
        Of which data and attribute, and a row a group; the last row is the largest
        difference between two groups. Of selection rates that is the difference of
        demographic parity, of true positive rates that of equal opportunity.
    """
    tables = []
    for part, attribute in dict.fromkeys((p, a) for p, a, _ in shown(run)):
        frame = measured(run)
        frame = frame[_rows(frame, part, attribute)]
        number = int(frame["round"].max())
        frame = frame[frame["round"] == number]
        rates = [rate for rate in RATES if rate in frame and frame[rate].notna().any()]
        table = frame[["group", "examples", *rates]].reset_index(drop=True)
        gaps = table[rates].max() - table[rates].min()
        gaps = gaps.where(table[rates].count() > 1)  # Between two groups, or none.
        row = pd.DataFrame([{"group": "largest difference", **gaps.to_dict()}])
        caption = f"By {attribute}, round {number}, on {PARTS[part]}"
        tables.append((caption, pd.concat([table, row], ignore_index=True)))
    return tables
