"""The server goes on with those who answer, by the trimmed mean."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedTrimmedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    number = context.run_config["nodes"]
    strategy = FedTrimmedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=number,
        min_available_nodes=number,
        beta=0.25,
    )
    start = ArrayRecord({"model": Array(np.zeros(3))})
    rounds = context.run_config["num-server-rounds"]
    result = strategy.start(grid, start, num_rounds=rounds)
    counts = [result.train_metrics_clientapp[r]["count"] for r in range(1, rounds + 1)]
    print(f"counts {counts}")
