"""FedLab: its serial trainer and synchronous handler, as in its standalone pipeline.

The loop of ``StandalonePipeline.main`` is written out without its evaluation step.
FedLab takes whatever its dataset gives as a loader; a PyTorch DataLoader that indexes
a batch at a time is much quicker than one that collates examples, so it gets that.
FedLab's FedAvg handler averages evenly here, which is the same for equal sizes.
"""

from importlib.metadata import version

import torch
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from .job import Job, flat_module
from .stand_in import ensure_torchvision
from .work import BATCH, LEARNING_RATE
from .worker import start


class Clients:
    """Gives each client's loader, in the order of the round."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.round = 0
        self.parts = [TensorDataset(*job.client(k)) for k in range(job.cohort)]

    def get_dataloader(self, client: int, batch_size: int) -> DataLoader:
        """Return what FedLab asks for."""
        order = self.job.order(self.round, client).tolist()
        batches = BatchSampler(order, batch_size, drop_last=False)
        return DataLoader(self.parts[client], sampler=batches, batch_size=None)


def main() -> None:
    """Run rounds as told."""
    worker, job = start(f"fedlab {version('fedlab')}")
    torch.set_num_threads(job.threads)
    ensure_torchvision()
    from fedlab.contrib.algorithm.fedavg import (
        FedAvgSerialClientTrainer,
        FedAvgServerHandler,
    )

    clients = Clients(job)
    trainer = FedAvgSerialClientTrainer(job.model(), job.cohort)
    trainer.setup_dataset(clients)
    trainer.setup_optim(epochs=1, batch_size=BATCH, lr=LEARNING_RATE)
    handler = FedAvgServerHandler(job.model(), global_round=10**9, sample_ratio=1.0)
    handler.num_clients = job.cohort
    while worker.next_round(lambda: flat_module(handler.model)):
        clients.round += 1
        sampled = handler.sample_clients()
        trainer.local_process(handler.downlink_package, sampled)
        for upload in trainer.uplink_package:
            handler.load(upload)


if __name__ == "__main__":
    main()
