"""Clients keep a number of their own and add it."""

import random

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Move by what is kept, which grows; seed what the server draws from, too."""
    random.seed(42)
    partition = context.node_config["partition-id"]
    kept = context.state.get("kept", ArrayRecord({"step": Array(np.zeros(2))}))
    step = kept["step"].numpy() + 0.1 * partition
    context.state["kept"] = ArrayRecord({"step": Array(step)})
    model = message.content["arrays"]["model"].numpy()
    arrays = ArrayRecord({"model": Array(model + step)})
    metrics = MetricRecord(
        {"num-examples": 5 + partition, "spread": [0.5, partition / 2]}
    )
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
