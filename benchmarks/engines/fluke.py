"""fluke: its FedAvg federation, in one process and in memory.

With fluke's own FastDataLoader. It is told not to shuffle; an observer puts the
examples in the round's order instead, which costs the same. Evaluation is off.
"""

from importlib.metadata import version

import torch

from .job import flat_module
from .stand_in import ensure_torchvision
from .work import BATCH, CLASSES, LEARNING_RATE, SEED
from .worker import start


def main() -> None:
    """Run rounds as told, from an observer of the federation."""
    worker, job = start(f"fluke {version('fluke-fl')}")
    torch.set_num_threads(job.threads)
    ensure_torchvision()
    from fluke import DDict, FlukeENV
    from fluke.algorithms.fedavg import FedAVG
    from fluke.data import DataSplitter, DummyDataContainer, FastDataLoader

    environment = FlukeENV()
    environment.set_seed(SEED)
    environment.set_device("cpu")
    environment.set_inmemory(True)
    environment.set_eval_cfg(
        task="classification", locals=False, server=False, pre_fit=False, post_fit=False
    )
    loaders = [
        FastDataLoader(*job.client(k), num_labels=CLASSES, batch_size=BATCH)
        for k in range(job.cohort)
    ]
    data = DummyDataContainer(loaders, [None] * job.cohort, None, CLASSES)
    federation = FedAVG(
        n_clients=job.cohort,
        data_splitter=DataSplitter(data, distribution="iid"),
        hyper_params=DDict(
            model=job.model(),
            client=DDict(
                batch_size=BATCH,
                local_epochs=1,
                loss=torch.nn.CrossEntropyLoss,
                optimizer=DDict(name="SGD", lr=LEARNING_RATE),
                scheduler=DDict(name="StepLR", step_size=1, gamma=1),
            ),
            server=DDict(weighted=True),
        ),
    )

    class Rounds:
        """Waits for leave before every round."""

        def start_round(self, round: int, global_model: torch.nn.Module) -> None:
            if not worker.next_round(lambda: flat_module(federation.server.model)):
                raise KeyboardInterrupt  # fluke's way to end early.
            for k, loader in enumerate(loaders):
                loader.tensors = job.shuffled(round, k)

    federation.attach(Rounds())
    federation.run(n_rounds=10**6, eligible_perc=1.0, finalize=False)


if __name__ == "__main__":
    main()
