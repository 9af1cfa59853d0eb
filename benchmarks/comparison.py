"""A comparison, side by side, beside the same runs one after another, each alone.

See README.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from engines import BENCHMARKS, results

from fedweight import Run

COLUMNS = (
    *("file", "cells", "comparison_s", "alone_s", "ratio"),
    *("round_beside_s", "round_alone_s", "same_bits"),
)

# What a run writes that no clock has a part in.
SAME = ("rounds.csv", "clients.csv", "model.safetensors")


def timed(*arguments: str) -> float:
    """Run the command line in a process of its own; return how long it took."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "fedweight", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def a_round(cells: Sequence[Path]) -> float:
    """Return how long a round of these runs took, on average."""
    frames = [Run(cell).timings for cell in cells]
    return float(np.mean([f.loc[f["round"] > 0, "seconds"].mean() for f in frames]))


def measure(
    file: str, strategies: str, seeds: str, settings: Sequence[str]
) -> results.Row:
    """Compare, then run every cell alone; return a row."""
    with tempfile.TemporaryDirectory(prefix="fedweight-benchmark-") as name:
        together, apart = Path(name, "together"), Path(name, "apart")
        given = [word for one in settings for word in ("--set", one)]
        given += ["--strategies", strategies, "--seeds", seeds]
        took = timed("compare", file, *given, "--out", str(together))
        alone, same = 0.0, True
        cells = sorted(path.parent for path in together.glob("*/config.toml"))
        owns = [apart / cell.name for cell in cells]
        for cell, own in zip(cells, owns, strict=True):
            # Its plan is in it: what is measured is the run, not the choice of a plan.
            alone += timed("run", str(cell / "config.toml"), "--out", str(own))
            for table in SAME:
                same &= (own / table).read_bytes() == (cell / table).read_bytes()
        rounds = {"beside": a_round(cells), "alone": a_round(owns)}
        plans = tomllib.loads((together / "comparison.toml").read_text("utf-8"))[
            "plans"
        ]
    return {
        "file": Path(file).name,
        "settings": list(settings),
        "strategies": strategies,
        "seeds": seeds,
        "cells": len(cells),
        "plans": sorted(set(plans.values())),
        "cores": len(os.sched_getaffinity(0)),
        "comparison_s": took,
        "alone_s": alone,
        "ratio": took / alone,
        **{f"round_{how}_s": seconds for how, seconds in rounds.items()},
        "same_bits": same,
    }


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    label_skew = BENCHMARKS.parent / "simulations" / "label_skew.toml"
    parser.add_argument("--file", default=str(label_skew), help="a simulation file")
    parser.add_argument("--strategies", default="fedavg,feddisco,ida")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--set", action="append", default=[], metavar="TABLE.KEY=VALUE", dest="settings"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="default: results/comparison-DATE.json",
    )
    options = parser.parse_args(arguments)
    row = measure(options.file, options.strategies, options.seeds, options.settings)
    rows = results.stamp([row])
    results.show(rows, COLUMNS)
    print(f"written to {results.write(rows, 'comparison', options.json)}")


if __name__ == "__main__":
    main()
