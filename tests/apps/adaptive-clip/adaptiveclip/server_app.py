"""The server adapts the norm; its noise comes from a seed."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    FedAvg,
)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    np.random.seed(3)
    number = context.run_config["nodes"]
    inner = FedAvg(
        fraction_evaluate=0.0, min_train_nodes=number, min_available_nodes=number
    )
    strategy = DifferentialPrivacyClientSideAdaptiveClipping(
        inner, noise_multiplier=0.1, num_sampled_clients=number
    )
    start = ArrayRecord({"model": Array(np.zeros(4))})
    rounds = context.run_config["num-server-rounds"]
    strategy.start(grid, start, num_rounds=rounds)
