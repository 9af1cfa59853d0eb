"""Clients send back what they were sent, and change their own copy of it."""

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query("echo")
def echo(message: Message, context: Context) -> Message:
    """Return the records, and what the settings are."""
    config = context.run_config
    assert [type(config[k]) for k in ("repeat", "label", "flag", "rate")] == [
        int,
        str,
        bool,
        float,
    ]
    sums = {n: float(a.numpy().sum()) for n, a in message.content["arrays"].items()}
    content = RecordDict(
        {
            "arrays": message.content["arrays"],
            "more": message.content["more"],
            "config": ConfigRecord(dict(message.content["config"])),
            "numbers": MetricRecord({**message.content["numbers"], **sums}),
        }
    )
    message.content["config"]["text"] = "changed"
    return Message(content, reply_to=message)
