"""What a comparison found, as tables for docs/studies.md and the cards.

Reads the folder that ``fedweight compare`` wrote, whose test and intervals it takes
over, and adds what the summary has not: gaps in what clients hold out, the rates of
each group, personal models on what their clients hold out, whom weights favour, and
every candidate of a sweep. Prints Markdown, and writes what it is made of as JSON.

    fedweight compare simulations/adult_fairness.toml
    python benchmarks/studies.py runs/adult-fairness-comparison

The JSON in place of the folder prints the same tables again; --columns "test accuracy"
"test sex equal_opportunity" makes one of them, --against says what all is held against.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from engines.results import RESULTS, today, write_study

from fedweight import __version__
from fedweight.data import load
from fedweight.metrics import client_spread
from fedweight.studies import Comparison, Run
from fedweight.studies.configuration import Configuration
from fedweight.studies.statistics import compare_pairs, t_interval

# Columns are called "test sex equal_opportunity": part of the data, attribute, gap.
GAPS = {
    "accuracy": "accuracy",
    "demographic_parity": "selection rate",
    "equal_opportunity": "TPR",
    "equalized_odds": "TPR or FPR",
}
OF_CLIENTS = {
    "mean": "clients' mean",
    "worst10": "worst tenth of the clients",
    "std": "deviation over clients",
}
WORST = "worst group"

PARTS = ("test ", "held-out ")

# In no table unless asked for: of groups, called "test sex=Female tpr"; of runs.
RATES = {"selection_rate": "selection rate", "tpr": "TPR"}
MOST, LEAST, ALIKE = (
    "weight of the most accurate client",
    "weight of the least accurate client",
    "correlation of weight and accuracy",
)

# What stands between a strategy and its objective where both are compared.
OBJECTIVE = "+"

# What the label of a method's personal models ends with.
PERSONAL = ", personal models"

Row = dict[str, Any]


def main() -> None:
    """Print the tables of the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=Path, help="what 'fedweight compare' wrote, or this"
    )
    parser.add_argument("--against", help="another one than the first")
    parser.add_argument("--columns", nargs="+", default=[], help="only these, as one")
    parser.add_argument("--json", type=Path, help="where what was read is written")
    given = parser.parse_args()
    if given.folder.suffix == ".json":
        rows = json.loads(given.folder.read_text("utf-8"))["rows"]
        first = given.against or rows[0]["strategy"]
        print("\n\n".join(tables(rows, first, given.columns)))
        return
    found = Comparison(given.folder)
    rows = read(found)
    name = given.folder.name.removesuffix("-comparison")
    path = given.json or RESULTS / f"studies-{name}-{today()}.json"
    write(path, found, rows)
    first = given.against or found.strategies[0]
    print("\n\n".join(tables(rows, first, given.columns)))


def read(found: Comparison) -> list[Row]:
    """Return what every run that is complete has reached, a row each.

    Personal models have rows of their own, of what clients hold out.
    """
    rows: list[Row] = []
    for cell in found.cells.to_dict("records"):
        if cell["status"] != "complete":
            continue
        run = Run(found.folder / str(cell["folder"]))
        kept = ("strategy", "data", "seed", "candidate", "chosen", "failed_rounds")
        row = {name: cell[name] for name in kept}
        row["validation"] = cell["validation_accuracy"]
        # What no table holds against the first needs no gaps at the clients.
        parts = ("test", "held-out") if cell["chosen"] else ("test",)
        rows.append(row | reached(run, parts))
        if cell["chosen"] and run.config["personal"]["name"] != "none":
            own = {"strategy": cell["strategy"] + PERSONAL, "candidate": ""}
            rows.append(row | own | personal(run))
    return rows


def reached(run: Run, parts: Sequence[Literal["test", "held-out"]]) -> Row:
    """Return a run's accuracies, and the gaps between groups if it measured any."""
    summary = run.summary()
    row: Row = {"test accuracy": summary["test_accuracy"]}
    row |= {f"{one} accuracy": summary[f"client_accuracy_{one}"] for one in OF_CLIENTS}
    row |= weighed(run.clients)
    if (run.folder / "groups.csv").is_file():
        for attribute in run.config["groups"]["attributes"]:
            for part in parts:
                gaps = run.gaps(attribute, part=part, resamples=0)["value"]
                row |= {
                    f"{part} {attribute} {gap}": gaps[f"{gap}_difference"]
                    for gap in GAPS
                }
            groups = run.groups[run.groups["round"] == run.groups["round"].max()]
            own = groups[
                (groups["part"] == "test") & (groups["attribute"] == attribute)
            ]
            row[f"test {attribute} {WORST}"] = own["accuracy"].min()
            row |= {
                f"test {attribute}={group['group']} {rate}": group[rate]
                for group in own.to_dict("records")
                for rate in RATES
            }
    return row


