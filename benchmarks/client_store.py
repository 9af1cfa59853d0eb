"""What personal models of many clients cost: memory, files, checkpoints.

Ditto with a linear model on 784 features; of the registered clients some train in a
round. See README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from engines import BENCHMARKS, results

REGISTERED = (10_000, 1_000_000)

COLUMNS = (
    "registered",
    "cohort",
    "rounds",
    "peak_mb",
    "store_mb",
    "model_mb",
    "store_mb_per_update",
    "checkpoint_mb",
    "first_seconds_a_round",
    "last_seconds_a_round",
)

# The linear model's parameters, as float32.
MODEL_MB = 10 * (784 + 1) * 4 / 1e6


def measure(registered: int, cohort: int, rounds: int, checkpoint: int) -> results.Row:
    """Run one point in a fresh process."""
    path = os.pathsep.join(
        filter(None, [str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    )
    with tempfile.TemporaryDirectory(prefix="fedweight-benchmark-") as name:
        sizes = [str(n) for n in (registered, cohort, rounds, checkpoint)]
        command = [sys.executable, "-m", "engines.personal", f"{name}/run", *sizes]
        done = subprocess.run(
            command,
            cwd=BENCHMARKS,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
    seen = [json.loads(line) for line in done.stdout.splitlines()]
    seconds = [b["seconds"] - a["seconds"] for a, b in pairwise(seen)]
    some = max(1, len(seconds) // 5)
    # Rows go to the file at a checkpoint: that of the last but one round may be new.
    written = max(seen, key=lambda row: row["store_mb"])
    return {
        "engine": f"fedweight {seen[0]['version']}",
        "registered": registered,
        "cohort": cohort,
        "rounds": rounds,
        "checkpoint_rounds": checkpoint,
        "peak_mb": seen[-1]["peak_mb"],
        "store_mb": written["store_mb"],
        "model_mb": MODEL_MB,
        "store_mb_per_update": written["store_mb"] / (cohort * written["round"]),
        "checkpoint_mb": max(row["checkpoint_mb"] for row in seen),
        "first_seconds_a_round": sum(seconds[:some]) / some if seconds else None,
        "last_seconds_a_round": sum(seconds[-some:]) / some if seconds else None,
        "measurements": seen,
    }


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--registered", type=int, nargs="*", default=REGISTERED)
    parser.add_argument("--a-round", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument(
        "--checkpoint-rounds", type=int, default=5, help="rounds between checkpoints"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="default: client_store-DATE.json"
    )
    options = parser.parse_args(arguments)
    rows = []
    for registered in options.registered:
        print(f"{registered} clients ...", file=sys.stderr, flush=True)
        sizes = registered, options.a_round, options.rounds
        rows.append(measure(*sizes, options.checkpoint_rounds))
    rows = results.stamp(rows)
    results.show(rows, COLUMNS)
    print(f"written to {results.write(rows, 'client_store', options.json)}")


if __name__ == "__main__":
    main()
