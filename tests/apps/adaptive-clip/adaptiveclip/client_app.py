"""Clients whose update is clipped by the norm that the server tells."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, arrays_size_mod, message_size_mod

app = ClientApp(mods=[message_size_mod, arrays_size_mod])


@app.train(mods=[adaptiveclipping_mod])
def train(message: Message, context: Context) -> Message:
    """Move by a step as long as the client's number says."""
    partition = context.node_config["partition-id"]
    model = message.content["arrays"]["model"].numpy()
    step = np.arange(4) * 0.1 * (1 + partition)
    arrays = ArrayRecord({"model": Array(model + step)})
    metrics = MetricRecord({"num-examples": 4})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
