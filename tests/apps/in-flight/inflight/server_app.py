"""The server sends the next message as soon as it has an answer; nobody waits."""

import json
import time

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


def all_nodes(grid: Grid, number: int) -> list[int]:
    """Wait until there are as many nodes as there shall be, as a server must."""
    while len(nodes := list(grid.get_node_ids())) < number:
        time.sleep(0.05)
    return nodes


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Have every client grow its trees, then ask for all of them."""
    wanted = context.run_config["trees"]

    def ask(node: int, number: int) -> Message:
        content = RecordDict({"ask": ConfigRecord({"number": number})})
        return Message(content, node, "train.tree")

    nodes = all_nodes(grid, context.run_config["nodes"])
    waiting = set(grid.push_messages([ask(node, 0) for node in nodes]))
    counts = dict.fromkeys(nodes, 0)
    while waiting:
        for reply in grid.pull_messages(waiting):
            node = reply.metadata.src_node_id
            waiting.discard(reply.metadata.reply_to_message_id)
            counts[node] += 1
            assert reply.content["tree"]["ask"] == counts[node] - 1
            if counts[node] < wanted:
                waiting |= set(grid.push_messages([ask(node, counts[node])]))
        time.sleep(0.01)
    messages = [Message(RecordDict(), node, "query.forest") for node in nodes]
    total = 0.0
    for reply in grid.send_and_receive(messages):
        trees = [json.loads(tree) for tree in reply.content["forest"]["trees"]]
        assert len(trees) == wanted
        total += sum(map(sum, trees))
    print(f"the sum of all cuts is {total:.6f}")
    context.state["result"] = MetricRecord({"sum": total})
