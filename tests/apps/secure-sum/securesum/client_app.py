"""Clients that send masked values only."""

import time

import numpy as np
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import Context


class Client(NumPyClient):
    """Moves half the way to its own number."""

    def __init__(self, partition: int, late_by: float) -> None:
        self.partition = partition
        self.late_by = late_by

    def fit(self, parameters, config):
        """Return the new values; be late in the first round where that is asked for."""
        if config["round"] == 1:
            time.sleep(self.late_by)
        away = np.full(4, float(self.partition)) - parameters[0]
        return [parameters[0] + away / 2], 10 + self.partition, {}

    def evaluate(self, parameters, config):
        """Measure the distance."""
        away = float(np.abs(parameters[0] - self.partition).mean())
        return away, 10 + self.partition, {}


def client_fn(context: Context):
    """Make a client."""
    partition = context.node_config["partition-id"]
    late = partition == context.run_config["late"]
    late_by = context.run_config["timeout"] + 1.0 if late else 0.0
    return Client(partition, late_by).to_client()


app = ClientApp(client_fn=client_fn, mods=[secaggplus_mod])
