"""What aggregation costs, beside reading the clients' models once.

Each strategy aggregates a round of random models in memory: what is measured is its
``aggregate``, with default settings. ``ratio`` is that by ``read_seconds``, the time
to sum up each model once with as many threads; FedLAW's is by 40 times a backward
pass on a proxy batch and reading twice. All take turns; a row has the medians. What
has more rows than fit into memory, or than --largest, is skipped, and says so.

    python benchmarks/aggregation.py --clients 100 --parameters 2
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from engines import results
from torch import Tensor, nn

from fedweight.core.layout import FlatModel, Layout
from fedweight.core.updates import StackedUpdates
from fedweight.messages import keys
from fedweight.strategies import STRATEGIES, Round, WeightingStrategy, strategy_class

COLUMNS = (
    "strategy",
    "clients",
    "parameters",
    "threads",
    "seconds",
    "read_seconds",
    "ratio",
    "note",
)

CLASSES = 10
BATCH = 128
LAW_EPOCHS = 20  # With a proxy set of two batches: 40 steps.


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--strategies",
        nargs="+",
        choices=sorted(STRATEGIES.entries),
        default=["fedavg", "feddisco", "ida", "fedce", "fedlaw"],
    )
    parser.add_argument("--clients", nargs="+", type=int, default=[10, 100, 1000])
    parser.add_argument(
        "--parameters",
        nargs="+",
        type=float,
        default=[0.05, 0.58, 11],
        help="sizes of the model in millions of parameters",
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--seconds",
        type=float,
        default=15,
        help="no further repetition of a cohort and model after so long",
    )
    parser.add_argument(
        "--largest", type=float, default=8, help="skip rows of more than so many GB"
    )
    parser.add_argument(
        "--apart",
        action="store_true",
        help="models as vectors of their own, as real devices send them, "
        "instead of as rows of matrices, as simulated ones do",
    )
    parser.add_argument(
        "--clock",
        choices=["wall", "processor"],
        default="wall",
        help="processor time, with one thread, minds a busy machine less",
    )
    parser.add_argument("--json", type=Path, help="where to write the rows")
    given = parser.parse_args()
    if given.clock == "processor" and max(given.threads) > 1:
        parser.error("--clock processor adds up the threads' time; use --threads 1")
    clock = time.perf_counter if given.clock == "wall" else time.process_time
    rows: list[results.Row] = []
    for parameters, clients, threads in itertools.product(
        given.parameters, given.clients, given.threads
    ):
        rows += measure(
            given.strategies,
            clients,
            int(parameters * 1e6),
            threads,
            repetitions=given.repetitions,
            seconds=given.seconds,
            largest=given.largest * 1e9,
            apart=given.apart,
            clock=clock,
        )
    more = {"clock": given.clock, "apart": given.apart}
    rows = [{**row, **more} for row in results.stamp(rows)]
    results.show(rows, COLUMNS)
    print(f"written to {results.write(rows, 'aggregation', given.json)}")


def measure(
    strategies: list[str],
    clients: int,
    parameters: int,
    threads: int,
    *,
    repetitions: int,
    seconds: float,
    largest: float,
    apart: bool,
    clock: Callable[[], float],
) -> list[results.Row]:
    """Measure strategies and the reading in turns; return a row for each strategy."""
    net = model(parameters)
    layout = Layout.of_module(net)
    common: results.Row = {
        "clients": clients,
        "parameters": layout.num_parameters,
        "threads": threads,
        "seconds": None,
        "read_seconds": None,
        "ratio": None,
    }
    # What FedLAW and the next global model need is little beside the rows.
    rows_bytes = clients * layout.num_parameters * 4
    needed = rows_bytes + 12 * layout.num_parameters * 4
    if rows_bytes > largest or needed > memory():
        limit = "--largest" if rows_bytes > largest else "the free memory"
        note = f"skipped: rows of {rows_bytes / 1e9:.0f} GB, more than {limit}"
        return [{"strategy": name, **common, "note": note} for name in strategies]
    round = make_round(layout, clients, threads, apart)
    assert isinstance(round.updates, StackedUpdates)
    proxy = SimpleNamespace(
        x=torch.randn(2 * BATCH, FEATURES), y=torch.randint(CLASSES, (2 * BATCH,))
    )
    work: dict[str, Callable[[], Any]] = {"read": reader(round.updates.models, threads)}
    for name in strategies:
        work[name] = aggregation(name, net, proxy, round, threads)
    if "fedlaw" in strategies:
        work["backward"] = backward(net, proxy)
    times: dict[str, list[float]] = {name: [] for name in work}
    begun = time.perf_counter()
    for repetition in range(repetitions + 1):
        if repetition > 1 and time.perf_counter() - begun > seconds:
            break
        for name, run in work.items():
            start = clock()
            run()
            if repetition:  # The first one warms up.
                times[name].append(clock() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for name in strategies:
        floor, note = medians["read"], ""
        if name == "fedlaw":
            steps = 2 * LAW_EPOCHS
            floor = steps * (medians["backward"] + 2 * medians["read"])
            note = f"ratio to {steps} x (a backward pass + reading twice)"
        rows.append(
            {
                "strategy": name,
                **common,
                "seconds": medians[name],
                "read_seconds": medians["read"],
                "floor_seconds": floor,
                "ratio": medians[name] / floor,
                "measurements": times[name],
                "note": note,
            }
        )
    return rows


FEATURES = 784


def model(parameters: int) -> nn.Module:
    """Return a perceptron with two hidden layers and about so many parameters."""
    # width * (FEATURES + 1 + width + 1 + CLASSES) + CLASSES
    b = FEATURES + CLASSES + 2
    width = round(((b * b + 4 * parameters) ** 0.5 - b) / 2)
    return nn.Sequential(
        nn.Linear(FEATURES, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )


def make_round(layout: Layout, clients: int, threads: int, apart: bool) -> Round:
    """Return a round whose clients moved the global model by about a tenth."""
    stream = torch.Generator().manual_seed(0)
    size = layout.num_parameters
    origin = torch.randn(size, generator=stream) * 0.05
    # NumPy's memory, as the library's own: large vectors lie in large pages.
    shapes = [(1, size)] * clients if apart else [(clients, size)]
    matrices = [torch.from_numpy(np.empty(shape, np.float32)) for shape in shapes]
    models = [model for matrix in matrices for model in matrix]
    # The values do not matter to the time; drawing them all would take longest.
    steps = [torch.randn(size, generator=stream) * 0.005 for _ in range(4)]
    for k, model in enumerate(models):
        torch.add(origin, steps[k % 4].roll(k), alpha=1 + k / clients, out=model)
    counts = torch.randint(1, 50, (clients, CLASSES), generator=stream)
    errors = torch.rand(clients, generator=stream).tolist()
    return Round(
        number=1,
        clients=tuple(range(clients)),
        model=FlatModel(layout, origin, torch.zeros(0)),
        updates=StackedUpdates(models, origin, layout.offsets, threads=threads),
        num_examples=counts.sum(1).double(),
        metrics=tuple({keys.MINUS_ERROR: error} for error in errors),
        profiles=tuple({keys.LABEL_COUNTS: row} for row in counts.tolist()),
    )


def aggregation(
    name: str, net: nn.Module, proxy: Any, round: Round, threads: int
) -> Callable[[], Tensor]:
    """Return what makes the next global parameters of a round."""
    make: Any = strategy_class(name)
    strategy: WeightingStrategy
    if name == "fedlaw":
        strategy = make(
            model=net,
            proxy=proxy,
            server_epochs=LAW_EPOCHS,
            batch_size=BATCH,
            threads=threads,
        )
    else:
        strategy = make(threads=threads)
    begun = replace(round, state=strategy.begin())

    def aggregate() -> Tensor:
        made = strategy.aggregate(begun)
        return made[0] if isinstance(made, tuple) else made

    return aggregate


def reader(models: list[Tensor], threads: int) -> Callable[[], list[Tensor]]:
    """Return what reads every model once."""
    torch.set_num_threads(1)
    if threads == 1:
        return lambda: [model.sum() for model in models]
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def share(first: int) -> list[Tensor]:
        return [model.sum() for model in models[first::threads]]

    return lambda: list(pool.map(share, range(threads)))  # type: ignore[arg-type]


def backward(net: nn.Module, proxy: Any) -> Callable[[], None]:
    """Return what does one forward and backward pass on a proxy batch."""

    def run() -> None:
        net.zero_grad(set_to_none=False)
        scores = net(proxy.x[:BATCH])
        nn.functional.cross_entropy(scores, proxy.y[:BATCH]).backward()

    return run


def memory() -> int:
    """Return the bytes of memory that are free to be used."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


if __name__ == "__main__":
    main()
