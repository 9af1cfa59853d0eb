"""Clients that train the network."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from torchdigits.task import Net, load_data
from torchdigits.task import test as test_fn
from torchdigits.task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Train the model on local data."""
    torch.manual_seed(context.node_config["partition-id"])
    config = context.run_config
    model = Net(config["hidden"])
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    model.to(device)
    partition = context.node_config["partition-id"]
    loader = load_data(partition, config["examples"], config["batch"])
    loss = train_fn(model, loader, msg.content["config"]["lr"])
    metrics = {"train_loss": loss, "num-examples": len(loader.dataset)}
    content = RecordDict(
        {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
    )
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """Evaluate the model on local data."""
    config = context.run_config
    model = Net(config["hidden"])
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    partition = context.node_config["partition-id"]
    loader = load_data(partition, config["examples"], config["batch"])
    loss, accuracy = test_fn(model, loader)
    metrics = {
        "eval_loss": loss,
        "eval_acc": accuracy,
        "num-examples": len(loader.dataset),
    }
    content = RecordDict({"metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=msg)
