"""How many client updates a second, side by side with others, in one run.

All engines do the same work, in turns: in every turn each engine is started anew and
has the machine to itself, so a noisy machine hits all alike. See README.md.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from engines import environments, results
from engines.processes import EngineFailedError, EngineProcess
from engines.turns import TOLERANCE, Turn, difference
from engines.work import Work

COLUMNS = (
    "work",
    "engine",
    "updates_per_second",
    "ratio_to_floor",
    "pss_mb",
    "startup_s",
    "agrees",
    "note",
)


def take_turn(engine: str, python: str, folder: Path, seconds: float) -> Turn:
    """Start an engine, warm it up, measure it, weigh it, let it quit."""
    turn = Turn()
    with EngineProcess(python, engine, folder) as process:
        turn.take(process, folder / "weights.npy", seconds)
        _, turn.pss = process.run_weighed(math.ceil(min(seconds, 1.0) / turn.round))
    return turn


def measure(
    work: Work,
    engines: list[str],
    repetitions: int,
    seconds: float,
    workers: int,
    plan: str = "auto",
    device: str = "cpu",
) -> list[results.Row]:
    """Measure engines on a work, in turns; return a row for each."""
    notes: dict[str, str] = {}
    pythons: dict[str, str] = {}
    for engine in engines:
        try:
            pythons[engine] = environments.python_of(engine, device)
        except environments.NotInstalledError as error:
            notes[engine] = str(error)
    turns: dict[str, list[Turn]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="fedweight-benchmark-") as name:
        folder = Path(name)
        name_of_device = work.write(folder, device)
        work.tell(folder, workers, plan, device)
        for repetition in range(repetitions):
            for engine, python in pythons.items():
                if engine in notes:
                    continue
                try:
                    turn = take_turn(engine, python, folder, seconds)
                except EngineFailedError as error:
                    notes[engine] = f"failed: {error}"
                    continue
                turns[engine].append(turn)
                print(
                    f"{work.name} turn {repetition + 1}: {engine}: "
                    f"{work.cohort / turn.round:.4g} updates/s",
                    file=sys.stderr,
                    flush=True,
                )
    rows = [
        row_of(work, engine, turns[engine], turns["floor"], notes.get(engine, ""))
        for engine in engines
    ]
    return [{**row, "device": name_of_device} for row in rows]


def row_of(
    work: Work, engine: str, turns: list[Turn], floor: list[Turn], note: str
) -> results.Row:
    """Return an engine's row; what was not measured is None."""
    rates = [work.cohort / turn.round for turn in turns]
    row: results.Row = {
        "work": work.name,
        "engine": engine,
        "version": turns[0].version if turns else None,
        "updates_per_second": None,
        "ratio_to_floor": None,
        "pss_mb": None,
        "startup_s": None,
        "agrees": None,
        "difference": None,
        "measurements": rates,
        "note": note,
    }
    if turns:
        row["updates_per_second"] = statistics.median(rates)
        row["startup_s"] = statistics.median(t.startup for t in turns)
        sizes = [t.pss for t in turns if t.pss is not None]
        row["pss_mb"] = statistics.median(sizes) if sizes else None
    if turns and floor:
        rate = work.cohort / statistics.median(t.round for t in floor)
        row["ratio_to_floor"] = row["updates_per_second"] / rate
        expected = floor[0].weights
        row["difference"] = max(difference(t.weights, expected) for t in turns)
        row["agrees"] = row["difference"] <= TOLERANCE
    return row


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, measure, print and write."""
    on_gpus = [e for e in environments.ENGINES if e in environments.USE_A_GPU]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work",
        nargs="+",
        default=["S20"],
        metavar="WORK",
        help="a model (S, M, L) and the clients of a round, such as S20 S1000 M20 L4",
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        default=["floor", "local", "ray", "flwr"],
        choices=environments.ENGINES,
        help="peers that are not installed yet are, each in a folder of its own",
    )
    parser.add_argument("--repetitions", type=int, default=5, help="turns of each")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of each measurement, about"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes or threads of the engines that use several",
    )
    parser.add_argument(
        "--plan",
        default="auto",
        help="how fedweight's engines train clients: auto (the default), loop (one "
        "after another) or batched-N (N at once)",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        choices=["cpu", "cuda"],
        help=f"where clients train; one GPU: {', '.join(on_gpus)}",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="default: results/throughput-DATE"
    )
    options = parser.parse_args(arguments)
    try:
        works = [Work.parse(name) for name in options.work]
    except ValueError as error:
        parser.error(str(error))
    if not re.fullmatch(r"auto|loop|batched-([2-9]|[1-9]\d+)", options.plan):
        parser.error(
            "--plan must be auto, loop or batched-N with N clients at once, 2 or more, "
            f"got {options.plan}"
        )
    rows: list[results.Row] = []
    for work in works:
        try:
            rows += measure(
                work,
                list(dict.fromkeys(options.engines)),
                options.repetitions,
                options.seconds,
                options.workers,
                options.plan,
                options.device,
            )
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode)  # The work was not written; it has said why.
    rows = results.stamp(rows)
    results.show(rows, COLUMNS)
    print(f"written to {results.write(rows, 'throughput', options.json)}")


if __name__ == "__main__":
    main()
