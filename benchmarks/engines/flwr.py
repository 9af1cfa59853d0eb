"""Flower's own simulation runtime: ``flwr.simulation.run_simulation`` on Ray.

One core a client, so as many actors as cores, one thread each. The client trains with
the same bare loop as the floor and keeps its model between messages, so what is
measured is the runtime. ``min_train_nodes`` is the whole cohort: FedAvg otherwise
counts the nodes before all have come.

On a GPU the actors share it evenly. Each keeps its model and all examples on it, as a
user does who cares for speed and has the room; what Flower carries is on the CPU.
"""

import sys
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from .job import Job, flat
from .work import BATCH, LEARNING_RATE, SAMPLES
from .worker import start


class Client:
    """What a worker process keeps between messages."""

    kept: Any = None

    def __init__(self, folder: str) -> None:
        torch.set_num_threads(1)
        self.job = Job(folder)
        self.module = self.job.model().to(self.job.device).train()
        self.optimizer = torch.optim.SGD(self.module.parameters(), LEARNING_RATE)

    @classmethod
    def of_this_process(cls, folder: str) -> "Client":
        """Return this process's, made when it is first asked for."""
        if cls.kept is None:
            cls.kept = cls(folder)
        return cls.kept

    def train(self, message: Message, context: Context) -> Message:
        """Train the received model on a client's data."""
        self.module.load_state_dict(message.content["arrays"].to_torch_state_dict())
        round = message.content["config"]["server-round"]
        x, y = self.job.shuffled(round, int(context.node_config["partition-id"]))
        for first in range(0, SAMPLES, BATCH):
            self.optimizer.zero_grad()
            logits = self.module(x[first : first + BATCH])
            F.cross_entropy(logits, y[first : first + BATCH]).backward()
            self.optimizer.step()
        content = RecordDict(
            {
                "arrays": ArrayRecord(self.module.state_dict()),
                "metrics": MetricRecord({"num-examples": SAMPLES}),
            }
        )
        return Message(content, reply_to=message)


def main() -> None:
    """Run rounds as told, from inside the ServerApp."""
    worker, job = start(f"flwr {version('flwr')}, ray {version('ray')}")
    folder = sys.argv[1]
    client_app, server_app = ClientApp(), ServerApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        # Imported here: otherwise the class travels anew with every message.
        from engines.flwr import Client

        return Client.of_this_process(folder).train(message, context)

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_evaluate=0.0,
            min_train_nodes=job.cohort,
            min_available_nodes=job.cohort,
        )
        arrays = ArrayRecord(job.model().state_dict())
        round = 0

        def weights() -> npt.NDArray[np.float32]:
            return flat(arrays.to_numpy_ndarrays())

        while worker.next_round(weights):
            round += 1
            messages = strategy.configure_train(round, arrays, ConfigRecord(), grid)
            replies = grid.send_and_receive(messages, timeout=3600)
            new, _ = strategy.aggregate_train(round, replies)
            if new is None:
                raise RuntimeError("no client answered")
            arrays = new

    run_simulation(
        server_app,
        client_app,
        num_supernodes=job.cohort,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": job.gpu_share},
            "init_args": {"num_cpus": job.workers},
        },
    )


if __name__ == "__main__":
    main()
