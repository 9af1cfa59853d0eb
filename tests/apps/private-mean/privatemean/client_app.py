"""Clients whose update is clipped by Flower's mod, and counted by one of the app."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod


def unless_on_the_server(message: Message, context: Context, call_next) -> Message:
    """Clip here where the server does not."""
    if context.run_config["side"] == "client":
        return fixedclipping_mod(message, context, call_next)
    return call_next(message, context)


def count(message: Message, context: Context, call_next) -> Message:
    """Add to the reply how many records came."""
    records = len(message.content)
    reply = call_next(message, context)
    reply.content["metrics"]["records"] = records
    return reply


app = ClientApp()


@app.train(mods=[count, unless_on_the_server])
def train(message: Message, context: Context) -> Message:
    """Move towards the client's own mean; seed NumPy, as many do."""
    np.random.seed(42)
    target = context.node_config["partition-id"] + np.random.normal(size=3)
    [model] = message.content["arrays"].to_numpy_ndarrays()
    arrays = ArrayRecord({"mean": Array(model + 0.5 * (target - model))})
    metrics = MetricRecord({"num-examples": 10})
    content = RecordDict({"arrays": arrays, "metrics": metrics})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the distance."""
    [model] = message.content["arrays"].to_numpy_ndarrays()
    away = float(np.abs(model - context.node_config["partition-id"]).mean())
    metrics = MetricRecord({"num-examples": 10, "distance": away})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
