"""What methods for fairness reach on Adult: accuracy, and the gaps between the sexes.

Eight clients that differ in whom they serve, a linear model, 20 rounds. Settings are
the methods' own defaults, or what METHODS says, and chosen by nothing. Runs every
method with every seed, and goes on where an earlier call stopped.

    export FEDWEIGHT_DATA=/my/data       a folder that has adult/ in it
    python benchmarks/fairness.py --seeds 0 1 2 3 4 5 6 7 8 9
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from engines.results import RESULTS, today, write_study

import fedweight
from fedweight.data import load

SETTINGS: dict[str, Any] = {
    "run.rounds": 20,
    "run.evaluate-every": 20,
    "data.name": "adult",
    "data.held-out": 0.1,
    "data.proxy": 0.02,
    "partition.name": "attribute",
    "partition.attribute": "sex",
    "partition.strength": 0.7,
    "partition.clients": 8,
    "model.name": "softmax",
    "training.epochs": 2,
    "training.batch-size": 256,
    "training.learning-rate": 0.1,
    "strategy.fraction-evaluate": 0.0,
    "engine.name": "local",
    "engine.plan": "loop",
}

BY_SEX: dict[str, Any] = {
    "strategy.name": "global-group-dro",
    "strategy.group": "sex",
    "strategy.step": 1.0,
}
KERNELS: dict[str, Any] = {"strategy.name": "agnostic-fair", "strategy.group": "sex"}

# By what a row is called: what is chosen.
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"strategy.name": "fedavg"},
    "fedavg, local group-dro": {
        "strategy.name": "fedavg",
        "objective.name": "group-dro",
        "objective.group": "sex",
    },
    "afl": {"strategy.name": "afl"},
    "qfedavg": {"strategy.name": "qfedavg"},
    "global-group-dro": {"strategy.name": "global-group-dro"},
    "global-group-dro, sex": BY_SEX,
    "agnostic-fair, no group": {"strategy.name": "agnostic-fair"},
    "agnostic-fair, sex": KERNELS,
    "agnostic-fair, sex, penalty 0": {**KERNELS, "strategy.penalty": 0.0},
}

# No probability is taken for smaller.
LEAST = 1e-12

COLUMNS = {
    "accuracy": "accuracy",
    "worst_accuracy": "worse sex's accuracy",
    "worst_loss": "worse sex's loss",
    "risk_difference": "gap in selection rate",
    "tpr_gap": "gap in TPR",
}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--json", type=Path, help="where the rows are, and are written")
    given = parser.parse_args()
    path: Path = given.json or RESULTS / f"fairness-{today()}.json"
    rows = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    done = {(row["method"], row["seed"]) for row in rows}
    for seed in given.seeds:
        for method in given.methods:
            if (method, seed) not in done:
                rows.append({"method": method, "seed": seed, **measured(method, seed)})
                print(json.dumps(rows[-1]), flush=True)
                write_study(rows, path, settings=SETTINGS, methods=METHODS)
    print(table(rows))


def measured(method: str, seed: int) -> dict[str, float]:
    """Return what one run reaches on the test set."""
    run = fedweight.run(
        settings={**SETTINGS, "run.seed": seed, **METHODS[method]},
        out=tempfile.mkdtemp(),
        report=False,
        progress=False,
    )
    said = run.predictions("test")
    women = load("adult").test.attributes["sex"] == 0
    found = by_sex(
        said["target"].to_numpy(), said["score_1"].to_numpy().astype(float), women
    )
    if "feasible" in run.rounds:
        found["feasible_rounds"] = float(run.rounds["feasible"].iloc[1:].mean())
    found["failed_rounds"] = int((run.rounds["status"] == "failed").sum())
    return {name: round(value, 4) for name, value in found.items()}


def by_sex(
    y: npt.NDArray[Any], score: npt.NDArray[Any], women: npt.NDArray[np.bool_]
) -> dict[str, float]:
    """Return accuracy, and what differs between women and men."""
    decided = score > 0.5
    right, likely = decided == y, np.where(y == 1, score, 1 - score)
    loss = -np.log(np.maximum(likely, LEAST))  # In single precision some are 0.
    groups = (women, ~women)
    rates = [decided[g].mean() for g in groups]
    hits = [decided[g & (y == 1)].mean() for g in groups]
    return {
        "accuracy": float(right.mean()),
        "worst_accuracy": float(min(right[g].mean() for g in groups)),
        "worst_loss": float(max(loss[g].mean() for g in groups)),
        "risk_difference": float(abs(rates[0] - rates[1])),
        "tpr_gap": float(abs(hits[0] - hits[1])),
    }


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Return, by method, means over seeds with the standard deviations behind."""
    found: dict[str, dict[str, str]] = {}
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        if own:
            found[method] = {
                name: f"{np.mean([row[name] for row in own]):.3f} "
                f"({np.std([row[name] for row in own], ddof=len(own) > 1):.3f})"
                for name in COLUMNS
            }
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return the means as a Markdown table."""
    lines = [
        "| " + " | ".join(["method", *COLUMNS.values()]) + " |",
        "|" + " --- |" * (1 + len(COLUMNS)),
    ]
    for method, cells in means(rows).items():
        lines.append("| " + " | ".join([method, *cells.values()]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
