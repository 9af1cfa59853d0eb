"""What bounds the training of many clients at once on a GPU.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json

For so many clients at once, with the models left on the device and summed there: client
updates a second, agreement with training one by one on the CPU, and how far that is
from what the card can do. Whole rounds, and what others need for them, are measured by
``throughput.py --device cuda``. See README.md.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from engines import results
from engines.job import MODELS, name_of
from engines.work import BATCH, CLASSES, INPUT_SHAPES, LEARNING_RATE, SAMPLES
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fedweight.clients import TrainingSettings
from fedweight.clients.objectives import Plain
from fedweight.clients.steps.batched import BatchedTrainer
from fedweight.clients.steps.loop import train
from fedweight.clients.steps.task import Task
from fedweight.core.module import FlatModule
from fedweight.core.rng import Purpose, keys
from fedweight.data import Examples

STEPS = SAMPLES // BATCH
SETTINGS = TrainingSettings(batch_size=BATCH, learning_rate=LEARNING_RATE)

# So many clients are compared with training one by one, and so many have data of
# their own; more clients begin again with the first one's.
COMPARED, CLIENTS = 8, 1024

COLUMNS = (
    "work",
    "chunk",
    "updates_per_second",
    "difference",
    "launches_per_step",
    "over_launches",
    "over_memory",
    "over_arithmetic",
    "note",
)


@dataclass(frozen=True)
class Card:
    """What a card does in a second.

    Attributes
    ----------
    launches : float
        Operations on a single number, one after another in a CUDA graph.
    bytes : float
        Read and written by copying 1 GiB.
    operations : float
        Floating-point operations of a large float32 matrix product.
    """

    launches: float
    bytes: float
    operations: float

    @classmethod
    def measured(cls, seconds: float) -> Card:
        """Measure the CUDA device, about so many seconds for each figure."""
        one = torch.zeros(1, device="cuda")
        source = torch.zeros(1 << 28, device="cuda")
        target = torch.empty_like(source)
        n = 8192
        a, b, c = (torch.randn(n, n, device="cuda") for _ in range(3))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(1000):
                one.add_(1)
        launches = 1000 * rate(graph.replay, seconds)
        copies = rate(lambda: target.copy_(source), seconds, block=10)
        products = rate(lambda: torch.mm(a, b, out=c), seconds, block=10)
        return cls(launches, 2 * source.nbytes * copies, 2 * n**3 * products)


def rate(call: Callable[[], object], seconds: float, block: int = 1) -> float:
    """Return how many calls a second finish, ``block`` of them queued at a time."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(block):
            call()
        torch.cuda.synchronize()
        done += block
    return done / (time.perf_counter() - began)


def launches_of(call: Callable[[], object]) -> int:
    """Return how many kernels and copies a call starts on the device."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in seen.events())


def least_bytes(num_parameters: int, example_bytes: int) -> int:
    """Return the bytes that a client update moves, at the least.

    The weights are written at the start; every step reads them for the logits, and
    reads and writes them to change them; the sum reads them. Each example is read
    once. What lies between layers is left out, as it may stay in the card's cache.
    """
    return 4 * num_parameters * (3 * STEPS + 2) + SAMPLES * example_bytes


def operations_of(work: str) -> int:
    """Return the floating-point operations of a client update, products only."""
    module = MODELS[work]()
    with FlopCounterMode(display=False) as counter:
        logits = module(torch.zeros(BATCH, *INPUT_SHAPES[work]))
        F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.int64)).backward()
    return STEPS * counter.get_total_flops()


def over_bounds(
    card: Card, seconds: float, launches: float, bytes: float, operations: float
) -> dict[str, float]:
    """Return a time in times of what each count would take the card by itself.

    The smallest of the three names what bounds it.
    """
    return {
        "over_launches": seconds * card.launches / launches,
        "over_memory": seconds * card.bytes / bytes,
        "over_arithmetic": seconds * card.operations / operations,
    }


def make(work: str, device: str) -> FlatModule:
    """Return a work's model with fixed weights."""
    torch.manual_seed(0)
    return FlatModule(MODELS[work](), device)


