"""The server asks everybody, and half of the replies count."""

import random
import time
from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


def all_nodes(grid: Grid, number: int) -> list[int]:
    """Wait until there are as many nodes as there shall be, as a server must."""
    while len(nodes := list(grid.get_node_ids())) < number:
        time.sleep(0.05)
    return nodes


class Half(FedAvg):
    """All nodes are asked, and half of the replies counts, of least spread."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every node, in an order that is drawn."""
        nodes = list(grid.get_node_ids())
        random.shuffle(nodes)
        content = RecordDict({"arrays": arrays, "config": config})
        return [
            Message(content, node, "train", group_id=str(server_round))
            for node in nodes
        ]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]):
        """Take the half, and forget the list, which FedAvg would average."""
        kept = sorted(replies, key=lambda reply: reply.content["metrics"]["spread"][1])
        kept = kept[: len(kept) // 2]
        assert all(reply.metadata.group_id == str(server_round) for reply in kept)
        for reply in kept:
            del reply.content["metrics"]["spread"]
        return super().aggregate_train(server_round, kept)

    def configure_evaluate(self, server_round, arrays, config, grid):
        """Evaluate nowhere."""
        return []


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    all_nodes(grid, context.run_config["nodes"])
    random.seed(context.run_config["seed"])
    drawn = []

    def measure(server_round: int, arrays: ArrayRecord) -> None:
        drawn.append(random.random())

    start = ArrayRecord({"model": Array(np.zeros(2))})
    rounds = context.run_config["num-server-rounds"]
    Half().start(grid, start, num_rounds=rounds, evaluate_fn=measure)
    assert len(set(drawn)) == rounds + 1
