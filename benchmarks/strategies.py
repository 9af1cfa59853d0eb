"""What the strategies reach: the table and the picture in the README.

Compares strategies over seeds on a simulation file, and writes what was measured to a
dated file and, as a table, to the terminal. With ``--out`` the runs are kept: the same
command goes on where it was stopped, and ``--picture`` draws again without running.

    python benchmarks/strategies.py simulations/label_skew.toml --seeds 0
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from engines.results import RESULTS, today, write_study

import fedweight
from fedweight.strategies import STRATEGIES

COLUMNS = {
    "strategy": "strategy",
    "seed": "seed",
    "test_accuracy": "test accuracy",
    "client_accuracy_mean": "clients' mean",
    "client_accuracy_std": "clients' std",
    "client_accuracy_worst10": "worst tenth",
    "effective_clients": "effective clients",
    "seconds": "seconds",
}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", default="simulations/label_skew.toml")
    parser.add_argument("--strategies", nargs="+", default=sorted(STRATEGIES.entries))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", nargs="+", default=[], dest="settings")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--out", type=Path, help="the folder of the runs, to keep them")
    parser.add_argument("--picture", type=Path, help="draw the weights to this file")
    given = parser.parse_args()
    found = fedweight.compare(
        given.file,
        strategies=given.strategies,
        seeds=given.seeds,
        settings=given.settings,
        out=given.out or tempfile.mkdtemp(),
        workers=1,  # So that the seconds are those of a run alone.
    )
    for name, reason in found.failures.items():
        print(f"{name} failed: {reason}")
    runs = {
        (row.strategy, row.seed): found.run(row.strategy, row.seed)
        for row in found.cells.itertuples()
        if row.folder not in found.failures
    }
    rows = [measured(run, *which) for which, run in runs.items()]
    write(given, rows)
    print(table(rows))
    if given.picture:
        first = {name: runs[name, seed] for name, seed in reversed(runs)}
        draw(
            {name: first[name] for name in found.strategies if name in first},
            given.picture,
        )


def measured(run: fedweight.Run, strategy: str, seed: int) -> dict[str, Any]:
    """Return what is reported of one run."""
    last = run.rounds.iloc[-1]
    names = [c for c in COLUMNS if c in last.index]
    return {
        "strategy": strategy,
        "seed": seed,
        **{name: round(float(last[name]), 4) for name in names},
        "failed_rounds": int((run.rounds["status"] == "failed").sum()),
        "seconds": round(float(run.timings["elapsed"].iloc[-1]), 1),
    }


def write(given: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the rows with their circumstances."""
    name = f"strategies-{Path(given.file).stem}-{today()}.json"
    path = given.json or RESULTS / name
    write_study(rows, path, file=given.file, settings=given.settings)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| " + " | ".join(COLUMNS.values()) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    for row in rows:
        cells = [row.get(name, "") for name in COLUMNS]
        texts = [f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def draw(runs: Mapping[str, fedweight.Run], path: Path) -> None:
    """Draw each strategy's weights, by client and round, side by side.

    As in a report: cream is the uniform weight, orange counts for more, blue for less.
    """
    import altair as alt

    weights = {name: run.weights_by_number for name, run in runs.items()}
    logs = {
        name: np.log2(of.clip(lower=1e-9).mul(of.count(axis=1), axis=0))
        for name, of in weights.items()
    }
    rows = [
        {"strategy": name, "round": number, "client": client, "log": log}
        for name, of in logs.items()
        for number, of_round in of.iterrows()
        for client, log in of_round.dropna().items()
    ]
    # The smallest whole power of two that nearly all weights are within.
    reach = max(1, int(np.ceil(np.quantile([abs(row["log"]) for row in rows], 0.98))))
    last = {name: run.measured("test_accuracy").iloc[-1] for name, run in runs.items()}
    titles = {name: f"{name}: test accuracy {last[name]:.3f}" for name in runs}
    chart = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_rect()
        .encode(
            x=alt.X("round:O", title="Round", axis=alt.Axis(labelOverlap=True)),
            y=alt.Y("client:O", title="Client"),
            color=alt.Color(
                "log:Q",
                scale=alt.Scale(
                    scheme="blueorange", domain=[-reach, 0, reach], clamp=True
                ),
                legend=alt.Legend(
                    title="weight ÷ uniform weight",
                    values=list(range(-reach, reach + 1)),
                    labelExpr="datum.value == 0 ? 'uniform' : (datum.value < 0 ? "
                    "'÷ ' : '× ') + pow(2, abs(datum.value))",
                ),
            ),
            facet=alt.Facet(
                "strategy:N",
                columns=3,
                sort=list(runs),
                title=None,
                header=alt.Header(
                    labelExpr=f"{json.dumps(titles)}[datum.value]", labelFontSize=12
                ),
            ),
        )
        .properties(width=260, height=190)
        .configure_axis(domain=False, ticks=False, labelAngle=0)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    chart.save(path, scale_factor=1.3)


if __name__ == "__main__":
    main()