def weighed(clients: pd.DataFrame) -> Row:
    """Return whom weights favour: the clients with the best or worst held-out accuracy.

    A weight is the mean over all rounds, an accuracy that of the last evaluation. There
    is no correlation if all weights, or all accuracies, are the same.
    """
    weights = clients.groupby("client")["weight"].mean()
    accuracies = clients.dropna(subset="accuracy").groupby("client")["accuracy"].last()
    if len(accuracies) < len(weights):
        return {}
    differ = np.ptp(weights) > 1e-9 and np.ptp(accuracies) > 0
    return {
        MOST: weights[accuracies.idxmax()],
        LEAST: weights[accuracies.idxmin()],
        ALIKE: weights.corr(accuracies) if differ else math.nan,
    }


def personal(run: Run) -> Row:
    """Return what personal models reach, each on what its client holds out."""
    from fairlearn.metrics import (
        MetricFrame,
        false_positive_rate,
        selection_rate,
        true_positive_rate,
    )

    config = Configuration.read(run.folder / "config.toml")
    where = config["data"]["path"] or None
    dataset = load(config["data"]["name"], where, **config.options("data"))
    table = pd.concat(
        [
            run.predictions(clients=[client], model=model, dataset=dataset)
            for client, model in run.personal_models().items()
        ]
    )
    right = table["target"] == table["prediction"]
    spread = client_spread(right.groupby(table["client"]).mean())
    row: Row = {f"{one} accuracy": spread[one] for one in OF_CLIENTS}
    for attribute in run.config["groups"]["attributes"]:
        gaps = MetricFrame(
            metrics={
                "accuracy": lambda y, said: float(np.mean(y == said)),
                "demographic_parity": selection_rate,
                "equal_opportunity": true_positive_rate,
                "fpr": false_positive_rate,
            },
            y_true=table["target"],
            y_pred=table["prediction"],
            sensitive_features=table[attribute],
        ).difference()
        gaps["equalized_odds"] = max(gaps["equal_opportunity"], gaps["fpr"])
        row |= {f"held-out {attribute} {gap}": float(gaps[gap]) for gap in GAPS}
    return row | {"test accuracy": math.nan}


