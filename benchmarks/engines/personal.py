"""Ditto on fedweight's local grid with any number of clients, for client_store.py.

Started with a folder, the registered clients, how many of them train in a round, the
rounds, and after how many of them a checkpoint is written. It writes a line of JSON
after every round: memory and files are then what a run of so many rounds needs.
"""

import contextlib
import json
import sys
import time
from pathlib import Path

import numpy as np

import fedweight
from fedweight.data import DataSet, Examples
from fedweight.server.loop import ServerState

from .work import BATCH, CLASSES, LEARNING_RATE, SEED

FEATURES = 784

# The clients draw their examples from so many.
POOL = 2_560

# And each has so many.
EXAMPLES = 32


def noise() -> DataSet:
    """Return examples that say nothing."""
    stream = np.random.default_rng(SEED)
    x = stream.standard_normal((POOL, FEATURES)).astype(np.float32)
    examples = Examples(x, stream.integers(0, CLASSES, POOL))
    return DataSet("noise", examples, examples.take(slice(0, 100)), CLASSES)


def resident_mb(peak: bool = False) -> float | None:
    """Return the memory of this process in MB, or the most it ever had."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:" if peak else "VmRSS:"):
                return int(line.split()[1]) * 1.024 / 1000
    return None


def main() -> None:
    """Run rounds as told."""
    folder = Path(sys.argv[1])
    registered, cohort, rounds, checkpoint = map(int, sys.argv[2:])
    began = time.perf_counter()

    def look(state: ServerState) -> None:
        files = {path.name: path.stat().st_size for path in folder.iterdir()}
        store = sum(n for name, n in files.items() if name.startswith("client-store"))
        row = {
            "round": state.round,
            "seconds": time.perf_counter() - began,
            "resident_mb": resident_mb(),
            "peak_mb": resident_mb(peak=True),
            "store_mb": store / 1e6,
            "checkpoint_mb": files.get("checkpoint.safetensors", 0) / 1e6,
            "version": fedweight.__version__,
        }
        print(json.dumps(row), flush=True)

    fedweight.run(
        dataset=noise(),
        out=folder,
        report=False,
        progress=False,
        callbacks=[look],
        settings={
            "run.rounds": rounds,
            "run.evaluate-every": rounds,
            "run.checkpoint-rounds": checkpoint,
            "data.held-out": 0.0,
            "data.proxy": 0.0,
            "partition.name": "dirichlet-sampled",
            "partition.clients": registered,
            "partition.examples-per-client": EXAMPLES,
            "model.name": "softmax",
            "personal.name": "ditto",
            "training.epochs": 1,
            "training.batch-size": BATCH,
            "training.learning-rate": LEARNING_RATE,
            "strategy.name": "fedavg",
            "strategy.fraction-train": cohort / registered,
            "strategy.fraction-evaluate": 0.0,
            "engine.name": "local",
            "engine.plan": "batched-20",
        },
    )


if __name__ == "__main__":
    main()
