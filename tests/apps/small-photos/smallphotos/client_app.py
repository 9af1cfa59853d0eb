"""Clients that train as the server tells, and know how well they did before."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from smallphotos.task import Net, load_data
from smallphotos.task import train as train_net

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the client's pictures, in an order that is drawn."""
    config, told = context.run_config, message.content["config"]
    partition = context.node_config["partition-id"]
    torch.manual_seed(100 * told["server-round"] + partition)
    net = Net(config["model.width"])
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    data = load_data(partition, config["data.examples"], config["data.side"])
    epochs, batch = config["training.epochs"], config["training.batch"]
    loss = train_net(net, data, told["rate"], epochs, batch)
    before = context.state.get("past", MetricRecord({"loss": loss}))["loss"]
    context.state["past"] = MetricRecord({"loss": loss})
    metrics = {"num-examples": len(data[1]), "loss": loss, "gain": before - loss}
    content = {
        "arrays": ArrayRecord(net.state_dict()),
        "metrics": MetricRecord(metrics),
    }
    return Message(RecordDict(content), reply_to=message)
