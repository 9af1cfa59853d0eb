"""pfl-research: its simulated backend, one process a core.

pfl is spread over processes by ``torchrun``; the second and further processes are
started here with the variables that ``torchrun`` would set, so that the first can be
measured. Each uses one thread. No evaluation on clients or on the server but pfl's one
before the first round.

On a GPU it is one process: pfl gives each a card of its own. The examples lie there
from the first round on.
"""

import os
import socket
import subprocess
import sys
from importlib.metadata import version
from typing import Any

RANK = int(os.environ.get("RANK", 0))


def _join(workers: int) -> list[subprocess.Popen[bytes]]:
    """Be one of several processes; start the others. Before pfl is imported."""
    if workers == 1 or RANK:
        return []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        TORCHELASTIC_RUN_ID="benchmark",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE=str(workers),
        LOCAL_WORLD_SIZE=str(workers),
        RANK="0",
        LOCAL_RANK="0",
    )
    return [
        subprocess.Popen(
            [sys.executable, "-m", "engines.pfl", sys.argv[1]],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
        )
        for rank in range(1, workers)
    ]


def main() -> None:
    """Run rounds as told, from a callback after every one."""
    from .job import Job, flat_module
    from .work import BATCH, LEARNING_RATE
    from .worker import start

    if RANK:
        worker, job = None, Job(sys.argv[1])
    else:
        worker, job = start(f"pfl {version('pfl')}")
    others = _join(job.workers) if job.device == "cpu" else []
    os.environ["PFL_PYTORCH_DEVICE"] = job.device

    import numpy as np
    import torch
    import torch.nn.functional as F
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    torch.set_num_threads(1)
    np.random.seed(0)  # The same in every process, as pfl asks.  # noqa: NPY002
    module: Any = job.model().train()
    module.loss = lambda x, y: F.cross_entropy(module(x), y)
    module.metrics = lambda x, y: {}
    round = 1

    def dataset(client: int) -> Dataset:
        return Dataset(list(job.shuffled(round, client)), user_id=client)

    class Rounds(TrainingProcessCallback):
        """Waits for leave; the other processes follow, as they add up with this."""

        def after_central_iteration(
            self, *args: Any, **kwargs: Any
        ) -> tuple[bool, Metrics]:
            nonlocal round
            round += 1
            over = worker is not None and not worker.next_round(
                lambda: flat_module(module)
            )
            return over, Metrics()

    data = FederatedDataset(
        dataset, get_user_sampler("minimize_reuse", list(range(job.cohort)))
    )
    model = PyTorchModel(
        module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )
    backend = SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()])
    if worker is None or worker.next_round(lambda: flat_module(module)):
        FederatedAveraging().run(
            NNAlgorithmParams(
                central_num_iterations=10**9,
                evaluation_frequency=10**9,
                train_cohort_size=job.cohort,
                val_cohort_size=0,
            ),
            backend,
            model,
            NNTrainHyperParams(
                local_num_epochs=1,
                local_learning_rate=LEARNING_RATE,
                local_batch_size=BATCH,
            ),
            callbacks=[Rounds()],
            send_metrics_to_platform=False,
        )
    for process in others:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