def tasks_of(work: str, count: int) -> list[Task]:
    """Return the first tasks of some clients, whose data are views of one array."""
    clients = min(count, CLIENTS)
    rng = np.random.default_rng(0)
    shape = (clients * SAMPLES, *INPUT_SHAPES[work])
    x = rng.standard_normal(shape, dtype=np.float32)
    y = rng.integers(0, CLASSES, len(x))
    orders = keys(0, Purpose.SHUFFLE, 1, range(count))
    starts = [k % clients * SAMPLES for k in range(count)]
    parts = [slice(start, start + SAMPLES) for start in starts]
    return [
        Task(Examples(x[part], y[part]), 1, int(order))
        for part, order in zip(parts, orders, strict=True)
    ]


def alone(work: str, tasks: Sequence[Task]) -> list[Tensor]:
    """Return the parameters of clients that train one by one on the CPU."""
    module = make(work, "cpu")
    start = module.save()
    return [
        train(
            module, start, task, Plain(), SETTINGS, learning_rate=LEARNING_RATE
        ).model.parameters
        for task in tasks
    ]


def at_once(work: str, tasks: Sequence[Task], device: str) -> Callable[[], Tensor]:
    """Return what trains the clients at once, adds them up, and returns ``[C, P]``."""
    module = make(work, device)
    trainer = BatchedTrainer(module, Plain(), SETTINGS)
    start = module.save()
    total = torch.zeros_like(module.parameters)
    weights = torch.full((len(tasks),), 1 / len(tasks), device=device)

    def update() -> Tensor:
        rows = trainer.train_rows(start, tasks, learning_rate=LEARNING_RATE).rows
        torch.mv(rows.T, weights, out=total)
        return rows

    return update


def difference(rows: Tensor, expected: Sequence[Tensor]) -> float:
    """Return the largest difference of a client's row, relative to what is expected.

    Rows beyond the expected ones are left out; what is not a number counts as 1e9.
    """
    worst = 0.0
    for row, alike in zip(rows.cpu(), expected, strict=False):
        relative = float((row - alike).abs().max() / alike.abs().max())
        worst = max(worst, relative if math.isfinite(relative) else 1e9)
    return worst


def measure(
    work: str,
    tasks: Sequence[Task],
    expected: Sequence[Tensor],
    card: Card,
    seconds: float,
) -> results.Row:
    """Return the row of one work and number of clients at once."""
    chunk = len(tasks)
    row: results.Row = dict.fromkeys(COLUMNS)
    row |= {"work": work, "chunk": chunk, "note": ""}
    parameters = len(expected[0])
    moved = chunk * least_bytes(parameters, tasks[0].examples.x[0].nbytes)
    try:
        update = at_once(work, tasks, "cuda")
        row["difference"] = difference(update(), expected)
        a_second = rate(update, seconds)
        launches = launches_of(update)
    except torch.cuda.OutOfMemoryError as error:
        return {**row, "note": str(error).split(".")[0]}
    row["updates_per_second"] = chunk * a_second
    row["launches_per_step"] = launches / STEPS
    operations = chunk * operations_of(work)
    return row | over_bounds(card, 1 / a_second, launches, moved, operations)


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", nargs="+", default=["S", "M"], choices=MODELS)
    parser.add_argument("--chunks", nargs="+", type=int, default=[64, 256, 1024, 4096])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="default: results/gpu-DATE.json"
    )
    options = parser.parse_args(arguments)
    device = name_of("cuda")
    card = Card.measured(min(options.seconds, 1.0))
    print(
        f"{device}: {card.launches:.4g} launches, {card.bytes / 1e9:.4g} GB and "
        f"{card.operations / 1e9:.4g} GFLOP a second",
        flush=True,
    )
    rows: list[results.Row] = []
    for work in options.work:
        tasks = tasks_of(work, max(options.chunks))
        expected = alone(work, tasks[:COMPARED])
        for chunk in options.chunks:
            print(f"{work}: {chunk} at once ...", file=sys.stderr, flush=True)
            row = measure(work, tasks[:chunk], expected, card, options.seconds)
            rows.append({**row, "device": device, "card": asdict(card)})
    rows = results.stamp(rows)
    results.show(rows, COLUMNS)
    print(f"written to {results.write(rows, 'gpu', options.json)}")


if __name__ == "__main__":
    main()
