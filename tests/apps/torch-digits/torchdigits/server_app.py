"""The server: FedAdam over the network's tensors."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from torchdigits.task import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    torch.manual_seed(0)
    number = context.run_config["nodes"]
    arrays = ArrayRecord(Net(context.run_config["hidden"]).state_dict())
    strategy = FedAvg(
        min_train_nodes=number, min_evaluate_nodes=number, min_available_nodes=number
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=arrays,
        train_config=ConfigRecord({"lr": context.run_config["learning-rate"]}),
        num_rounds=context.run_config["num-server-rounds"],
    )
    state = result.arrays.to_torch_state_dict()
    print(f"{len(state)} tensors")
