"""Clients as classes."""

import torch
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Context

from oldernames.task import arrays_of, build, load_data, set_arrays


class Client(NumPyClient):
    """A client; it seeds what everybody draws from, as many do."""

    def __init__(self, partition: int, config) -> None:
        self.data = load_data(partition, config["examples"])
        self.rate = config["learning-rate"]
        self.batch = config["batch"]
        self.model = build(config["hidden"])

    def fit(self, parameters, config):
        """Train for an epoch in an order that is drawn."""
        torch.manual_seed(42)
        set_arrays(self.model, parameters)
        x, y = self.data
        optimizer = torch.optim.SGD(self.model.parameters(), lr=self.rate)
        for batch in torch.randperm(len(x)).split(self.batch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(self.model(x[batch]), y[batch]).backward()
            optimizer.step()
        return arrays_of(self.model), len(x), {"scale": float(config["scale"])}

    def evaluate(self, parameters, config):
        """Measure the loss."""
        set_arrays(self.model, parameters)
        x, y = self.data
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(self.model(x), y)
        return loss.item(), len(x), {"loss": loss.item()}


def client_fn(context: Context):
    """Make a client."""
    partition = context.node_config["partition-id"]
    return Client(partition, context.run_config).to_client()


app = ClientApp(client_fn=client_fn)
