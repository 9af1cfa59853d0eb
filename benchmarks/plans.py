"""The plan that `auto` chooses beside every plan by hand, on the devices of a machine.

Whole rounds of fedweight's local grid, with all clients taking part. The plans by hand
are measured in turns; what `auto` chose counts as fast as the same plan by hand, so
that noise does not decide. Every row is written as soon as it is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from engines import results
from engines.job import MODELS, name_of
from engines.work import BATCH, CLASSES, INPUT_SHAPES, LEARNING_RATE, SAMPLES, SEED
from flwr.app import ArrayRecord, Context
from torch import nn

from fedweight.clients import TrainingApp, TrainingSettings, client_number
from fedweight.core.module import FlatModule
from fedweight.core.threads import num_cores
from fedweight.data import ClientData, Examples
from fedweight.messages.arrays import FlatRecord
from fedweight.models import build
from fedweight.simulations import Plan
from fedweight.simulations.engine import make_grid
from fedweight.simulations.planner import (
    Choice,
    choose_plan,
    convolves,
    machine,
    plans_for,
)
from fedweight.strategies.fedavg import FedAvg

# By its name, the model, the shape of an example, and how many classes there are; a
# text of 80 different characters.
TEXT = "char-gru"
LENGTH, CHARACTERS = 20, 80

COHORTS = {"S": (20, 100, 1_000, 10_000), "M": (20, 100, 1_000), "L": (4, 20)}
COHORTS[TEXT] = (20, 100, 1_000)

# Clients have one of so many different parts of the examples, to spare memory.
PARTS = 1_000

WARM_UP = 2

COLUMNS = (
    "work",
    "cohort",
    "device",
    "plan",
    "updates_per_second",
    "chosen",
    "ratio_to_best",
    "seconds_to_choose",
    "note",
)


class Job:
    """A model, and clients with noise for data.

    Parameters
    ----------
    work : str
        S, M or L, or the text model.
    cohort : int
        How many clients there are, and train in every round.
    """

    def __init__(self, work: str, cohort: int) -> None:
        self.work, self.cohort = work, cohort
        rng = np.random.default_rng(SEED)
        count = min(cohort, PARTS) * SAMPLES
        self.classes = CHARACTERS if work == TEXT else CLASSES
        if work == TEXT:
            self.x = rng.integers(0, CHARACTERS, (count, LENGTH))
        else:
            shape = (count, *INPUT_SHAPES[work])
            self.x = rng.standard_normal(shape, dtype=np.float32)
        self.y = rng.integers(0, self.classes, count)
        self.first = FlatRecord(FlatModule(self.model()).save())
        self._apps: dict[str, TrainingApp] = {}

    def model(self) -> nn.Module:
        """Make the architecture."""
        if self.work == TEXT:
            return build(TEXT, (LENGTH,), CHARACTERS)
        return MODELS[self.work]()

    def data(self, context: Context) -> ClientData:
        """Return a client's part."""
        begin = client_number(context) * SAMPLES % len(self.y)
        part = slice(begin, begin + SAMPLES)
        nothing = Examples(self.x[:0], self.y[:0])
        return ClientData(Examples(self.x[part], self.y[part]), nothing)

    def app(self, device: str) -> TrainingApp:
        """Return the app that trains on a device."""
        if device not in self._apps:
            self._apps[device] = TrainingApp(
                self.model,
                self.data,
                num_classes=self.classes,
                settings=TrainingSettings(
                    epochs=1, batch_size=BATCH, learning_rate=LEARNING_RATE
                ),
                seed=SEED,
                device=device,
            )
        return self._apps[device]

    def choose(self, devices: Sequence[str], rounds: int) -> Choice:
        """Let `auto` choose, with nothing remembered."""
        with tempfile.TemporaryDirectory() as folder:
            return choose_plan(
                self.app,
                self.first,
                {d: plans_for(d, self.model(), self.cohort) for d in devices},
                clients=range(self.cohort),
                num_clients=self.cohort,
                cohort=self.cohort,
                rounds=rounds,
                about={"model": str(self.model()), **machine()},
                cache=Path(folder) / "plans.json",
            )

    def by_hand(self, device: str) -> list[Plan]:
        """Return what somebody might try."""
        plans = {*plans_for(device, self.model(), self.cohort)}
        each = self.cohort // num_cores()
        if device == "cpu" and not convolves(self.model()):
            plans = {p for p in plans if p.chunk <= 80} | {Plan(max(1, each))}
        return sorted(plans, key=lambda plan: plan.chunk)

    def rate(self, device: str, plan: Plan, seconds: float) -> float:
        """Return the client updates a second of whole rounds."""
        strategy = FedAvg(
            fraction_train=1.0,
            min_train_nodes=self.cohort,
            fraction_evaluate=0.0,
            seed=SEED,
        )
        ended: list[float] = []

        def next_round(round: int, arrays: ArrayRecord) -> None:
            ended.append(time.perf_counter())
            warm = ended[WARM_UP:]
            if len(warm) > 1 and warm[-1] - warm[0] >= seconds:
                raise Over

        with (
            contextlib.suppress(Over),
            make_grid(
                self.app(device), self.cohort, engine="local", plan=plan, seed=SEED
            ) as grid,
        ):
            strategy.start(
                grid, self.first, num_rounds=sys.maxsize, evaluate_fn=next_round
            )
        warm = ended[WARM_UP:]
        return self.cohort * (len(warm) - 1) / (warm[-1] - warm[0])


