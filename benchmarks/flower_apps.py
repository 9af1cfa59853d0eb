"""Flower apps as they are: on our engines, and on Flower's own runtime.

See README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engines import BENCHMARKS, results

from fedweight.core.errors import FedweightError
from fedweight.simulations.app_folder import AppFolder
from fedweight.simulations.flower_runtime import Outcome, run_on_flower
from fedweight.simulations.folder_run import run_folder
from fedweight.simulations.seen import difference_of_metrics, difference_of_models

ROOT = BENCHMARKS.parent
APPS = ROOT / "tests" / "apps"
ENGINES = ("local", "ray")
TOLERANCE = 1e-6
COLUMNS = (
    "app", "clients", "engine", "turns",
    "whole_s", "started_s", "whole_gain", "started_gain", "agrees",
)  # fmt: skip


class Case(NamedTuple):
    """An app and the settings that it is run with."""

    name: str
    folder: Path
    settings: dict[str, Any]


# The same apps with work that takes a client half a second and more, in large batches:
# what lies between two layers is then more than what malloc gives out again by itself.
LARGE = ", large"
SIZES: dict[str, dict[str, Any]] = {
    "small-photos": {
        "data.examples": 800,
        "data.side": 32,
        "model.width": 16,
        "training.batch": 800,
    },
    "torch-digits": {"examples": 4096, "hidden": 5632, "batch": 4096},
    "older-names": {"examples": 4096, "hidden": 7680, "batch": 4096},
}

# Why the models of an app cannot agree to rounding.
DRAWN = {"secure-sum": "rounds at random"}

# Between these lines of the README stands the table.
BEGIN, END = "<!-- by benchmarks/flower_apps.py -->", "<!-- end -->"


def cases(folders: Sequence[str]) -> list[Case]:
    """Return the apps in some folders; by default ours, also with more work."""
    paths = [Path(name) for name in folders] or sorted(APPS.iterdir())
    plain = [Case(path.name, path, {}) for path in paths]
    if folders:
        return plain
    return [*plain, *(Case(n + LARGE, APPS / n, own) for n, own in SIZES.items())]


def measure(case: Case, clients: int, workers: int) -> results.Row:
    """Run a case on Flower's runtime and on both our engines, each begun anew."""
    row: results.Row = {"app": case.name, "clients": clients, "workers": workers}
    app = AppFolder.read(case.folder)
    settings = dict(case.settings)
    if "nodes" in app.run_config:  # how many it waits for, in the apps of tests/apps
        settings["nodes"] = clients
    federation = {"num-supernodes": clients, "client-resources-num-cpus": 1}
    told = {"folder": str(case.folder), "settings": settings} | row
    try:
        outcomes = {"flower": run_on_flower(app, settings, federation)}
        with tempfile.TemporaryDirectory() as place:
            program = [sys.executable, __file__, "--ours", place]
            subprocess.run(
                program,
                input=json.dumps(told),
                stdout=subprocess.DEVNULL,
                check=True,
                text=True,
            )
            for engine in ENGINES:
                outcomes[engine] = Outcome.load(Path(place, engine))
    except (FedweightError, subprocess.CalledProcessError) as error:
        return row | {"note": str(error)}
    theirs = outcomes["flower"]
    for name, own in outcomes.items():
        models = difference_of_models(own.arrays, theirs.arrays)
        metrics = difference_of_metrics(own.metrics, theirs.metrics)
        row[name] = {
            "whole_s": own.seconds,
            "started_s": own.seconds_started,
            "models_differ_by": _finite(models),
            "metrics_differ_by": _finite(metrics),
        }
    return row


def _finite(difference: float) -> float | None:
    return difference if math.isfinite(difference) else None


def run_ours(place: Path, told: dict[str, Any]) -> None:
    """Run an app on both our engines; write what came of it to a folder for each."""
    for engine in ENGINES:
        done = run_folder(
            told["folder"],
            run_config=[
                f"{key}={json.dumps(v)}" for key, v in told["settings"].items()
            ],
            clients=told["clients"],
            engine=engine,
            workers=told["workers"],
            seed=0,
        ).ours
        arrays = [] if done.arrays is None else done.arrays.to_numpy_ndarrays()
        folder = place / engine
        folder.mkdir()
        Outcome(arrays, done.metrics, done.seconds, done.seconds_started).save(folder)


def summaries(rows: Iterable[results.Row]) -> list[results.Row]:
    """Return, for each app, number of clients and engine, medians over the turns."""
    turns: dict[tuple[str, int], list[results.Row]] = {}
    for row in rows:
        turns.setdefault((row["app"], row["clients"]), []).append(row)
    found = []
    for (app, clients), own in turns.items():
        done = [row for row in own if "note" not in row]
        for engine in (*ENGINES, "flower") if done else ():
            found.append(
                {
                    "app": app,
                    "clients": clients,
                    "engine": engine,
                    "turns": len(done),
                    "whole_s": _middle(done, engine, "whole_s"),
                    "started_s": _middle(done, engine, "started_s"),
                    "whole_gain": _gain(done, engine, "whole_s"),
                    "started_gain": _gain(done, engine, "started_s"),
                    "agrees": all(_agrees(row[engine]) for row in done),
                }
            )
        notes = [row["note"] for row in own if "note" in row]
        if notes:
            found.append({"app": app, "clients": clients, "engine": notes[0]})
    return found


