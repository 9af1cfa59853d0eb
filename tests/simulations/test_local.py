"""The local grid: threads, which never change a result, and contexts."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedweight.errors import ConfigurationError
from fedweight.simulations.local import STEPS_OF_A_CLIENT, WORTH_A_THREAD, LocalGrid


class App(ClientApp):
    """Says that it may run in threads, and notes in which it did."""

    thread_safe = True

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds = seconds
        self.seen: set[int] = set()
        self.cancelled = False
        self.train()(self._train)

    def cancel(self) -> None:
        self.cancelled = True

    def _train(self, message: Message, context: Context) -> Message:
        self.seen.add(threading.get_ident())
        time.sleep(self.seconds)
        if message.content["config"].get("interrupt"):
            raise KeyboardInterrupt
        past = context.state.get("past", MetricRecord({"calls": 0}))
        context.state["past"] = MetricRecord({"calls": past["calls"] + 1})
        client = context.node_config["partition-id"]
        metrics = MetricRecord({"client": client, "calls": past["calls"] + 1})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)


def numbers(replies: Any, name: str = "client") -> list[int]:
    return [reply.content["metrics"][name] for reply in replies]


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads(threads: int, write: Any) -> None:
    app = App(0.002)
    grid = LocalGrid(app, 20, threads=threads)
    replies = grid.send_and_receive([write(grid, k) for k in range(20)])
    assert numbers(replies) == list(range(20))
    assert len(app.seen) <= threads


def test_one_thread_where_clients_are_quick(write: Any) -> None:
    app = App()
    grid = LocalGrid(app, 5)
    grid.send_and_receive([write(grid, k) for k in range(5)])
    assert app.seen == {threading.get_ident()}


def test_threads_where_clients_are_slow(
    write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    app = App(WORTH_A_THREAD * STEPS_OF_A_CLIENT * 1.1)
    grid = LocalGrid(app, 5)
    replies = grid.send_and_receive([write(grid, k) for k in range(5)])
    assert numbers(replies) == list(range(5))
    assert app.seen - {threading.get_ident()}


def test_app_that_does_not_say_it_may_stays_in_one_thread(write: Any) -> None:
    app = App(WORTH_A_THREAD * STEPS_OF_A_CLIENT * 1.1)
    app.thread_safe = False  # type: ignore[misc]
    grid = LocalGrid(app, 2)
    grid.send_and_receive([write(grid, k) for k in range(2)])
    assert app.seen == {threading.get_ident()}


def test_client_addressed_twice_in_threads(write: Any) -> None:
    grid = LocalGrid(App(0.001), 2, threads=4)
    replies = grid.send_and_receive([write(grid, 0) for _ in range(6)])
    assert numbers(replies, "calls") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("threads", [1, 2])
def test_interrupt(threads: int, write: Any) -> None:
    app = App()
    grid = LocalGrid(app, 4, threads=threads)
    messages = [write(grid, k, interrupt=k == 2) for k in range(4)]
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        grid.send_and_receive(messages)
    assert torch.get_num_threads() == before
    assert app.cancelled == (threads > 1)


def test_contexts_only_of_clients_that_were_used(write: Any) -> None:
    grid = LocalGrid(App(), 1_000_000)
    assert grid.contexts == {}
    grid.send_and_receive([write(grid, 5), write(grid, 999)])
    assert sorted(grid.contexts) == [5, 999]


def test_intra_op_threads_are_put_back(write: Any) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        grid = LocalGrid(App(), 2)
        grid.send_and_receive([write(grid, 0)])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_threads_out_of_range() -> None:
    with pytest.raises(ConfigurationError, match=r"threads must be in \[1, inf\)"):
        LocalGrid(App(), 2, threads=0)
