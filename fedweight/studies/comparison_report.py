"""The report of a comparison: one HTML file that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import DataError
from ..core.extras import Imported
from ..core.texts import in_bytes
from ..core.writing import write_whole
from . import plots
from .gaps import OF, gap_named
from .pages import Part, diagram, figure, page, section, settings, table
from .plots import comparing
from .ranks import ROPE
from .reader import table_of
from .result import Run
from .summarizing import ALL_DATA, metric_of, within_bounds

if TYPE_CHECKING:
    import pandas as pd

    from .comparison import Comparison
else:
    pd = Imported("pandas", "studies", "a run's folder")

_MOST_HEATMAPS = 12

# Of which gaps there is a front where groups are measured.
_FRONTS = ("accuracy", "equalized_odds")


def write_comparison_report(found: Comparison) -> Path:
    """Write ``report.html`` in the comparison's folder, whole or not at all.

    Parameters
    ----------
    found : Comparison
        What was run, and what it is worth.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    OutputError
        It cannot be written; one that was there still is.
    ConfigurationError
        A package is missing that writes reports.
    """
    path = found.folder / "report.html"
    write_whole(path, render(found))
    return path


def render(found: Comparison) -> str:
    """Return the report as one HTML document."""
    several = len(found.data_sets) > 1
    sections = [section("What differs for real", *_tables(found))]
    if several and len(found.strategies) > 1:
        sections.append(_over_data_sets(found))
    for data in found.data_sets:
        sections += _of_data(found, data, f" on {data}" if several else "")
    sections.append(
        section(
            "Runs",
            _runs(found),
            text="A run has a report of its own when 'fedweight report FOLDER' has "
            "written it.",
        )
    )
    shared = _shared(found)
    said = "What all runs share; the rest stands in each run's config.toml"
    sections.append(section("Configuration", settings(shared, said)))
    facts = (
        ("strategies", len(found.strategies)),
        ("data", ", ".join(found.data_sets)),
        ("seeds", ", ".join(map(str, found.seeds))),
        ("runs", len(found.cells)),
        *(
            (name, shared.get(table, {}).get(key))
            for name, table, key in (
                ("rounds", "run", "rounds"),
                ("clients", "partition", "clients"),
                ("model", "model", "name"),
            )
        ),
    )
    return page(
        "comparison.html",
        found.folder.name,
        facts,
        sections,
        verdicts=found.verdicts,
        notes=found.notes,
    )


def _shared(found: Comparison) -> dict[str, dict[str, Any]]:
    """Return the keys whose values all runs have in common, table by table."""
    configs = []
    for name in found.cells["folder"]:
        with suppress(DataError):  # It failed before it was written.
            configs.append(Run(found.folder / name).config)
    first, *others = configs or [{}]
    return {
        table: common
        for table in first
        if (
            common := {
                key: value
                for key, value in table_of(first, table).items()
                if all(table_of(one, table).get(key) == value for one in others)
            }
        )
    }


def _tables(found: Comparison) -> Iterable[Part]:
    """Return what was compared, metric by metric, with the winners marked."""
    first = found.strategies[0]
    summary = found.summary
    for metric in dict.fromkeys(summary["metric"]):
        one = metric_of(metric)
        for data in [*found.data_sets, ALL_DATA]:
            own = summary[(summary["metric"] == metric) & (summary["data"] == data)]
            if own.empty:
                continue
            bounds = [
                within_bounds(metric, low, high)
                for low, high in zip(own["low"], own["high"], strict=True)
            ]
            frame = pd.DataFrame(
                {
                    # Only what the test says is better is marked.
                    "": ["*" if v == "better" else "" for v in own["verdict"]],
                    "strategy": own["strategy"].to_numpy(),
                    "data sets" if data == ALL_DATA else "runs": own["n"].to_numpy(),
                    "mean": own["mean"].to_numpy(),
                    "95% from": [low for low, _ in bounds],
                    "to": [high for _, high in bounds],
                    # A mean of differences that are 0 in sum is some 1e-17.
                    f"minus {first}": own["difference"].to_numpy().round(6),
                    "95% from ": own["difference_low"].to_numpy().round(6),
                    "to ": own["difference_high"].to_numpy().round(6),
                    "p": own["p"].to_numpy(),
                    "Holm p": own["p_holm"].to_numpy(),
                    "Wilcoxon p": own["wilcoxon_p"]
                    .map("{:.4g}".format, na_action="ignore")
                    .mask(own["wilcoxon_verdict"] == "cannot reach", "cannot reach")
                    .to_numpy(),
                    "verdict": own["verdict"].to_numpy(),
                }
            )
            where = f", {data}" if len(found.data_sets) > 1 else ""
            title = f"{one.title[:1].upper()}{one.title[1:]}{where}"
            yield table(title, frame.dropna(axis=1, how="all"))


def _over_data_sets(found: Comparison) -> Part:
    """Return who is ahead over the data sets, and how probable that is."""
    measured = dict.fromkeys(found.summary["metric"])
    diagrams = []
    for metric in measured:
        ranking, title = found.ranking(metric), metric_of(metric).title
        diagrams.append(diagram(f"{title[:1].upper()}{title[1:]}", ranking))
    frames = [
        found.signed_ranks(metric).assign(metric=metric_of(metric).title)
        for metric in measured
        if metric_of(metric).is_share
    ]
    first = found.strategies[0]
    return section(
        "Over the data sets",
        *diagrams,
        table(
            "How probable it is on a further data set (Bayesian signed ranks)",
            pd.concat(frames)[["metric", "strategy", "better", "same", "worse"]],
            f"Than {first}; the same: by {ROPE:g} or less. Of few data sets the prior "
            "says most, nothing is corrected for several comparisons, and no verdict "
            "rests on it.",
        )
        if frames
        else None,
        text="Each strategy counts once on a data set, with its mean over the seeds.",
    )


def _of_data(found: Comparison, data: str, on: str) -> Iterable[Part]:
    """Return the sections about one data set."""
    cells = found.cells
    compared = (cells["data"] == data) & (cells["chosen"] == 1)
    cells = cells[compared & (cells["status"] == "complete")]
    runs: dict[str, list[tuple[int, Run]]] = {
        name: [
            (int(row["seed"]), Run(found.folder / row["folder"]))
            for row in cells[cells["strategy"] == name].to_dict("records")
        ]
        for name in found.strategies
    }
    runs = {name: several for name, several in runs.items() if several}
    if not runs:
        return
    first = next(iter(runs.values()))[0][1]
    measure = next(iter(plots.measures(first)), "loss")
    percent = measure == "accuracy"
    title = plots.called(measure)
    place = "test" if len(first.measured(f"test_{measure}")) else "evaluate"
    client = _client_measure(runs)
    yield section(
        f"Over the rounds{on}",
        figure(partial(comparing.curves, runs, f"{place}_{measure}", title, percent)),
        figure(partial(comparing.curves, runs, f"{place}_loss", "Loss", False))
        if measure != "loss"
        else None,
    )
    yield section(
        f"Accuracy and fairness{on}",
        figure(
            partial(
                comparing.clients_beside,
                runs,
                client,
                plots.called(client),
                client.endswith("accuracy"),
            )
        ),
        *(
            figure(partial(comparing.front, cells, list(runs), which))
            for which in _fronts(cells)
        ),
    )
    yield section(f"Costs{on}", _costs(cells, list(runs)))
    yield _weights(runs, on)


def _fronts(cells: pd.DataFrame) -> Iterable[comparing.Front]:
    yield comparing.CLIENTS_FRONT
    for column in cells:
        name, _, attribute = str(column).partition(OF)
        if name in map(gap_named, _FRONTS):
            yield comparing.gap_front(name.removesuffix("_gap"), attribute)


def _weights(runs: Mapping[str, list[tuple[int, Run]]], on: str) -> Part:
    """Return how much each client counted, strategy by strategy, on one scale."""
    shown = {}
    for name, several in runs.items():
        with suppress(DataError):  # It aggregates without weights.
            shown[name] = several[0][1], plots.reach(several[0][1])
    limit = max((reach for _, reach in shown.values()), default=None)
    drawn = list(shown.items())[:_MOST_HEATMAPS]
    most = comparing.most_cells(max(len(drawn), 1))
    maps = []
    for name, (run, _) in drawn:
        part = figure(plots.heatmap(run, most_cells=most, limit=limit), name)
        maps.append({**part, "title": name} if part else None)
    seed = next(iter(runs.values()))[0][0]
    return section(
        f"How much each client counted{on}",
        *maps,
        text=f"With seed {seed}, on one scale."
        + (
            f" {len(shown) - len(drawn)} more are left out." * (len(shown) > len(drawn))
        ),
    )


def _client_measure(runs: Mapping[str, list[tuple[int, Run]]]) -> str:
    for several in runs.values():
        for _, run in several:
            try:
                return plots.client_measure(run)
            except DataError:
                continue
    return "accuracy"


def _costs(cells: pd.DataFrame, strategies: list[str]) -> Part:
    """Return what a run cost, on average over the seeds."""
    rows = []
    for name in strategies:
        own = cells[cells["strategy"] == name]
        row: dict[str, Any] = {"strategy": name, "rounds": own["rounds"].mean()}
        row["down"] = in_bytes(own["bytes_down"].mean())
        row["up"] = in_bytes(own["bytes_up"].mean())
        row["rounds to target"] = own["rounds_to_target"].mean()
        to_target = own["bytes_to_target"].mean()
        row["traffic to target"] = "" if to_target != to_target else in_bytes(to_target)
        row["reached"] = f"{own['rounds_to_target'].notna().sum()} of {len(own)}"
        rows.append(row)
    return table(
        "What a run cost, on average",
        pd.DataFrame(rows),
        "The target is a test accuracy: see the notes above. A mean of rounds or "
        "traffic to it is over the runs that reached it.",
    )


def _runs(found: Comparison) -> Part:
    frame = found.cells.dropna(axis=1, how="all")
    empty = [c for c in frame if frame[c].eq("").all()]
    return table(
        "cells.csv",
        frame.drop(columns=empty),
        closed="Every run in numbers",
        folders="folder",
    )
