"""fedweight on its local grid, in this process; see also :mod:`engines.ray`."""

import contextlib
import copy
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid
from torch import nn

import fedweight
from fedweight.clients import TrainingApp, TrainingSettings, client_number
from fedweight.core.module import FlatModule
from fedweight.data import ClientData, Examples
from fedweight.data.parts import Parts
from fedweight.messages.arrays import FlatRecord
from fedweight.simulations import Plan
from fedweight.simulations.engine import make_grid
from fedweight.simulations.planner import choose_plan, machine, plans_for
from fedweight.strategies.base import WeightingStrategy
from fedweight.strategies.fedavg import FedAvg
from fedweight.strategies.fedce import FedCE
from fedweight.strategies.fedlaw import FedLAW
from fedweight.strategies.ida import IDA

from .job import MODELS, flat
from .work import BATCH, CLASSES, LEARNING_RATE, SAMPLES, SEED
from .worker import Worker, start

# Of the run for which a plan is chosen: it may take 2% of that.
ROUNDS = 100

STRATEGIES: dict[str, type[WeightingStrategy]] = {
    "fedavg": FedAvg,
    "fedce": FedCE,
    "ida": IDA,
}

# The server's examples, of the first clients', and the held-out ones of a client, of
# its own: which they are does not matter to the speed.
PROXY, HELD_OUT = 256, 32


def run(
    worker: Worker,
    *,
    model: Callable[[], nn.Module],
    first: nn.Module,
    x: npt.NDArray[np.float32],
    y: npt.NDArray[np.int64],
    clients: int,
    cohort: int,
    engine: str,
    workers: int | None,
    plan: Plan | None = None,
    device: str = "cpu",
    gpu_share: float = 0.0,
    strategy: str = "fedavg",
) -> None:
    """Run rounds as told, with an app, a strategy and a grid as a user makes them.

    Parameters
    ----------
    worker : Worker
        Tells when a round may begin.
    model : Callable
        Makes the architecture.
    first : nn.Module
        Has the weights to start from.
    x, y : ndarray
        The examples, one client after the other; clients beyond their end begin
        again at the start.
    clients, cohort : int
        How many there are, and how many of them train in a round.
    engine : {"local", "ray"}
        Where they train.
    workers : int, optional
        Worker processes, for Ray.
    plan : Plan, optional
        How clients train; by default what a short measurement finds.
    device : str
        On what they train.
    gpu_share : float
        The share of a card that each of Ray's workers gets.
    strategy : str
        How clients are weighed: a name of :data:`STRATEGIES`, or FedLAW's.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)
    held_out = HELD_OUT if strategy == "fedce" else 0

    def data(context: Context) -> ClientData:
        begin = client_number(context) * SAMPLES % len(y)
        part, held = (slice(begin, begin + n) for n in (SAMPLES, held_out))
        return ClientData(Examples(x[part], y[part]), Examples(x[held], y[held]))

    def parts(numbers: Sequence[int]) -> Parts:
        first = np.asarray(numbers, np.int64) * SAMPLES % len(y)
        return Parts(Examples(x, y), first, np.full(len(first), SAMPLES))

    app = TrainingApp(
        model,
        data,
        parts=parts,
        num_classes=CLASSES,
        settings=TrainingSettings(
            epochs=1, batch_size=BATCH, learning_rate=LEARNING_RATE
        ),
        seed=SEED,
        device=device,
    )
    record = FlatRecord(FlatModule(copy.deepcopy(first)).save())
    if plan is None:
        plan = choose_plan(
            lambda device: app,
            record,
            {device: plans_for(device, first, cohort)},
            clients=range(cohort),
            num_clients=clients,
            cohort=cohort,
            rounds=ROUNDS,
            about={"model": str(first), "cohort": cohort, **machine()},
        ).plan
    worker.version += f", {plan}"
    worker.facts["plan"] = str(plan)
    weighing = weighing_of(
        strategy,
        first,
        Examples(x[:PROXY], y[:PROXY]),
        device,
        fraction_train=cohort / clients,
        min_train_nodes=cohort,
        fraction_evaluate=0.0,
        seed=SEED,
    )
    with make_grid(
        app,
        clients,
        engine=engine,
        workers=workers,
        gpus_per_worker=gpu_share,
        plan=plan,
    ) as grid:
        run_rounds(worker, grid, record, weighing)


def weighing_of(
    name: str, model: nn.Module, proxy: Examples, device: str, **options: Any
) -> WeightingStrategy:
    """Return a strategy by its name, with what it learns on where it does."""
    if name == "fedlaw":
        return FedLAW(model=model, proxy=proxy, device=device, **options)
    return STRATEGIES[name](**options)


def run_rounds(
    worker: Worker, grid: Grid, first: ArrayRecord, strategy: WeightingStrategy
) -> None:
    """Let a strategy run rounds as long as it has leave."""

    def next_round(round: int, arrays: ArrayRecord) -> None:
        if not worker.next_round(lambda: flat(arrays.to_numpy_ndarrays())):
            raise Over

    with contextlib.suppress(Over):
        strategy.start(grid, first, num_rounds=sys.maxsize, evaluate_fn=next_round)


class Over(Exception):
    """There is no leave for another round."""


def main(engine: str = "local") -> None:
    """Run rounds of the job."""
    worker, job = start(f"fedweight {fedweight.__version__}")
    run(
        worker,
        model=MODELS[job.work.model],
        first=job.model(),
        x=job.x,
        y=job.y,
        clients=job.cohort,
        cohort=job.cohort,
        engine=engine,
        workers=job.workers if engine == "ray" else None,
        plan=Plan.parse(job.plan),
        device=job.device,
        gpu_share=job.gpu_share,
        strategy=job.strategy,
    )


if __name__ == "__main__":
    main()
