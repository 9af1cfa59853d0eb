"""The server as a function that gives its components."""

from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp

from oldernames.task import arrays_of, build


def mean(metrics):
    """Return the mean loss over examples."""
    total = sum(count for count, _ in metrics)
    return {"loss": sum(count * own["loss"] for count, own in metrics) / total}


def server_fn(context: Context) -> ServerAppComponents:
    """Make the strategy."""
    number = context.run_config["nodes"]
    first = arrays_of(build(context.run_config["hidden"]))
    strategy = FedAvg(
        min_fit_clients=number,
        min_evaluate_clients=number,
        min_available_clients=number,
        initial_parameters=ndarrays_to_parameters(first),
        on_fit_config_fn=lambda number: {"scale": 1.0 / number},
        fit_metrics_aggregation_fn=lambda metrics: {"clients": len(metrics)},
        evaluate_metrics_aggregation_fn=mean,
    )
    rounds = context.run_config["num-server-rounds"]
    return ServerAppComponents(
        strategy=strategy, config=ServerConfig(num_rounds=rounds)
    )


app = ServerApp(server_fn=server_fn)
