"""The server adds up what it cannot read."""

import numpy as np
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run rounds of the protocol."""
    number = context.run_config["nodes"]

    def show(server_round, parameters, config):
        [values] = parameters
        print(f"round {server_round}: {values.mean():.3f}")

    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_fit_clients=number,
        min_available_clients=number,
        initial_parameters=ndarrays_to_parameters([np.zeros(4)]),
        on_fit_config_fn=lambda server_round: {"round": server_round},
        evaluate_fn=show,
    )
    legacy = LegacyContext(
        context=context,
        config=ServerConfig(num_rounds=context.run_config["num-server-rounds"]),
        strategy=strategy,
    )
    secure = SecAggPlusWorkflow(
        num_shares=3,
        reconstruction_threshold=2,
        timeout=context.run_config["timeout"],
    )
    DefaultWorkflow(fit_workflow=secure)(grid, legacy)
