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
from collections import defaultdict
from pathlib import Path

from engines import results
from engines.processes import EngineFailedError, EngineProcess
from engines.work import Work

COHORTS = (20, 100, 1_000, 10_000)
REGISTERED = (1_000, 10_000, 100_000, 1_000_000)
A_ROUND = 1_000

# What other cohorts are compared with, and other numbers of registered clients.
REFERENCE_COHORT = 100

# The clients draw their examples from so many times 128.
POOL = 20

COLUMNS = (
    "registered",
    "cohort",
    "updates_per_second",
    "cost_over_cohort_100",
    "cost_over_fewest_registered",
    "pss_mb",
    "startup_s",
    "note",
)

Point = tuple[int, int]  # Registered clients, and how many train in a round.


class Measurements:
    """What was seen of one point, turn by turn."""

    def __init__(self) -> None:
        self.microseconds: list[float] = []
        self.pss: list[float] = []
        self.startups: list[float] = []
        self.note = ""


def measure(
    folder: Path, point: Point, plan: str, seconds: float, seen: Measurements
) -> None:
    """Measure one point in a fresh process."""
    registered, cohort = point
    arguments = (str(registered), str(cohort), plan)
    try:
        with EngineProcess(sys.executable, "many", folder, *arguments) as process:
            process.run(1)
            startup = time.perf_counter() - process.started
            once = process.run(1)
            rounds = max(1, round(seconds / once))
            took = process.run(rounds)
            weighed = math.ceil(min(seconds, 1.0) / once)
            size = process.run_weighed(weighed)[1]
    except EngineFailedError as error:
        seen.note = f"failed: {error}"
        return
    seen.startups.append(startup)
    seen.microseconds.append(1e6 * took / (rounds * cohort))
    if size is not None:
        seen.pss.append(size)


def median(values: list[float]) -> float | None:
    """Return the median, or None of nothing."""
    return statistics.median(values) if values else None


def over(one: Measurements, other: Measurements | None) -> float | None:
    """Return the median of two costs' ratios, each of the same turn."""
    if other is None or one.note or other.note:
        return None
    pairs = zip(one.microseconds, other.microseconds, strict=True)
    return median([a / b for a, b in pairs])


def row_of(
    model: str, point: Point, measured: dict[Point, Measurements], fewest: Point | None
) -> results.Row:
    """Return what is written of one point."""
    registered, cohort = point
    seen = measured[point]
    cost = None if seen.note else median(seen.microseconds)
    like = fewest is not None and cohort == fewest[1]
    return {
        "engine": "local",
        "model": model,
        "registered": registered,
        "cohort": cohort,
        "updates_per_second": None if cost is None else 1e6 / cost,
        "microseconds_per_update": cost,
        "cost_over_cohort_100": over(
            seen, measured.get((REFERENCE_COHORT, REFERENCE_COHORT))
        ),
        "cost_over_fewest_registered": over(seen, measured.get(fewest))
        if like and fewest is not None
        else None,
        "pss_mb": median(seen.pss),
        "startup_s": median(seen.startups),
        "measurements": seen.microseconds,
        "note": seen.note,
    }


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
    parser.add_argument(
        "--plan", default="auto", help="how clients train: auto, loop or batched-N"
    )
    parser.add_argument("--repetitions", type=int, default=3, help="turns")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of each measurement, about"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="default: results/scale-DATE.json"
    )
    options = parser.parse_args(arguments)
    by_registered = [(n, min(n, options.a_round)) for n in options.registered]
    points = [(cohort, cohort) for cohort in options.cohorts] + by_registered
    measured: dict[Point, Measurements] = defaultdict(Measurements)
    with tempfile.TemporaryDirectory(prefix="fedweight-benchmark-") as name:
        folder = Path(name)
        work = Work(options.model, POOL)
        work.write(folder)
        work.tell(folder, workers=1)
        for turn in range(options.repetitions):
            for point in dict.fromkeys(points):
                print(
                    f"turn {turn + 1}: {point[1]} of {point[0]} clients ...",
                    file=sys.stderr,
                    flush=True,
                )
                if not measured[point].note:
                    measure(
                        folder, point, options.plan, options.seconds, measured[point]
                    )
    # The first whose round is as large as the others'.
    full = [point for point in by_registered if point[1] == options.a_round]
    fewest = min(full, default=None)
    rows = [row_of(options.model, point, dict(measured), fewest) for point in measured]
    rows = results.stamp(rows)
    results.show(rows, COLUMNS)
    print(f"written to {results.write(rows, 'scale', options.json)}")


if __name__ == "__main__":
    main()
