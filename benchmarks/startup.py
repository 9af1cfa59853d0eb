"""From the start of a process to the end of its first round, imports included.

See README.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from engines import environments, results
from engines.processes import EngineFailedError, EngineProcess
from engines.work import Work

COLUMNS = ("work", "engine", "startup_s", "ready_s", "pss_mb", "note")


def measure(
    work: Work, engines: list[str], repetitions: int, workers: int
) -> list[results.Row]:
    """Start every engine several times, in turns; return a row for each."""
    rows: dict[str, results.Row] = {
        engine: {
            "work": work.name,
            "engine": engine,
            "startup_s": None,
            "ready_s": None,
            "pss_mb": None,
            "measurements": [],
            "note": "",
        }
        for engine in engines
    }
    ready: dict[str, list[float]] = {engine: [] for engine in engines}
    sizes: dict[str, list[float]] = {engine: [] for engine in engines}
    with tempfile.TemporaryDirectory(prefix="fedweight-benchmark-") as name:
        folder = Path(name)
        work.write(folder)
        work.tell(folder, workers)
        for _ in range(repetitions):
            for engine, row in rows.items():
                if row["note"]:
                    continue
                try:
                    python = environments.python_of(engine)
                    with EngineProcess(python, engine, folder) as process:
                        version = process.version
                        ready[engine].append(time.perf_counter() - process.started)
                        process.run(1)
                        row["measurements"].append(
                            time.perf_counter() - process.started
                        )
                        row["version"] = version
                        size = process.run_weighed(1)[1]
                        sizes[engine] += [] if size is None else [size]
                except environments.NotInstalledError as error:
                    row["note"] = str(error)
                except EngineFailedError as error:
                    row["note"] = f"failed: {error}"
    for engine, row in rows.items():
        if row["measurements"]:
            row["startup_s"] = statistics.median(row["measurements"])
            row["ready_s"] = statistics.median(ready[engine])
        if sizes[engine]:
            row["pss_mb"] = statistics.median(sizes[engine])
    return list(rows.values())


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default="S20", help="such as S20")
    parser.add_argument(
        "--engines", nargs="+", default=["local"], choices=environments.ENGINES
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="default: results/startup-DATE.json"
    )
    options = parser.parse_args(arguments)
    try:
        work = Work.parse(options.work)
    except ValueError as error:
        parser.error(str(error))
    engines = list(dict.fromkeys(options.engines))
    rows = measure(work, engines, options.repetitions, options.workers)
    rows = results.stamp(rows)
    results.show(rows, COLUMNS)
    print(f"written to {results.write(rows, 'startup', options.json)}")


if __name__ == "__main__":
    main()