class Over(Exception):
    """There were rounds enough."""


def compare(
    job: Job,
    devices: Sequence[str],
    rounds: int,
    seconds: float,
    turns: int,
    tell: Callable[[results.Row], None],
) -> None:
    """Measure a work, and tell of every row."""
    choice = job.choose(devices, rounds)
    pairs = [(device, plan) for device in devices for plan in job.by_hand(device)]
    if (choice.device, choice.plan) not in pairs:
        pairs.append((choice.device, choice.plan))
    rates: dict[tuple[str, Plan], float] = {}
    notes: dict[tuple[str, Plan], str] = {}
    for _ in range(turns):
        for pair in pairs:
            try:
                rate = job.rate(*pair, seconds)
            except (RuntimeError, MemoryError) as error:
                notes[pair] = str(error).split("\n", 1)[0]
                continue
            rates[pair] = max(rate, rates.get(pair, 0.0))
            if pair[0] != "cpu":
                job.app(pair[0]).let_go()
    best = max(rates.values())
    for device, plan in pairs:
        row: results.Row = dict.fromkeys(COLUMNS)
        row |= {"work": job.work, "cohort": job.cohort, "plan": str(plan)}
        row["device"] = name_of(device)
        row["note"] = notes.get((device, plan), "")
        row["chosen"] = (device, plan) == (choice.device, choice.plan)
        if (device, plan) in rates:
            row["updates_per_second"] = rates[device, plan]
            row["ratio_to_best"] = rates[device, plan] / best
        if row["chosen"]:
            row["seconds_to_choose"] = choice.why.get("seconds")
            row["measured"] = choice.why.get("measured")
        tell(row)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--works", nargs="+", default=[*COHORTS], choices=COHORTS)
    parser.add_argument("--cohorts", nargs="+", type=int)
    parser.add_argument(
        "--devices", nargs="+", help="default: the card, if there is one, and the CPU"
    )
    parser.add_argument(
        "--rounds", type=int, default=100, help="of the run that is planned for"
    )
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="default: results/plans-DATE.json"
    )
    options = parser.parse_args(arguments)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    cards = ["cuda"] if torch.cuda.device_count() else []
    devices = options.devices or [*cards, "cpu"]
    rows: list[results.Row] = []
    file: Path | None = options.json

    def tell(row: results.Row) -> None:
        nonlocal file
        rows.append(row)
        shown = {k: v for k, v in row.items() if v not in (None, "", False)}
        shown.pop("measured", None)
        print(
            "  ".join(
                f"{k}={v:.4g}" if isinstance(v, float) else f"{v}"
                for k, v in shown.items()
            ),
            flush=True,
        )
        if rows[:-1]:
            results.write(results.stamp(rows), "plans", file)
        else:
            file = results.write(results.stamp(rows), "plans", file)

    for work in options.works:
        for cohort in options.cohorts or COHORTS[work]:
            print(f"{work}, {cohort} clients ...", file=sys.stderr, flush=True)
            job = Job(work, cohort)
            compare(job, devices, options.rounds, options.seconds, options.turns, tell)
    results.show(rows, COLUMNS)
    print(f"written to {file}")


if __name__ == "__main__":
    main()
