"""BlazeFL: its FedAvg with a pool of threads, one a core.

Its authors advise threads on an interpreter without the global lock, and its process
pool otherwise; the pool of processes is made anew every round and imports PyTorch
again, which costs more than threads that wait for each other. So: threads, one
intra-op thread each. Loaders index a batch at a time, in the round's order.
"""

import copy
from importlib.metadata import version
from typing import Any

import torch
from blazefl.contrib.fedavg import (
    FedAvgBaseServerHandler,
    FedAvgThreadPoolClientTrainer,
)
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from .job import Job, flat_module
from .work import BATCH, LEARNING_RATE, SEED
from .worker import start


class Clients:
    """Gives each client's loader, in the order of the round."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.round = 0
        self.parts = [TensorDataset(*job.client(k)) for k in range(job.cohort)]

    def get_dataloader(
        self, type_: str, cid: int, batch_size: int, generator: Any = None
    ) -> DataLoader:
        """Return what BlazeFL asks for."""
        order = self.job.order(self.round, cid).tolist()
        batches = BatchSampler(order, batch_size, drop_last=False)
        return DataLoader(self.parts[cid], sampler=batches, batch_size=None)


class Selector:
    """Makes the model by name."""

    def __init__(self, job: Job) -> None:
        self.model = job.model()

    def select_model(self, model_name: str) -> torch.nn.Module:
        """Return a model, which BlazeFL wants for every client."""
        return copy.deepcopy(self.model)


class Quiet(FedAvgThreadPoolClientTrainer):
    """The trainer without a progress bar."""

    def progress_fn(self, it: Any) -> Any:
        """Show nothing."""
        return it


def main() -> None:
    """Run rounds as told."""
    worker, job = start(f"blazefl {version('blazefl')}")
    torch.set_num_threads(1)
    clients: Any = Clients(job)
    selector: Any = Selector(job)
    shared = {
        "model_selector": selector,
        "model_name": job.work.model,
        "dataset": clients,
        "device": "cpu",
        "num_clients": job.cohort,
        "batch_size": BATCH,
        "seed": SEED,
    }
    handler = FedAvgBaseServerHandler(global_round=10**9, sample_ratio=1.0, **shared)
    trainer = Quiet(epochs=1, lr=LEARNING_RATE, num_parallels=job.workers, **shared)
    while worker.next_round(lambda: flat_module(handler.model)):
        clients.round += 1
        trainer.local_process(handler.downlink_package(), handler.sample_clients())
        for package in trainer.uplink_package():
            handler.load(package)


if __name__ == "__main__":
    main()
