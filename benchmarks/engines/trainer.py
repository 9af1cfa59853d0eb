"""fedweight's training of many clients at once, without rounds around it.

Started with a folder that it leaves alone, a model's letter, how many clients train at
once, and the device. A round is one update of all of them: the models stay on the
device and are summed there. Where so many do not fit, half as many train at once; the
facts say how many that were.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fedweight
from fedweight.clients import TrainingSettings
from fedweight.clients.objectives import Plain
from fedweight.clients.steps.batched import BatchedTrainer
from fedweight.clients.steps.loop import train
from fedweight.clients.steps.task import Task, Tasks
from fedweight.core.limits import is_too_large
from fedweight.core.module import FlatModule
from fedweight.core.rng import Purpose, keys
from fedweight.data import Examples
from fedweight.data.parts import Parts

from .card import name_of
from .job import MODELS, draw
from .work import BATCH, LEARNING_RATE, SAMPLES
from .worker import Worker

STEPS = SAMPLES // BATCH
SETTINGS = TrainingSettings(batch_size=BATCH, learning_rate=LEARNING_RATE)

# So many clients are compared with training one by one, and so many have data of
# their own; more clients begin again with the first one's.
COMPARED, CLIENTS = 8, 1024


def least_bytes(num_parameters: int, example_bytes: int) -> int:
    """Return the bytes that a client update moves, at the least.

    The weights are written at the start; every step reads them for the logits, and
    reads and writes them to change them; the sum reads them. Each example is read
    once. What lies between layers is left out, as it may stay in the card's cache.
    """
    return 4 * num_parameters * (3 * STEPS + 2) + SAMPLES * example_bytes


def operations_of(model: str) -> int:
    """Return the floating-point operations of a client update, products only."""
    module = MODELS[model]()
    x, y = draw(np.random.default_rng(0), model, BATCH)
    with FlopCounterMode(display=False) as counter:
        logits = module(torch.from_numpy(x))
        F.cross_entropy(logits, torch.from_numpy(y)).backward()
    return STEPS * counter.get_total_flops()


def make(model: str, device: str) -> FlatModule:
    """Return a model with fixed weights."""
    torch.manual_seed(0)
    return FlatModule(MODELS[model](), device)


def tasks_of(model: str, count: int) -> Tasks:
    """Return the first tasks of some clients, whose data are rows of one array."""
    clients = min(count, CLIENTS)
    x, y = draw(np.random.default_rng(0), model, clients * SAMPLES)
    first = np.arange(count) % clients * SAMPLES
    return Tasks(
        Parts(Examples(x, y), first, np.full(count, SAMPLES)),
        np.ones(count, np.int64),
        keys(0, Purpose.SHUFFLE, 1, range(count)),
        np.zeros(count, np.uint64),
    )


def alone(model: str, tasks: Sequence[Task]) -> list[Tensor]:
    """Return the parameters of clients that train one by one on the CPU."""
    module = make(model, "cpu")
    start = module.save()
    return [
        train(
            module, start, task, Plain(), SETTINGS, learning_rate=LEARNING_RATE
        ).model.parameters
        for task in tasks
    ]


def at_once(model: str, tasks: Sequence[Task], device: str) -> Callable[[], Tensor]:
    """Return what trains the clients at once, adds them up, and returns ``[C, P]``."""
    module = make(model, device)
    trainer = BatchedTrainer(module, Plain(), SETTINGS)
    start = module.save()
    total = torch.zeros_like(module.parameters)
    weights = torch.full((len(tasks),), 1 / len(tasks), device=device)

    def update() -> Tensor:
        rows = trainer.train_rows(start, tasks, learning_rate=LEARNING_RATE).rows
        torch.mv(rows.T, weights, out=total)
        return rows

    return update


def as_many_as_fit(
    make: Callable[[int], Callable[[], Tensor]], chunk: int
) -> tuple[int, Callable[[], Tensor], Tensor]:
    """Return how many clients were trained at once, what trains them, and their rows.

    Half as many each time that so many are too many, and at least two.
    """
    while True:
        update = make(chunk)
        try:
            return chunk, update, update()
        except RuntimeError as error:
            if chunk < 4 or not is_too_large(error):
                raise
        # Outside of the handler, whose traceback held what did not fit.
        del update
        chunk //= 2
        gc.collect()
        torch.cuda.empty_cache()


def difference(rows: Tensor, expected: Sequence[Tensor]) -> float:
    """Return the largest difference of a client's row, relative to what is expected.

    Rows beyond the expected ones are left out; what is not a number counts as 1e9.
    """
    worst = 0.0
    for row, alike in zip(rows.cpu(), expected, strict=False):
        relative = float((row - alike).abs().max() / alike.abs().max())
        worst = max(worst, relative if math.isfinite(relative) else 1e9)
    return worst


def main() -> None:
    """Run updates as told."""
    versions = f"fedweight {fedweight.__version__}, PyTorch {torch.__version__}"
    run(Worker(versions), at_once)


def run(
    worker: Worker, at_once: Callable[[str, Tasks, str], Callable[[], Tensor]]
) -> None:
    """Run updates as told, by what trains clients at once.

    What it is given and returns is as in :func:`at_once`.
    """
    model, told, device = sys.argv[2], int(sys.argv[3]), sys.argv[4]
    name_of(device)
    tasks = tasks_of(model, told)
    expected = alone(model, tasks[:COMPARED])
    chunk, update, rows = as_many_as_fit(
        lambda count: at_once(model, tasks[:count], device), told
    )
    worker.facts |= {
        "chunk": chunk,
        "difference": difference(rows, expected),
        "steps": STEPS,
        "bytes": chunk * least_bytes(len(expected[0]), tasks[0].examples.x[0].nbytes),
        "operations": chunk * operations_of(model),
    }
    first = rows[0].cpu().numpy()
    del rows
    while worker.next_round(lambda: first):
        update()


if __name__ == "__main__":
    main()
