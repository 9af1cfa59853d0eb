"""fedweight's local grid with any number of registered clients, for scale.py.

Started with a folder, the number of clients, the cohort and the plan. The clients come
from fedweight's own lazily computed partition: 128 of the job's examples each, drawn
when a client trains. So the memory is what the library itself needs.
"""

import logging
import sys

import fedweight
from fedweight.clients import TrainingApp, TrainingSettings, client_number
from fedweight.core.module import FlatModule
from fedweight.data import DataSet, Examples, federate
from fedweight.messages.arrays import FlatRecord
from fedweight.simulations import Plan
from fedweight.simulations.engine import make_grid
from fedweight.simulations.planner import choose_plan, machine, plans_for
from fedweight.strategies.fedavg import FedAvg

from .job import MODELS
from .local import ROUNDS, run_rounds
from .work import BATCH, CLASSES, LEARNING_RATE, SAMPLES, SEED
from .worker import start


def main() -> None:
    """Run rounds as told."""
    worker, job = start(f"fedweight {fedweight.__version__}")
    logging.getLogger("flwr").setLevel(logging.WARNING)
    clients, cohort, told = int(sys.argv[2]), int(sys.argv[3]), Plan.parse(sys.argv[4])
    examples = Examples(job.x, job.y)
    data = federate(
        DataSet("noise", examples, examples.take(slice(0, 0)), CLASSES),
        "dirichlet-sampled",
        clients,
        held_out=0.0,
        proxy=0.0,
        seed=SEED,
        examples_per_client=SAMPLES,
    )
    app = TrainingApp(
        MODELS[job.work.model],
        lambda context: data.client(client_number(context)),
        parts=data.parts,
        num_classes=CLASSES,
        settings=TrainingSettings(
            epochs=1, batch_size=BATCH, learning_rate=LEARNING_RATE
        ),
        seed=SEED,
        sizes=data.sizes,
    )
    first = FlatRecord(FlatModule(job.model()).save())
    plan = (
        told
        or choose_plan(
            lambda device: app,
            first,
            {"cpu": plans_for("cpu", job.model(), cohort)},
            clients=range(min(clients, cohort)),
            num_clients=clients,
            cohort=cohort,
            rounds=ROUNDS,
            about={"model": job.work.model, "cohort": cohort, **machine()},
        ).plan
    )
    with make_grid(app, clients, engine="local", plan=plan) as grid:
        strategy = FedAvg(
            fraction_train=cohort / clients,
            min_train_nodes=cohort,
            fraction_evaluate=0.0,
            seed=SEED,
        )
        run_rounds(worker, grid, first, strategy)


if __name__ == "__main__":
    main()
