"""The report of a comparison: one HTML file that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import DataError
from ..core.extras import Imported
from ..core.writing import write_whole
from . import plots
from .comparison_tables import (
    capital,
    choices,
    cost_table,
    group_tables,
    verdict_tables,
)
from .gaps import OF, gap_named
from .pages import (
    Part,
    diagram,
    figure,
    listing,
    page,
    section,
    settings,
    table,
)
from .plots import comparing
from .plots.weights import weights_of
from .ranks import ROPE
from .reader import table_of
from .result import Run
from .summarizing import metric_of
from .summary import num_clients_of
from .telling import (
    attributes_of,
    legend_of,
    reading_of,
    title_of,
)

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
    first = found.strategies[0]
    others = len(found.strategies) - 1
    sections = [
        section(
            "What differs for real",
            *verdict_tables(found),
            listing("How to read the tables", reading_of(found)),
            text=" ".join(
                filter(
                    None,
                    [
                        f"A difference is a strategy's mean minus that of {first}."
                        * (others > 0),
                        legend_of(found),
                    ],
                )
            ),
        )
    ]
    if several and others:
        sections.append(_over_data_sets(found))
    for data in found.data_sets:
        sections += _of_data(found, data, f" on {data}" if several else "")
    sections.append(choices(found))
    sections.append(
        section(
            "Runs",
            _runs(found),
            text="A run has a report of its own when 'fedweight report FOLDER' has "
            "written it.",
        )
    )
    configs, clients = _configs(found)
    shared = _shared(configs)
    said = "What all runs share; the rest stands in each run's config.toml"
    sections.append(section("Configuration", settings(shared, said)))
    facts = (
        ("baseline", first),
        ("held against it", others),
        ("data", ", ".join(found.data_sets)),
        ("seeds", ", ".join(map(str, found.seeds))),
        ("runs", len(found.cells)),
        ("rounds", shared.get("run", {}).get("rounds")),
        ("clients", " or ".join(map(str, sorted(clients)))),
        ("model", shared.get("model", {}).get("name")),
    )
    return page(
        "comparison.html",
        found.folder.name,
        facts,
        sections,
        verdicts=found.verdicts,
        cautions=[*found.warnings, *found.cautions],
    )


def _configs(found: Comparison) -> tuple[list[Mapping[str, Any]], set[int]]:
    """Return the runs' configurations, and how many clients they have."""
    configs, clients = list[Mapping[str, Any]](), set[int]()
    for name in found.cells["folder"]:
        with suppress(DataError):  # It failed before it was written.
            run = Run(found.folder / name)
            configs.append(run.config)
            if (number := num_clients_of(run)) is not None:
                clients.add(number)
    return configs, clients


def _shared(configs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the keys whose values all runs have in common, table by table."""
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


def _over_data_sets(found: Comparison) -> Part:
    """Return who is ahead over the data sets, and how probable that is."""
    measured = dict.fromkeys(found.summary["metric"])
    diagrams = []
    for metric in measured:
        ranking = found.ranking(metric)
        diagrams.append(diagram(capital(title_of(found, metric)), ranking))
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
    share = measure == "accuracy"
    title = plots.called(measure)
    place = "test" if len(first.measured(f"test_{measure}")) else "evaluate"
    client = _client_measure(runs)
    yield section(
        f"Over the rounds{on}",
        figure(partial(comparing.curves, runs, f"{place}_{measure}", title, share)),
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
            for which in _fronts(cells, attributes_of(found))
        ),
    )
    yield section(
        f"Groups: who is worse off{on}",
        *group_tables(found, data),
        text="Means over the seeds, with 95% t intervals. How far apart groups are "
        "says nothing of why they are.",
    )
    yield section(f"Costs{on}", cost_table(found, data, cells))
    yield _weights(runs, on)


def _fronts(
    cells: pd.DataFrame, attributes: Sequence[str]
) -> Iterable[comparing.Front]:
    yield comparing.CLIENTS_FRONT
    only = attributes[0] if len(attributes) == 1 else ""
    for column in map(str, cells):
        name, _, attribute = column.partition(OF)
        if name in map(gap_named, _FRONTS):
            named = name.removesuffix("_gap")
            yield comparing.gap_front(named, attribute or only, column)


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
        if part:
            note = " ".join(filter(None, [part["note"], _sums_of(run)]))
            maps.append({**part, "title": name, "note": note})
    seed = next(iter(runs.values()))[0][0]
    return section(
        f"How much each client counted{on}",
        *maps,
        text=f"With seed {seed}, on one scale."
        + (
            f" {len(shown) - len(drawn)} more are left out." * (len(shown) > len(drawn))
        ),
    )


def _sums_of(run: Run) -> str:
    """Say what the weights sum to, where that is not 1."""
    sums = weights_of(run).sum(axis=1)
    low, high = float(sums.min()), float(sums.max())
    if run.keeps_several or 0.99 <= low <= high <= 1.01:
        return ""
    return (
        f"The weights of a round sum to {low:.2g} to {high:.2g} and not to 1: so much "
        "shorter or longer is the global model's step."
    )


def _client_measure(runs: Mapping[str, list[tuple[int, Run]]]) -> str:
    for several in runs.values():
        for _, run in several:
            try:
                return plots.client_measure(run)
            except DataError:
                continue
    return "accuracy"


def _runs(found: Comparison) -> Part:
    frame = found.cells.dropna(axis=1, how="all")
    empty = [c for c in frame if frame[c].eq("").all()]
    return table(
        "cells.csv",
        frame.drop(columns=empty),
        closed="Every run in numbers",
        folders="folder",
    )
