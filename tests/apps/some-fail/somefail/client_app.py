"""Clients count their rounds; every second client raises in its second."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Count; raise after the state was changed."""
    partition = context.node_config["partition-id"]
    number = message.content["config"]["server-round"]
    count = context.state.get("count", MetricRecord({"n": 0}))["n"] + 1
    context.state["count"] = MetricRecord({"n": count})
    if partition % 2 and number == 2:
        raise RuntimeError("as planned")
    model = message.content["arrays"]["model"].numpy()
    metrics = MetricRecord({"num-examples": 1 + partition, "count": count})
    arrays = ArrayRecord({"model": Array(model + count * np.ones(3))})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
