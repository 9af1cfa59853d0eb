"""The server sends records of every type, and looks at what comes back."""

import time

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


def all_nodes(grid: Grid, number: int) -> list[int]:
    """Wait until there are as many nodes as there shall be, as a server must."""
    while len(nodes := list(grid.get_node_ids())) < number:
        time.sleep(0.05)
    return nodes


TYPES = ("float64", "float32", "float16", "int64", "int8", "uint8", "bool")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Send and compare, several times."""
    content = RecordDict(
        {
            "arrays": ArrayRecord(
                {t: Array(np.arange(6).reshape(2, 3).astype(t)) for t in TYPES}
            ),
            "more": ArrayRecord({"none": Array(np.zeros((0, 3)))}),
            "config": ConfigRecord(
                {
                    "whole": 2**40,
                    "real": -1.5,
                    "text": "Grüße",
                    "raw": b"\x00\x01",
                    "flag": False,
                    "wholes": [1, 2],
                    "reals": [0.5, 1e-300],
                    "texts": ["a", ""],
                    "raws": [b"", b"\xff"],
                    "flags": [True, False],
                    "empty": [],
                }
            ),
            "numbers": MetricRecord({"whole": 3, "real": 0.25, "several": [1.0, 2.0]}),
        }
    )
    before = dict(content["config"])
    for _ in range(context.run_config["repeat"]):
        nodes = all_nodes(grid, context.run_config["nodes"])
        messages = [Message(content, node, "query.echo") for node in nodes]
        for reply in grid.send_and_receive(messages):
            assert not reply.has_error(), reply.error.reason
            assert dict(reply.content["config"]) == before
            for name, array in content["arrays"].items():
                back = reply.content["arrays"][name].numpy()
                assert back.dtype == array.numpy().dtype
                np.testing.assert_array_equal(back, array.numpy())
            assert reply.content["more"]["none"].numpy().shape == (0, 3)
        assert dict(content["config"]) == before
