"""The server: asks for sizes, then FedAvg with everybody, and measures centrally."""

import time

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from linefit.task import FEATURES, load_data, loss

app = ServerApp()


def all_nodes(grid: Grid, number: int) -> list[int]:
    """Wait until there are as many nodes as there shall be, as a server must."""
    while len(nodes := list(grid.get_node_ids())) < number:
        time.sleep(0.05)
    return nodes


def measure(number: int, arrays: ArrayRecord) -> MetricRecord:
    """Measure the global line on data of nobody."""
    x, y = load_data(1000)
    return MetricRecord({"loss": loss(*arrays.to_numpy_ndarrays(), x[:50], y[:50])})


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    nodes = all_nodes(grid, context.run_config["nodes"])
    asked = [Message(RecordDict(), node, "query.size") for node in nodes]
    sizes = [int(r.content["size"]["examples"]) for r in grid.send_and_receive(asked)]
    print(f"{sum(sizes)} examples on {len(nodes)} nodes")
    everybody = {
        "min_train_nodes": len(nodes),
        "min_evaluate_nodes": len(nodes),
        "min_available_nodes": len(nodes),
    }
    start = ArrayRecord(
        {"weights": Array(np.zeros(FEATURES)), "bias": Array(np.zeros(1))}
    )
    told = ConfigRecord({"flag": True, "raw": b"\x00\xff", "several": [1.5, 2.5]})
    result = FedAvg(**everybody).start(
        grid,
        start,
        num_rounds=context.run_config["num-server-rounds"],
        train_config=told,
        evaluate_fn=measure,
    )
    context.state["final"] = result.evaluate_metrics_serverapp[
        max(result.evaluate_metrics_serverapp)
    ]
