"""The server: a rate that falls, and a test on pictures of nobody."""

from collections.abc import Iterable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvgM

from smallphotos.task import Net, evaluate, load_data

app = ServerApp()


class Falling(FedAvgM):
    """Momentum on the server, and a rate that is halved each round."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Tell this round's rate."""
        config["rate"] = config["first-rate"] / 2 ** (server_round - 1)
        return super().configure_train(server_round, arrays, config, grid)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    config = context.run_config
    torch.manual_seed(0)
    net = Net(config["model.width"])
    test = load_data(-1, 200, config["data.side"])

    def measure(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        net.load_state_dict(arrays.to_torch_state_dict())
        loss, accuracy = evaluate(net, test)
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    number = config["nodes"]
    strategy = Falling(
        fraction_evaluate=0.0,
        min_train_nodes=number,
        min_available_nodes=number,
        server_learning_rate=1.0,
        server_momentum=0.5,
    )
    result = strategy.start(
        grid,
        ArrayRecord(net.state_dict()),
        num_rounds=config["num-server-rounds"],
        train_config=ConfigRecord({"first-rate": config["training.rate"]}),
        evaluate_fn=measure,
    )
    last = max(result.evaluate_metrics_serverapp)
    print(f"accuracy {result.evaluate_metrics_serverapp[last]['accuracy']:.3f}")
