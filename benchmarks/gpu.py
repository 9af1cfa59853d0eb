"""How fast clients train on a GPU: many at once, against one after another.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json

Works S and M of benchmarks/README.md. For each: agreement with training one by one on
the CPU, client updates a second with the models left on the device and summed there,
and what bounds them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedweight.clients import TrainingSettings
from fedweight.clients.batched import BatchedTrainer
from fedweight.clients.objectives import Plain
from fedweight.clients.training import Task, train
from fedweight.data.examples import Examples
from fedweight.parameters import FlatModule
from fedweight.rng import Purpose, keys

EXAMPLES, BATCH, RATE = 128, 32, 0.05


def model_s() -> nn.Module:
    """784-64-10, 50,890 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def model_m() -> nn.Module:
    """Two convolutions and two dense layers, 582,026 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


MODELS = {"S": model_s, "M": model_m}


def make(work: str) -> nn.Module:
    """Return a work's model with fixed weights."""
    torch.manual_seed(0)
    return MODELS[work]()


def tasks_of(clients: int, count: int) -> list[Task]:
    """Return the first tasks of some clients, whose data are views of one array."""
    rng = np.random.Generator(np.random.PCG64(0))
    x = rng.standard_normal((clients * EXAMPLES, 1, 28, 28), dtype=np.float32)
    y = rng.integers(0, 10, clients * EXAMPLES)
    orders = keys(0, Purpose.SHUFFLE, 1, range(count))
    parts = [
        slice(k % clients * EXAMPLES, (k % clients + 1) * EXAMPLES)
        for k in range(count)
    ]
    return [
        Task(Examples(x[part], y[part]), 1, int(order))
        for part, order in zip(parts, orders, strict=True)
    ]


def agreement(work: str, tasks: list[Task], device: str) -> float:
    """Return the largest relative difference from training one by one on the CPU."""
    settings = TrainingSettings(batch_size=BATCH, learning_rate=RATE)
    module = FlatModule(make(work))
    start = module.save()
    alone = [
        train(module, start, task, Plain(), settings, learning_rate=RATE).model
        for task in tasks
    ]
    trainer = BatchedTrainer(FlatModule(make(work), device), Plain(), settings)
    together = trainer.train(start, tasks, learning_rate=RATE)
    worst = 0.0
    for a, b in zip(alone, together, strict=True):
        difference = (a.parameters - b.model.parameters).abs().max()
        worst = max(worst, float(difference / a.parameters.abs().max()))
    return worst


def eager(work: str, tasks: list[Task], device: str, seconds: float) -> float:
    """Return the updates a second of a plain loop of PyTorch, data on the device."""
    module = make(work).to(device)
    start = [p.detach().clone() for p in module.parameters()]
    x = [torch.from_numpy(t.examples.x).to(device) for t in tasks[:64]]
    y = [torch.from_numpy(t.examples.y).to(device) for t in tasks[:64]]

    def update(k: int) -> None:
        with torch.no_grad():
            for p, s in zip(module.parameters(), start, strict=True):
                p.copy_(s)
        optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
        for first in range(0, EXAMPLES, BATCH):
            optimizer.zero_grad()
            logits = module(x[k][first : first + BATCH])
            loss = nn.functional.cross_entropy(logits, y[k][first : first + BATCH])
            loss.backward()
            optimizer.step()

    return rate(lambda n: [update(k % len(x)) for k in range(n)], 64, seconds)


def batched(
    work: str, tasks: list[Task], device: str, chunk: int, seconds: float
) -> float:
    """Return the updates a second in chunks, summed on the device."""
    settings = TrainingSettings(batch_size=BATCH, learning_rate=RATE)
    module = FlatModule(make(work), device)
    trainer = BatchedTrainer(module, Plain(), settings)
    start = module.save()
    total = torch.zeros(module.layout.num_parameters, device=device)
    weights = torch.full((chunk,), 1 / chunk, device=device)

    def updates(n: int) -> None:
        for first in range(0, n, chunk):
            place = first % (len(tasks) - chunk + 1)
            rows = trainer.train_rows(
                start, tasks[place : place + chunk], learning_rate=RATE
            ).rows
            total.addmv_(rows.T, weights)

    return rate(updates, chunk, seconds)


def rate(work: Any, block: int, seconds: float) -> float:
    """Return how many a second ``work(n)`` does, after a warm-up."""
    for _ in range(3):
        work(block)
    torch.cuda.synchronize()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        work(block)
        torch.cuda.synchronize()
        done += block
    return done / (time.perf_counter() - began)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", nargs="+", default=["S", "M"], choices=MODELS)
    parser.add_argument("--chunks", nargs="+", type=int, default=[64, 256, 1024, 4096])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA device here: nothing is measured.")
    card = torch.cuda.get_device_name()
    rows = []
    for work in given.work:
        count = max(given.chunks)
        tasks = tasks_of(clients=min(count, 1024), count=count)
        row = {"work": work, "engine": "agreement", "chunk": 8}
        row["difference"] = agreement(work, tasks[:8], "cuda")
        rows.append(row)
        print(row, flush=True)
        for chunk in [1, *given.chunks]:
            engine = "eager loop" if chunk == 1 else "batched"
            row = {"work": work, "engine": engine, "chunk": chunk}
            try:
                row["updates_per_second"] = (
                    eager(work, tasks, "cuda", given.seconds)
                    if chunk == 1
                    else batched(work, tasks, "cuda", chunk, given.seconds)
                )
            except torch.cuda.OutOfMemoryError as error:
                row["note"] = str(error).split(".")[0]
            rows.append(row)
            print(row, flush=True)
    if given.json:
        today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
        content = {"date": today, "card": card, "torch": torch.__version__}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps({**content, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
