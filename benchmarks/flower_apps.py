"""Flower apps as they are: on our engines, and on Flower's own runtime.

See README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
from pathlib import Path

from engines import BENCHMARKS, results

from fedweight.simulations.app_folder import AppFolder
from fedweight.simulations.flower_runtime import run_on_flower
from fedweight.simulations.folder_run import FolderRun, run_folder

APPS = BENCHMARKS.parent / "tests" / "apps"
ENGINES = ("local", "ray")
COLUMNS = (
    "app", "clients", "engine",
    "whole_s", "started_s", "whole_gain", "started_gain", "agrees",
)  # fmt: skip


def measure(folder: Path, clients: int, workers: int, turns: int) -> list[results.Row]:
    """Run an app on every engine and on Flower's, in turns; return a row for each."""
    federation = {"num-supernodes": clients, "client-resources-num-cpus": 1}
    whole: dict[str, list[float]] = {name: [] for name in (*ENGINES, "flower")}
    started: dict[str, list[float]] = {name: [] for name in whole}
    agrees = dict.fromkeys(ENGINES, True)
    app = AppFolder.read(folder)
    # How many nodes it waits for is a setting of each app in tests/apps.
    own = {"nodes": clients} if "nodes" in app.config() else {}
    for _ in range(turns):
        theirs = run_on_flower(app, own, federation)
        whole["flower"].append(theirs.seconds)
        started["flower"].append(theirs.seconds_started)
        for engine in ENGINES:
            with contextlib.redirect_stdout(io.StringIO()):
                done = run_folder(
                    folder,
                    run_config=[f"{key}={value}" for key, value in own.items()],
                    clients=clients,
                    engine=engine,
                    workers=workers,
                    seed=0,
                )
            ours = FolderRun(done.ours, clients, theirs)
            whole[engine].append(ours.ours.seconds)
            started[engine].append(ours.ours.seconds_started)
            agrees[engine] &= ours.agrees
    middle = statistics.median
    return [
        {
            "app": folder.name,
            "clients": clients,
            "engine": name,
            "whole_s": middle(whole[name]),
            "started_s": middle(started[name]),
            "whole_gain": middle(whole["flower"]) / middle(whole[name]),
            "started_gain": middle(started["flower"])
            / max(middle(started[name]), 1e-3),
            "agrees": agrees.get(name),
            "whole_measurements": whole[name],
            "started_measurements": started[name],
        }
        for name in whole
    ]


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("apps", nargs="*", help="folders (default: tests/apps)")
    parser.add_argument("--clients", type=int, nargs="+", default=[10])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    given = parser.parse_args(arguments)
    folders = [Path(name) for name in given.apps] or sorted(APPS.iterdir())
    rows: list[results.Row] = []
    for folder in folders:
        for clients in given.clients:
            rows += measure(folder, clients, given.workers, given.repetitions)
            results.show(rows[-len(ENGINES) - 1 :], COLUMNS)
    rows = results.stamp(rows)
    print(results.write(rows, "flower_apps", given.json))


if __name__ == "__main__":
    main()
