"""What the strategies reach: the table and the picture in the README.

Runs a simulation file for each strategy and seed, one after another, and writes what
was measured to a dated file and, as a table, to the terminal.

    python benchmarks/strategies.py simulations/label_skew.toml --seeds 0
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import fedweight
from fedweight.strategies import STRATEGIES

RESULTS = Path(__file__).parent / "results"

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
    parser.add_argument("--picture", type=Path, help="draw the weights to this file")
    given = parser.parse_args()
    rows, runs = [], {}
    for seed in given.seeds:
        for strategy in given.strategies:
            run = fedweight.run(
                given.file,
                strategy=strategy,
                seed=seed,
                settings=given.settings,
                out=tempfile.mkdtemp(),
            )
            row = measured(run, strategy, seed)
            rows.append(row)
            runs.setdefault(strategy, run)
            print(json.dumps(row), flush=True)
    write(given, rows)
    print(table(rows))
    if given.picture:
        draw(runs, given.picture)


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
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    name = f"strategies-{Path(given.file).stem}-{today}.json"
    path = given.json or RESULTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "date": today,
        "file": given.file,
        "settings": given.settings,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


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


def draw(runs: dict[str, fedweight.Run], path: Path) -> None:
    """Draw each strategy's weights, by client and round, side by side."""
    import altair as alt

    rows = [
        {"strategy": strategy, "round": number, "client": client, "weight": weight}
        for strategy, run in runs.items()
        for number, weights in run.weights_by_number.iterrows()
        for client, weight in weights.items()
    ]
    titles = [
        f"{strategy}: test accuracy {float(run.rounds['test_accuracy'].iloc[-1]):.3f}"
        for strategy, run in runs.items()
    ]
    chart = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_rect()
        .encode(
            x=alt.X("round:O", axis=alt.Axis(labelOverlap=True)),
            y=alt.Y("client:O", sort="descending", axis=alt.Axis(labelOverlap=True)),
            color=alt.Color(
                "weight:Q",
                scale=alt.Scale(scheme="viridis", zero=True),
                title="aggregation weight",
            ),
            facet=alt.Facet(
                "strategy:N",
                columns=3,
                sort=list(runs),
                title=None,
                header=alt.Header(
                    labelExpr=f"{titles}[indexof({list(runs)}, datum.value)]"
                ),
            ),
        )
        .properties(width=260, height=190)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    chart.save(path, scale_factor=1.3)


if __name__ == "__main__":
    main()
