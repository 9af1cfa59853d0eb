"""What the interpreter costs a client update, apart from PyTorch's arithmetic.

    python benchmarks/host.py --cohorts 1000 10000

A run with FedAvg of clients whose training costs next to nothing, all of a round in one
chunk: microseconds of CPU a client, part by part. With a device of its own that does
nothing at all (``none``), and as it is (``cpu``). See README.md.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from engines import results

import fedweight
from fedweight.clients import TrainingApp
from fedweight.clients.cohort_trainer import CohortTrainer
from fedweight.clients.local_work import LocalWork
from fedweight.clients.steps import batched, feeding, schedule, step
from fedweight.data import DataSet, Examples
from fedweight.messages.dispatch import Answers
from fedweight.simulations.local import LocalGrid
from fedweight.strategies import WeightingStrategy
from fedweight.studies.keeper import Keeper
from fedweight.studies.recorder import Recorder

FEATURES, CLASSES = 4, 2

# What a round is made of, by whose work it is: all of it but what another part does.
PARTS: tuple[tuple[str, Any, str], ...] = (
    ("choice", WeightingStrategy, "configure_train"),
    ("dispatch", LocalGrid, "send_and_receive"),
    ("clients", TrainingApp, "answer"),
    ("replies", LocalWork, "train"),
    ("tasks", CohortTrainer, "train"),
    ("results", batched.BatchedTrainer, "train"),
    ("chunk", batched.BatchedTrainer, "train_rows"),
    ("schedule", schedule.Schedule, "of"),
    ("orders", feeding.Feeder, "feed"),
    ("sum", Answers, "sum_up"),
    ("aggregation", WeightingStrategy, "aggregate_train"),
    ("record", Recorder, "after_round"),
    ("checkpoint", Keeper, "__call__"),
)

NAMES = (*(name for name, *_ in PARTS), "collector", "rest")

COLUMNS = ("device", "cohort", "examples", "microseconds", *NAMES)


class Clock:
    """Tells CPU time apart by the part that is at work, of those that are nested.

    Collecting garbage is a part of its own: whose objects those were is not known.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._at_work = ["rest"]
        self._since = time.process_time()

    def turn(self, part: str | None) -> None:
        """Let a part begin, or with ``None`` the last one end."""
        now = time.process_time()
        self.seconds[self._at_work[-1]] += now - self._since
        self._since = now
        if part is None:
            self._at_work.pop()
        else:
            self._at_work.append(part)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is timed as a part."""

        @wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            self.turn(part)
            try:
                return function(*arguments, **named)
            finally:
                self.turn(None)

        return timed

    def collects(self, phase: str, about: object) -> None:
        """Let the collector's part begin or end; called by it."""
        self.turn("collector" if phase == "start" else None)


@contextmanager
def in_place(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Put something else in place of attributes, in a ``with`` block."""
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def timed_parts(clock: Clock) -> list[tuple[Any, str, Any]]:
    """Return what times the parts, to be put in their place."""
    changes = []
    for part, owner, name in PARTS:
        own = vars(owner)[name]
        if isinstance(own, classmethod):
            changes.append((owner, name, classmethod(clock.timed(part, own.__func__))))
        else:
            changes.append((owner, name, clock.timed(part, own)))
    return changes


class Idle(feeding.Gathering):
    """Gathers nothing."""

    def __call__(self, step: int) -> Sequence[Any]:
        """Return a batch as it is."""
        return self.batch


def no_device() -> list[tuple[Any, str, Any]]:
    """Return what takes a device's place that does nothing, at no cost.

    Trials, which compare what is trained, are made with the real one.
    """

    def move(*tensors: Any) -> list[Any]:
        for tensor in tensors[:2]:  # Weight and bias: a model that did not change
            tensor.add_(1)  # would cost the server more.
        return []

    moves = step.MadeStep(move, [], 1)
    find = CohortTrainer._trainer

    def found(*given: Any) -> batched.BatchedTrainer:
        trainer = find(*given)
        feed = trainer._feeder.feed
        trainer._step.trace = lambda *given, **named: moves  # type: ignore[method-assign]
        trainer._feeder.feed = lambda *given: Idle(**vars(feed(*given)))  # type: ignore[method-assign]
        return trainer

    return [(CohortTrainer, "_trainer", found)]


def data_of(clients: int, examples: int) -> DataSet:
    """Return examples for so many clients, as many each."""
    stream = np.random.default_rng(0)
    x = stream.standard_normal((clients * examples, FEATURES), dtype=np.float32)
    y = stream.integers(0, CLASSES, len(x))
    every = Examples(x, y)
    owners = np.repeat(np.arange(clients), examples)
    test = every.take(slice(0, 1))
    return DataSet("noise", every, test, CLASSES, natural_clients=owners)


def measure(
    cohort: int, examples: int, rounds: int, device: str, settings: list[str]
) -> results.Row:
    """Return microseconds of CPU a client, whole and part by part.

    Means over rounds; the first one, in which steps are traced, is not counted.
    """
    clock = Clock()
    seen: list[dict[str, float]] = []

    def after(progress: Any) -> None:
        clock.turn("rest")
        clock.turn(None)
        seen.append(dict(clock.seconds))

    told = [
        f"run.rounds={rounds + 1}",
        f"run.evaluate-every={rounds + 1}",
        "data.held-out=0",
        "data.proxy=0",
        "partition.name=natural",
        f"partition.clients={cohort}",
        "model.name=softmax",
        "strategy.fraction-evaluate=0",
        "training.epochs=1",
        "training.batch-size=32",
        "engine.name=local",
        "engine.threads=1",
        f"engine.plan=batched-{cohort}",
        *settings,
    ]
    changes = timed_parts(clock) + (no_device() if device == "none" else [])
    gc.callbacks.append(clock.collects)
    try:
        with tempfile.TemporaryDirectory() as folder, in_place(changes):
            fedweight.run(
                settings=told,
                dataset=data_of(cohort, examples),
                out=Path(folder) / "run",
                progress=after,
                report=False,
            )
    finally:
        gc.callbacks.remove(clock.collects)
    # Of round 0, of the first one, and of the end of the run nothing.
    first, last = seen[1], seen[-1]
    scale = 1e6 / (cohort * rounds)
    parts = {name: (last[name] - first.get(name, 0.0)) * scale for name in last}
    row: results.Row = {"device": device, "cohort": cohort, "examples": examples}
    row["microseconds"] = sum(parts.values())
    row |= {name: parts.get(name, 0.0) for name in NAMES}
    row["rounds"] = rounds
    return row


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cohorts", nargs="+", type=int, default=[100, 1000, 10000])
    parser.add_argument("--examples", nargs="+", type=int, default=[8])
    parser.add_argument("--devices", nargs="+", default=["none", "cpu"])
    parser.add_argument("--rounds", type=int, default=10, help="that are measured")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="default: results/host-DATE.json"
    )
    options = parser.parse_args(arguments)
    rows = []
    for device in options.devices:
        for cohort in options.cohorts:
            for examples in options.examples:
                print(f"{device}: {cohort} clients ...", file=sys.stderr, flush=True)
                rows.append(
                    measure(cohort, examples, options.rounds, device, options.set)
                )
    rows = results.stamp(rows)
    results.show(rows, COLUMNS)
    print(f"written to {results.write(rows, 'host', options.json)}")


if __name__ == "__main__":
    main()
