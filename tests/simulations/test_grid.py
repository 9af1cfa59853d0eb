"""What every grid promises, and the parts that the grids share."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from fedweight.core.errors import ConfigurationError, EngineError
from fedweight.core.layout import FlatModel, Layout
from fedweight.messages import _flower
from fedweight.messages.arrays import FlatRecord
from fedweight.messages.dispatch import Cohort
from fedweight.simulations.grid import (
    FIRST_NODE,
    SimulationGrid,
    execute,
    isolated,
    make_context,
    usable_plan,
)
from fedweight.simulations.local import LocalGrid
from fedweight.simulations.plan import Plan

Make = Callable[..., SimulationGrid]


def app_of(handler: Callable[[Message, Context], Any]) -> ClientApp:
    """Make an app that handles train messages."""
    app = ClientApp()
    app.train()(handler)
    return app


def answer(message: Message, **metrics: Any) -> Message:
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def number(message: Message, context: Context) -> Message:
    return answer(message, client=context.node_config["partition-id"])


def clients_of(replies: Any) -> list[int]:
    return [reply.metadata.src_node_id - FIRST_NODE for reply in replies]


def ones(size: int = 4) -> FlatRecord:
    layout = Layout.of({"w": ((size,), "float32")}, ())
    return FlatRecord(FlatModel(layout, torch.ones(size), torch.empty(0)))


# What every grid promises.


def test_replies_come_in_the_order_of_the_messages(make: Make, write: Any) -> None:
    grid = make(app_of(number), 50)
    order = [int(k) for k in np.random.default_rng(0).permutation(50)]
    for _ in range(2):  # the second time it is known how long clients take
        replies = list(grid.send_and_receive([write(grid, k) for k in order]))
        assert [r.content["metrics"]["client"] for r in replies] == order


def test_no_messages(make: Make) -> None:
    grid = make(app_of(number), 2)
    assert list(grid.send_and_receive([])) == []
    assert list(grid.push_messages([])) == []
    assert list(grid.pull_messages([])) == []


def test_reply_names_the_message_that_it_answers(make: Make, write: Any) -> None:
    grid = make(app_of(number), 2)
    messages = [write(grid, 0), write(grid, 1)]
    ids = [m.metadata.reply_to_message_id for m in grid.send_and_receive(messages)]
    assert ids == [m.metadata.message_id for m in messages]
    assert len(set(ids)) == 2


def test_node_that_does_not_exist(
    make: Make, write: Any, caplog: pytest.LogCaptureFixture
) -> None:
    grid = make(app_of(number), 3)
    messages = [Message(RecordDict(), 1003, "train"), write(grid, 1)]
    assert clients_of(grid.send_and_receive(messages)) == [1]
    assert len(list(grid.push_messages([messages[0]]))) == 0
    assert "node 1003, which does not exist" in caplog.text
    cohort = Cohort(RecordDict(), [1003], "train")
    with pytest.raises(EngineError, match=r"node 1003.*gives 1000 to 1002"):
        grid._checked_client(cohort.nodes[0])


def test_ids_and_times_as_flowers(make: Make, write: Any) -> None:
    def train(message: Message, context: Context) -> Message:
        assert message.metadata.delivered_at
        assert message.metadata.run_id == context.run_id
        return answer(message, node=context.node_id)

    grid = make(app_of(train), 2)
    with _flower.task_identity(grid.run.run_id):
        messages = [write(grid, k) for k in range(2)]
        replies = list(grid.send_and_receive(messages))
    assert [r.error.reason for r in replies if r.has_error()] == []
    names = [m.metadata.message_id for m in [*messages, *replies]]
    assert len(set(names)) == 4
    assert all(len(name) == 36 for name in names)
    assert all(r.metadata.delivered_at for r in replies)
    assert grid.run.run_id != LocalGrid(app_of(train), 1).run.run_id


def test_a_message_that_expires(make_apart: Make, write: Any, over: Path) -> None:
    grid = make_apart(app_of(wait), 2)
    messages = [write(grid, k, until=["", str(over)][k]) for k in range(2)]
    for message in messages:
        message.metadata.ttl = 1.5
    began = time.perf_counter()
    replies = list(grid.send_and_receive(messages, timeout=20))
    assert time.perf_counter() - began < 3.0
    assert [r.has_error() for r in replies] == [False, True]
    assert replies[1].error.code == _flower.MESSAGE_UNAVAILABLE
    over.touch()
    pushed = write(grid, 0)
    pushed.metadata.ttl = 1e-6
    time.sleep(0.01)
    (reply,) = grid.send_and_receive([pushed])
    assert reply.error.code == _flower.MESSAGE_UNAVAILABLE


def test_a_million_clients(make: Make, write: Any) -> None:
    began = time.perf_counter()
    grid = make(app_of(number), 1_000_000)
    nodes = grid.get_node_ids()
    assert time.perf_counter() - began < 2.0
    assert len(list(nodes)) == 1_000_000
    (reply,) = grid.send_and_receive([write(grid, 999_999)])
    assert reply.content["metrics"]["client"] == 999_999


def test_client_that_raises(make: Make, write: Any) -> None:
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 2:
            raise ValueError("no such column: age")
        return answer(message, fine=1)

    grid = make(app_of(train), 4)
    replies = list(grid.send_and_receive([write(grid, k) for k in range(4)]))
    assert [r.has_error() for r in replies] == [False, False, True, False]
    assert clients_of(replies) == [0, 1, 2, 3]
    error = replies[2].error
    assert error.code == _flower.CLIENT_APP_RAISED_EXCEPTION
    assert error.reason.startswith("client 2, train: ValueError: no such column: age")
    assert "Traceback" in error.reason
    assert "in train" in error.reason


def test_client_that_exits(make: Make, write: Any) -> None:
    grid = make(app_of(lambda message, context: sys.exit(3)), 1)
    (reply,) = grid.send_and_receive([write(grid, 0)])
    assert reply.error.reason.startswith("client 0, train: SystemExit: 3")


def test_client_that_returns_no_message(make: Make, write: Any) -> None:
    grid = make(app_of(lambda message, context: 7), 1)
    (reply,) = grid.send_and_receive([write(grid, 0)])
    assert "the ClientApp returned int, not a Message" in reply.error.reason


def test_unknown_action(make: Make, write: Any) -> None:
    grid = make(app_of(number), 1)
    (reply,) = grid.send_and_receive([write(grid, 0, "train.other")])
    assert "No train function registered with name 'other'" in reply.error.reason


@pytest.mark.parametrize("flat", [True, False])
def test_clients_may_change_what_they_receive(
    make: Make, write: Any, flat: bool
) -> None:
    def train(message: Message, context: Context) -> Message:
        content = message.content
        assert content["config"] == {"list": [1], "text": "as sent"}
        assert content["arrays"]["w"].numpy().sum() == 4
        assert list(content) == ["config", "arrays"]
        content["config"]["text"] = "changed"
        content["config"]["list"].append(2)
        content["arrays"]["w"] = Array(np.zeros(2))
        content["more"] = MetricRecord({"x": 1})
        message.metadata.message_type = "query"
        return Message(content, reply_to=message)

    arrays = ones() if flat else ones().plain()
    grid = make(app_of(train), 6)
    messages = [write(grid, k, arrays=arrays) for k in range(6)]
    shared = ConfigRecord({"list": [1], "text": "as sent"})
    for message in messages:
        message.content["config"] = shared
    for _ in range(2):
        replies = list(grid.send_and_receive(messages))
        assert [r.error.reason for r in replies if r.has_error()] == []
    assert shared == {"list": [1], "text": "as sent"}
    assert arrays["w"].numpy().sum() == 4
    assert messages[0].metadata.message_type == "train"


def test_arrays_of_each_client(make: Make, write: Any) -> None:
    """Small and large ones, some shared, some not, and two in one message."""

    def train(message: Message, context: Context) -> Message:
        records = message.content.array_records
        sums = {n: float(r["w"].numpy().sum()) for n, r in records.items()}
        return answer(message, **sums)

    grid = make(app_of(train), 4)
    shared, own = ones(100_000), [ones(10), ones(50_000), ones(3).plain(), ones(20)]
    messages = [write(grid, k, arrays=own[k]) for k in range(4)]
    for message in messages:
        message.content["shared"] = shared
    sums = [dict(r.content["metrics"]) for r in grid.send_and_receive(messages)]
    assert sums == [{"arrays": size, "shared": 100_000} for size in (10, 50_000, 3, 20)]


def test_state_lasts_from_message_to_message(make: Make, write: Any) -> None:
    def train(message: Message, context: Context) -> Message:
        past = context.state.get("past", ConfigRecord({"told": []}))
        told = [*past["told"], message.content["config"]["say"]]
        context.state["past"] = ConfigRecord({"told": told})
        context.state["model"] = ones(len(told))
        return answer(message, count=len(told), size=len(context.state["model"]))

    grid = make(app_of(train), 8)
    for count in (1, 2, 3):
        messages = [write(grid, k, say=f"{k}:{count}") for k in range(8)]
        replies = grid.send_and_receive(messages)
        assert [r.content["metrics"]["count"] for r in replies] == [count] * 8


def test_state_is_as_before_when_a_client_raises_and_can_be_emptied(
    make: Make, write: Any
) -> None:
    def train(message: Message, context: Context) -> Message:
        found = len(context.state)
        what = message.content["config"]["do"]
        if what == "empty":
            context.state = RecordDict()
        else:
            context.state["seen"] = ConfigRecord()
        if what == "raise":
            raise RuntimeError
        return answer(message, found=found)

    grid = make(app_of(train), 1)
    found = []
    for what in ("raise", "write", "empty", "write"):
        (reply,) = grid.send_and_receive([write(grid, 0, do=what)])
        found.append(None if reply.has_error() else reply.content["metrics"]["found"])
    assert found == [None, 0, 1, 0]


def test_messages_to_one_client_are_handled_in_order(make: Make, write: Any) -> None:
    def train(message: Message, context: Context) -> Message:
        past = context.state.get("past", ConfigRecord({"steps": []}))
        steps = [*past["steps"], message.content["config"]["step"]]
        context.state["past"] = ConfigRecord({"steps": steps})
        return answer(message, steps=steps)

    grid = make(app_of(train), 3)
    messages = [write(grid, k, step=s) for s in range(5) for k in range(3)]
    replies = list(grid.send_and_receive(messages))
    for message, reply in zip(messages, replies, strict=True):
        step = message.content["config"]["step"]
        assert reply.content["metrics"]["steps"] == list(range(step + 1))
    # In several pushes likewise.
    ids = [grid.push_messages([write(grid, 0, step=s)])[0] for s in range(5, 9)]
    last = _collect(grid, ids)[ids[-1]]
    assert last.content["metrics"]["steps"] == list(range(9))


def _collect(grid: SimulationGrid, ids: list[str]) -> dict[str, Message]:
    found: dict[str, Message] = {}
    deadline = time.monotonic() + 30
    while len(found) < len(ids) and time.monotonic() < deadline:
        for reply in grid.pull_messages(ids):
            name = reply.metadata.reply_to_message_id
            assert name not in found
            found[name] = reply
    return found


def test_pull_hands_out_each_reply_once(make: Make, write: Any) -> None:
    grid = make(app_of(number), 5)
    ids = list(grid.push_messages([write(grid, k) for k in range(5)]))
    assert len(_collect(grid, ids)) == 5
    assert list(grid.pull_messages(ids)) == []
    assert list(grid.pull_messages(["message-that-never-was"])) == []


def test_pushed_messages_are_left_alone_by_a_round(make: Make, write: Any) -> None:
    grid = make(app_of(number), 4)
    ids = list(grid.push_messages([write(grid, 3)]))
    assert clients_of(grid.send_and_receive([write(grid, 1), write(grid, 3)])) == [1, 3]
    (reply,) = _collect(grid, ids).values()
    assert clients_of([reply]) == [3]


def test_server_may_change_what_it_has_pushed(make: Make, write: Any) -> None:
    def train(message: Message, context: Context) -> Message:
        return answer(message, value=message.content["config"]["value"])

    grid = make(app_of(train), 20)
    messages = [write(grid, k, value=1) for k in range(20)]
    ids = list(grid.push_messages(messages))
    for message in messages:
        message.content["config"]["value"] = 2
    values = [r.content["metrics"]["value"] for r in _collect(grid, ids).values()]
    assert values == [1] * 20


def test_what_has_not_begun_at_the_timeout_never_does(
    make_apart: Make, write: Any, tmp_path: Path
) -> None:
    def train(message: Message, context: Context) -> Message:
        client = context.node_config["partition-id"]
        (tmp_path / f"{client}").touch()
        time.sleep(0.3)
        return answer(message, client=client)

    grid = make_apart(app_of(train), 12)
    messages = [write(grid, k) for k in range(10)]
    replies = list(grid.send_and_receive(messages, timeout=0.5))
    assert 1 <= len(replies) < 10
    assert clients_of(replies) == sorted(clients_of(replies))
    (reply,) = grid.send_and_receive([write(grid, 11)])
    assert clients_of([reply]) == [11]
    assert len(list(tmp_path.iterdir())) < 8


@pytest.fixture
def over(tmp_path: Path) -> Iterator[Path]:
    """Give a file that is there at the end of the test at the latest."""
    path = tmp_path / "over"
    yield path
    path.touch()


def wait(message: Message, context: Context) -> Message:
    """Reply once the file is there that the message names; else at once."""
    config = message.content["config"]
    until = config.get("until")
    while until and not Path(until).exists():
        time.sleep(0.01)
    client = context.node_config["partition-id"]
    calls = context.state.get("past", MetricRecord({"calls": 0}))["calls"] + 1
    context.state["past"] = MetricRecord({"calls": calls})
    return answer(message, client=client, tag=config.get("tag", 0), calls=calls)


def of(replies: Any, name: str) -> list[Any]:
    return [reply.content["metrics"][name] for reply in replies]


def test_push_returns_at_once_and_replies_come_as_they_are_there(
    make_apart: Make, write: Any, over: Path
) -> None:
    grid = make_apart(app_of(wait), 4)
    began = time.perf_counter()
    messages = [write(grid, k, until="" if k else str(over)) for k in range(4)]
    ids = grid.push_messages(messages)
    assert time.perf_counter() - began < 1.0
    found: list[int] = []
    while len(found) < 3:
        found += of(grid.pull_messages(ids), "client")
        time.sleep(0.01)
    assert sorted(found) == [1, 2, 3]
    assert time.perf_counter() - began < 3.0


def test_nobody_is_lost_with_a_slow_one(
    make_apart: Make, write: Any, over: Path
) -> None:
    grid = make_apart(app_of(wait), 8)
    for _ in range(2):  # It is known by now that they are quick.
        grid.send_and_receive([write(grid, k) for k in range(8)])
    late = [write(grid, k, tag=1, until=str(over) if k == 2 else "") for k in range(8)]
    began = time.perf_counter()
    replies = list(grid.send_and_receive(late, timeout=2.5))
    assert time.perf_counter() - began < 4.0
    assert of(replies, "client") == [0, 1, 3, 4, 5, 6, 7]
    over.touch()
    # The late client and its worker are there for the next round; what it replied late
    # never comes, and what it did to its state stays.
    messages = [write(grid, k, tag=2) for k in range(8)]
    replies = list(grid.send_and_receive(messages, timeout=20))
    assert of(replies, "tag") == [2] * 8
    assert of(replies, "calls") == [4] * 8
    assert list(grid.pull_messages([m.metadata.message_id for m in late])) == []


def test_a_client_that_ends_its_process_takes_nobody_with_it(
    make_apart: Make, write: Any
) -> None:
    def train(message: Message, context: Context) -> Message:
        calls = context.state.get("past", MetricRecord({"calls": 0}))["calls"] + 1
        context.state["past"] = MetricRecord({"calls": calls})
        if context.node_config["partition-id"] == 1 and calls == 2:
            os._exit(3)
        return answer(message, calls=calls)

    grid = make_apart(app_of(train), 4)
    for expected in (1, 2, 3):
        replies = list(grid.send_and_receive([write(grid, k) for k in range(4)]))
        failed = [k for k, reply in enumerate(replies) if reply.has_error()]
        assert failed == ([1] if expected > 1 else [])
        assert of([r for r in replies if not r.has_error()], "calls") == [expected] * (
            4 - len(failed)
        )
    assert replies[1].error.reason.startswith(
        "client 1, train: its worker process died: "
    )


def test_modules_are_found_where_the_server_finds_them(
    make_apart: Make, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"found_by_path_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text("value = 7")
    monkeypatch.syspath_prepend(tmp_path)

    def train(message: Message, context: Context) -> Message:
        return answer(message, value=importlib.import_module(name).value)

    grid = make_apart(app_of(train), 1)
    assert of(grid.send_and_receive([write(grid, 0)]), "value") == [7]


@pytest.mark.usefixtures("two_threads")
def test_torch_has_one_thread(make: Make, write: Any) -> None:
    def train(message: Message, context: Context) -> Message:
        return answer(message, threads=torch.get_num_threads())

    grid = make(app_of(train), 1)
    (reply,) = grid.send_and_receive([write(grid, 0)])
    assert reply.content["metrics"]["threads"] == 1


# What the grids share.


def test_flowers_older_names() -> None:
    grid = LocalGrid(app_of(number), 3)
    assert grid.run.run_id > 0
    grid.set_run(_flower.empty_run(7))
    assert grid.run.run_id == 7
    message = grid.create_message(RecordDict(), "train", 1001, "group")
    assert message.metadata.group_id == "group"
    assert clients_of(grid.send_and_receive([message])) == [1]
    assert [node.node_id for node in grid.get_nodes()] == [1000, 1001, 1002]


def test_grid_needs_a_client() -> None:
    with pytest.raises(ConfigurationError, match="num_clients must be in"):
        LocalGrid(app_of(number), 0)


def test_context_of_a_client() -> None:
    config = {"rate": 0.1}
    context = make_context(2, 5, config)
    assert context.node_id == FIRST_NODE + 2
    assert context.node_config == {"partition-id": 2, "num-partitions": 5}
    assert context.run_config == config
    assert len(context.state) == 0
    assert context.run_config is not config


def test_isolated_message_shares_the_vectors(write: Any) -> None:
    record = ones()
    message = write(LocalGrid(app_of(number), 1), 0, arrays=record)
    received = isolated(message).content["arrays"]
    assert received is not record
    assert received.flat is record.flat


def test_interrupt_is_no_reply(write: Any) -> None:
    def train(message: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    message = write(LocalGrid(app_of(number), 1), 0)
    with pytest.raises(KeyboardInterrupt):
        execute(app_of(train), message, make_context(0, 1, {}))


# Plans.


def test_only_an_app_that_can_tell_is_asked_about_a_plan() -> None:
    class Tells(ClientApp):
        asked = 0

        def trains_batched(self, context: Context) -> bool:
            self.asked += 1
            assert context.node_config == {"partition-id": 0, "num-partitions": 7}
            assert context.run_config == {"a": 1}
            return False

    app = Tells()
    assert usable_plan(Plan(), app, 7, {"a": 1}) == Plan()
    assert not app.asked
    assert usable_plan(Plan(20), app, 7, {"a": 1}) == Plan()
    assert usable_plan(Plan(20), ClientApp(), 7, {}) == Plan(20)
