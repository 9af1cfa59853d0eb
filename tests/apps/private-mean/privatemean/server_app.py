"""The server adds noise; which side clips is a setting."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds with noise from a seed."""
    np.random.seed(7)
    number = context.run_config["nodes"]
    everybody = FedAvg(
        min_train_nodes=number, min_evaluate_nodes=number, min_available_nodes=number
    )
    sides = {
        "client": DifferentialPrivacyClientSideFixedClipping,
        "server": DifferentialPrivacyServerSideFixedClipping,
    }
    wrap = sides[context.run_config["side"]]
    strategy = wrap(everybody, context.run_config["noise"], 1.0, number)
    start = ArrayRecord({"mean": Array(np.zeros(3))})
    strategy.start(grid, start, num_rounds=context.run_config["num-server-rounds"])
