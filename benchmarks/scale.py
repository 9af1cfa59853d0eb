"""What a client update costs, and how much memory a run needs, as clients grow.

First the clients of a round grow, then the registered clients with the same number of
them in a round. See README.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

from engines import results
from engines.processes import EngineFailedError, EngineProcess
from engines.work import Work

COHORTS = (20, 100, 1_000, 10_000)
REGISTERED = (1_000, 10_000, 100_000, 1_000_000)
A_ROUND = 1_000

# Clients with examples of their own; the others see the same again.
DISTINCT = 20

COLUMNS = (
    "registered",
    "cohort",
    "microseconds_per_update",
    "pss_mb",
    "startup_s",
    "note",
)


def measure(
    folder: Path, model: str, registered: int, cohort: int, options: argparse.Namespace
) -> results.Row:
    """Measure one point, each time in a fresh process; return its row."""
    row: results.Row = {
        "engine": "local",
        "model": model,
        "registered": registered,
        "cohort": cohort,
        "microseconds_per_update": None,
        "pss_mb": None,
        "startup_s": None,
        "measurements": [],
        "note": "",
    }
    startups, sizes = [], []
    try:
        for _ in range(options.repetitions):
            arguments = (str(registered), str(cohort))
            with EngineProcess(sys.executable, "many", folder, *arguments) as process:
                process.run(1)
                startups.append(time.perf_counter() - process.started)
                once = process.run(1)
                rounds = max(1, round(options.seconds / once))
                seconds = process.run(rounds)
                row["measurements"].append(1e6 * seconds / (rounds * cohort))
                weighed = math.ceil(min(options.seconds, 1.0) / once)
                sizes.append(process.run_weighed(weighed)[1])
    except EngineFailedError as error:
        row["note"] = f"failed: {error}"
        return row
    row["microseconds_per_update"] = statistics.median(row["measurements"])
    row["startup_s"] = statistics.median(startups)
    known = [size for size in sizes if size is not None]
    row["pss_mb"] = statistics.median(known) if known else None
    return row


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="S", choices=["S", "M", "L"])
    parser.add_argument(
        "--cohorts", type=int, nargs="*", default=COHORTS, help="all of them train"
    )
    parser.add_argument(
        "--registered",
        type=int,
        nargs="*",
        default=REGISTERED,
        help="so many clients, of which --a-round train in a round",
    )
    parser.add_argument("--a-round", type=int, default=A_ROUND)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of each measurement, about"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="default: results/scale-DATE.json"
    )
    options = parser.parse_args(arguments)
    points = [(cohort, cohort) for cohort in options.cohorts]
    points += [(n, min(n, options.a_round)) for n in options.registered]
    rows: list[results.Row] = []
    with tempfile.TemporaryDirectory(prefix="fedweight-benchmark-") as name:
        folder = Path(name)
        Work(options.model, DISTINCT).write(folder, workers=1)
        for registered, cohort in dict.fromkeys(points):
            print(f"{registered} clients ...", file=sys.stderr, flush=True)
            rows.append(measure(folder, options.model, registered, cohort, options))
    rows = results.stamp(rows)
    results.show(rows, COLUMNS)
    print(f"written to {results.write(rows, 'scale', options.json)}")


if __name__ == "__main__":
    main()