def write(path: Path, found: Comparison, rows: Iterable[Row]) -> None:
    """Write the rows with their circumstances."""
    short = [
        {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        for row in rows
    ]
    config = found.run(found.strategies[0], found.seeds[0]).config
    about = {"version": __version__, "seeds": found.seeds, "settings": config}
    write_study(short, path, **about)


def tables(rows: list[Row], first: str, columns: Sequence[str] = ()) -> Iterable[str]:
    """Yield what was found, data set by data set, as Markdown.

    Differences are those from ``first``, seed by seed; a verdict is that of the paired
    t test with Holm's correction over the rows of its column. By default there are
    tables of accuracies, and of the gaps by each attribute.
    """
    for data in dict.fromkeys(row["data"] for row in rows):
        own = [row for row in rows if row["data"] == data]
        chosen = [row for row in own if row["chosen"]]
        names = dict.fromkeys(name for row in own for name in row)
        of_groups = [
            n
            for n in names
            if n.startswith(PARTS) and n.count(" ") > 1 and "=" not in n
        ]
        kinds = dict.fromkeys(tuple(name.split(" ")[:2]) for name in of_groups)
        accuracies = ["test accuracy", *(f"{one} accuracy" for one in OF_CLIENTS)]
        each = [accuracies]
        each += [[n for n in of_groups if n.startswith(" ".join(k))] for k in kinds]
        for number, several in enumerate([columns] if columns else each):
            head = f"### {data}\n\n" if number == 0 else ""
            yield head + table(chosen, several, first)
            if any(OBJECTIVE in row["strategy"] for row in chosen):
                yield f"By objective:\n\n{by_objective(chosen, several)}"
        if any(row["candidate"] for row in own):
            tested = [name for name in of_groups if name.startswith("test ")]
            shown = columns or ["test accuracy", *tested]
            yield "Candidates of the sweep:\n\n" + candidates(own, shown)


def by_objective(rows: list[Row], names: Sequence[str]) -> str:
    """Return the table of objectives, each averaged over strategies, seed by seed."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        label = row["strategy"].partition(OBJECTIVE)[2]
        groups.setdefault((label, row["seed"]), []).append(row)
    means = [
        {"strategy": label, "seed": seed}
        | {
            name: float(np.mean([_number(row.get(name)) for row in own]))
            for name in names
        }
        for (label, seed), own in groups.items()
    ]
    return table(means, names, means[0]["strategy"])


def title(name: str) -> str:
    """Return what a table calls a column.

    Examples
    --------
    >>> title("test sex equal_opportunity")
    'sex: gap in TPR'
    >>> title("test sex=Female tpr")
    'sex=Female: TPR'
    """
    if name in (MOST, LEAST, ALIKE):
        return name
    kind, _, rest = name.partition(" ")
    if rest == "accuracy" and kind in OF_CLIENTS:
        return OF_CLIENTS[kind]
    attribute, _, gap = rest.partition(" ")
    where = " (held out)" if kind == "held-out" else ""
    if gap in GAPS:
        return f"{attribute}: gap in {GAPS[gap]}{where}"
    if "=" in rest:
        group, _, rate = rest.rpartition(" ")
        return f"{group}: {RATES[rate]}"
    return f"{attribute}: {gap}'s accuracy" if gap else name


def table(rows: list[Row], names: Sequence[str], first: str) -> str:
    """Return means with 95% intervals, and differences, as a Markdown table."""
    # Personal models are measured on what clients hold out, and nowhere else.
    rows = [row for row in rows if any(_known(row.get(name)) for name in names)]
    methods = [*dict.fromkeys(row["strategy"] for row in rows)]
    seeds = sorted({row["seed"] for row in rows})
    columns = []
    for name in names:
        by = {(row["strategy"], row["seed"]): row.get(name) for row in rows}
        values = {
            method: [_number(by.get((method, seed))) for seed in seeds]
            for method in methods
        }
        known = {
            method: own
            for method, own in values.items()
            if method != first and np.isfinite(own).any()
        }
        is_gap = name.count(" ") == 2 and name.split(" ")[2] in GAPS
        less = is_gap or name.startswith("std ")
        pairs = compare_pairs(values[first], known, less_is_better=less)
        cells = {}
        for method, own in values.items():
            finite = np.array(own)[np.isfinite(own)]
            low, high = t_interval(finite)
            cells[method] = [_mean(finite, low, high)]
            if method in pairs and name not in (MOST, LEAST, ALIKE):
                pair = pairs[method]
                cells[method].append(
                    f"{pair.difference:+.4f} ({pair.low:+.4f} to {pair.high:+.4f}) "
                    f"{pair.verdict}"
                )
            else:
                cells[method].append("")
        columns.append(cells)
    header = ["method"]
    for name in names:
        header += [title(name), f"minus {first}"]
    lines = [header, ["---"] * len(header)]
    lines += [[m, *(cell for own in columns for cell in own[m])] for m in methods]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def candidates(rows: list[Row], names: Sequence[str]) -> str:
    """Return the means of all that a sweep tried: a front of what can be had."""
    columns = ["validation", *names]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["candidate"]:
            groups.setdefault((row["strategy"], row["candidate"]), []).append(row)
    lines = [
        "| "
        + " | ".join(["method", "candidate", "chosen", *map(title, columns)])
        + " |",
        "|" + " --- |" * (3 + len(columns)),
    ]
    for (method, candidate), own in groups.items():
        means = [f"{np.mean([_number(r.get(c)) for r in own]):.3f}" for c in columns]
        mark = "yes" if own[0]["chosen"] else ""
        short = ", ".join(
            key.rpartition(".")[2] + " " + value
            for key, value in (one.split("=") for one in candidate.split("+"))
        )
        lines.append("| " + " | ".join([method, short, mark, *means]) + " |")
    return "\n".join(lines)


def _mean(values: Any, low: float, high: float) -> str:
    if not len(values):
        return ""
    spread = "" if math.isnan(low) else f" ± {(high - low) / 2:.3f}"
    return f"{np.mean(values):.3f}{spread}"


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


if __name__ == "__main__":
    main()
