"""Clients: train, evaluate, and say how many examples they have."""

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from linefit.task import fit, load_data, loss

app = ClientApp()


@app.lifespan()
def life(context: Context):
    """Note that a message has begun."""
    context.state["life"] = ConfigRecord({"stage": "begun"})
    yield
    context.state["life"] = ConfigRecord({"stage": "done"})


@app.query("size")
def size(message: Message, context: Context) -> Message:
    """Say how many examples there are."""
    x, _ = load_data(context.node_config["partition-id"])
    return Message(
        RecordDict({"size": MetricRecord({"examples": len(x)})}), reply_to=message
    )


@app.train()
def train(message: Message, context: Context) -> Message:
    """Fit the line; count the rounds, and check what the server tells."""
    told = message.content["config"]
    assert told["flag"] is True
    assert told["raw"] == b"\x00\xff"
    assert list(told["several"]) == [1.5, 2.5]
    assert context.state["life"]["stage"] == "begun"
    past = context.state.get("past", MetricRecord({"rounds": 0}))
    context.state["past"] = MetricRecord({"rounds": past["rounds"] + 1})
    x, y = load_data(context.node_config["partition-id"])
    weights, bias = message.content["arrays"].to_numpy_ndarrays()
    rate = context.run_config["local.rate"] / context.state["past"]["rounds"]
    weights, bias = fit(weights, bias, x, y, rate, context.run_config["local.steps"])
    metrics = {
        "num-examples": len(x),
        "train-loss": loss(weights, bias, x, y),
        "rounds": context.state["past"]["rounds"],
    }
    arrays = ArrayRecord({"weights": Array(weights), "bias": Array(bias)})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the line."""
    x, y = load_data(context.node_config["partition-id"])
    weights, bias = message.content["arrays"].to_numpy_ndarrays()
    metrics = {"num-examples": len(x), "loss": loss(weights, bias, x, y)}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
