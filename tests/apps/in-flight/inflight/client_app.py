"""Clients grow a tree a message: bytes, as boosted trees travel."""

import json

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train("tree")
def grow(message: Message, context: Context) -> Message:
    """Return the thresholds of one more tree, and how many there are by now."""
    partition = context.node_config["partition-id"]
    forest = context.state.get("forest", ConfigRecord({"trees": []}))
    number = len(forest["trees"])
    rng = np.random.default_rng([partition, number])
    cuts = rng.normal(size=2 ** context.run_config["depth"]).tolist()
    tree = json.dumps(cuts).encode()
    context.state["forest"] = ConfigRecord({"trees": [*forest["trees"], tree]})
    content = {
        "tree": ConfigRecord({"model": tree, "ask": message.content["ask"]["number"]}),
        "metrics": MetricRecord({"trees": number + 1, "mean": float(np.mean(cuts))}),
    }
    return Message(RecordDict(content), reply_to=message)


@app.query("forest")
def forest(message: Message, context: Context) -> Message:
    """Return all trees."""
    return Message(RecordDict({"forest": context.state["forest"]}), reply_to=message)