def _middle(rows: Sequence[results.Row], engine: str, name: str) -> float:
    return statistics.median(row[engine][name] for row in rows)


def _gain(rows: Sequence[results.Row], engine: str, name: str) -> float:
    """Return how many times as long Flower takes, the median over the turns."""
    least = 1e-3  # where an app has one exchange only, nothing is left without start-up
    gains = [max(r["flower"][name], least) / max(r[engine][name], least) for r in rows]
    return statistics.median(gains)


def _agrees(found: dict[str, float | None]) -> bool:
    differences = found["models_differ_by"], found["metrics_differ_by"]
    return all(d is not None and d <= TOLERANCE for d in differences)


def table(rows: Sequence[results.Row]) -> list[str]:
    """Return the README's table: a line for each app, with 10 and 100 clients."""
    found = {(r["app"], r["clients"], r["engine"]): r for r in summaries(rows)}
    apps = sorted({row["app"] for row in rows}, key=lambda n: (n.endswith(LARGE), n))
    numbers = sorted({row["clients"] for row in rows})
    heads = [f"{n} clients: {of}" for n in numbers for of in ("Flower", *ENGINES)]
    lines = ["| app | " + " | ".join(heads) + " | agrees |"]
    lines.append("| --- " * (len(heads) + 2) + "|")
    for app in apps:
        cells = []
        for number in numbers:
            for engine in ("flower", *ENGINES):
                cells.append(_cell(found.get((app, number, engine)), engine))
        own = [r for (name, _, e), r in found.items() if name == app and e in ENGINES]
        agrees = "yes" if all(r["agrees"] for r in own) else "no"
        cells.append(DRAWN.get(app, agrees) if own else "–")
        lines.append(f"| {app} | " + " | ".join(cells) + " |")
    return lines


def _cell(row: results.Row | None, engine: str) -> str:
    if row is None:
        return "–"
    if engine == "flower":
        return f"{row['whole_s']:.1f} s, {row['started_s']:.2f} s"
    return f"{row['whole_gain']:.1f}, {row['started_gain']:.1f}"


def claims(rows: Sequence[results.Row]) -> list[str]:
    """Return, for each of our engines, what the table says in a sentence."""
    lines = []
    for engine in ENGINES:
        own = [row for row in summaries(rows) if row["engine"] == engine]
        if not own:
            continue
        whole = [row["whole_gain"] for row in own]
        started = [row["started_gain"] for row in own]
        large = [row["started_gain"] for row in own if row["app"].endswith(LARGE)]
        text = f"{engine}: whole {statistics.median(whole):.1f} at the median"
        text += f", {min(whole):.1f} at least; without start-up {min(started):.2f}"
        text += f" at least, and {min(large):.2f} of the large ones" if large else ""
        lines.append(text)
    return lines


def write_readme(rows: Sequence[results.Row], file: Path) -> None:
    """Put the table into the README, between its two marks."""
    before, rest = file.read_text("utf-8").split(BEGIN)
    _, after = rest.split(END)
    days = sorted({row["date"] for row in rows if "note" not in row})
    caption = (
        "How long the apps of `tests/apps` take on Flower's runtime, whole and without "
        "start-up, and how many times as fast they are on ours, likewise. Models and "
        f"metrics agree to {TOLERANCE:g}. Large: a client works for half a second and "
        f"more. By `benchmarks/flower_apps.py`, one turn, {', '.join(days)}, "
        f"{rows[0]['machine']}."
    )
    found = [f"* {line[0].upper()}{line[1:]}." for line in claims(rows)]
    middle = [textwrap.fill(caption, 92), "", *table(rows), "", *found]
    text = "\n".join([before + BEGIN, "", *middle, "", END + after])
    file.write_text(text, "utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("apps", nargs="*", help="folders (default: tests/apps)")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repetitions", type=int, default=1, help="turns of each")
    parser.add_argument(
        "--json", type=Path, help="the rows' file; what it has is not measured again"
    )
    parser.add_argument(
        "--readme",
        action="store_true",
        help="measure nothing: write the README's table",
    )
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.ours:
        run_ours(given.ours, json.load(sys.stdin))
        return
    file = given.json
    rows: list[results.Row] = []
    if file is not None and file.is_file():
        rows = json.loads(file.read_text("utf-8"))
    if given.readme:
        write_readme(rows, ROOT / "README.md")
        return
    have = Counter((row["app"], row["clients"]) for row in rows if "note" not in row)
    for turn in range(given.repetitions):
        for clients in given.clients:
            for case in cases(given.apps):
                if have[case.name, clients] > turn:
                    continue
                row = measure(case, clients, given.workers)
                rows += results.stamp([row])
                file = results.write(rows, "flower_apps", file)
                results.show(summaries([row]), COLUMNS)
    print(*claims(rows), file, sep="\n")


if __name__ == "__main__":
    main()
