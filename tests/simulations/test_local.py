"""The local grid: threads, which never change a result, and contexts."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from torch import nn

from fedweight.clients import TrainingApp, TrainingSettings
from fedweight.core.errors import ConfigurationError
from fedweight.core.records import RoundRecord
from fedweight.data import ClientData, Examples
from fedweight.messages.dispatch import Cohort
from fedweight.simulations.local import STEPS_OF_A_CLIENT, WORTH_A_THREAD, LocalGrid
from fedweight.simulations.plan import Plan
from fedweight.strategies.fedavg import FedAvg


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


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("threads", [1, 2])
def test_interrupt(threads: int, write: Any) -> None:
    app = App()
    grid = LocalGrid(app, 4, threads=threads)
    messages = [write(grid, k, interrupt=k == 2) for k in range(4)]
    with pytest.raises(KeyboardInterrupt):
        grid.send_and_receive(messages)
    assert torch.get_num_threads() == 2
    assert app.cancelled == (threads > 1)


def test_contexts_only_of_clients_that_were_used(write: Any) -> None:
    grid = LocalGrid(App(), 1_000_000)
    assert grid.contexts == {}
    grid.send_and_receive([write(grid, 5), write(grid, 999)])
    assert sorted(grid.contexts) == [5, 999]


@pytest.mark.usefixtures("two_threads")
def test_intra_op_threads_are_put_back(write: Any) -> None:
    grid = LocalGrid(App(), 2)
    grid.send_and_receive([write(grid, 0)])
    assert torch.get_num_threads() == 2


def test_threads_out_of_range() -> None:
    with pytest.raises(ConfigurationError, match=r"threads must be in \[1, inf\)"):
        LocalGrid(App(), 2, threads=0)


# Our own app, which trains a cohort list by list.


def examples(n: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 4)).astype(np.float32)
    return Examples(x, rng.integers(0, 3, n))


def data(context: Context) -> ClientData:
    client = int(context.node_config["partition-id"])
    return ClientData(examples(SIZES[client], client), examples(5, 50 + client))


SIZES = [int(n) for n in np.random.default_rng(0).integers(3, 40, 21)]


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 3))


def run(grid: LocalGrid) -> tuple[np.ndarray, list[RoundRecord]]:
    strategy = FedAvg(fraction_train=0.9, min_train_nodes=2, seed=3)
    result = strategy.start(grid, ArrayRecord(network().state_dict()), num_rounds=3)
    arrays = [array.numpy().ravel() for array in result.arrays.values()]
    return np.concatenate(arrays), strategy.history


def trainer(**options: Any) -> TrainingApp:
    settings = TrainingSettings(epochs=2, batch_size=8)
    options = {"settings": settings, "num_classes": 3, **options}
    return TrainingApp(network, options.pop("data", data), **options)


@pytest.mark.parametrize("sizes", [SIZES, None])
def test_a_plan_changes_no_more_than_the_last_bits(sizes: list[int] | None) -> None:
    expected, history = run(LocalGrid(trainer(), 21, threads=1))
    for chunk in (2, 8, 50):
        grid = LocalGrid(trainer(sizes=sizes), 21, threads=1, plan=Plan(chunk))
        model, batched = run(grid)
        np.testing.assert_allclose(model, expected, rtol=0, atol=1e-5)
        for a, b in zip(history, batched, strict=True):
            assert [c.client for c in a.clients] == [c.client for c in b.clients]
            assert a.metrics == pytest.approx(b.metrics, abs=1e-5)


@pytest.mark.parametrize("chunk", [1, 8])
def test_threads_change_not_a_bit_of_a_plan(chunk: int) -> None:
    one, history = run(LocalGrid(trainer(sizes=SIZES), 21, threads=1, plan=Plan(chunk)))
    for threads in (2, 8):
        grid = LocalGrid(trainer(sizes=SIZES), 21, threads=threads, plan=Plan(chunk))
        some, other = run(grid)
        np.testing.assert_array_equal(one, some)
        for a, b in zip(history, other, strict=True):
            assert a.metrics == b.metrics
            assert [c.metrics for c in a.clients] == [c.metrics for c in b.clients]


def test_contexts_with_a_state_are_kept_and_of_others_not_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedweight.simulations.local.IDLE_CONTEXTS", 5)
    grid = LocalGrid(trainer(), 21)
    grid.context(3).state["own"] = ConfigRecord({"n": 1})
    run(grid)
    assert list(grid.contexts) == [3]
    monkeypatch.setattr("fedweight.simulations.local.IDLE_CONTEXTS", 21)
    run(grid)
    assert len(grid.contexts) > 5


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("chunk", [1, 8])
def test_what_the_caller_set_for_its_own_thread_concerns_no_client(
    chunk: int, threads: int
) -> None:
    def made() -> np.ndarray:
        grid = LocalGrid(trainer(sizes=SIZES), 21, threads=threads, plan=Plan(chunk))
        return run(grid)[0]

    expected = made()
    for setting in (
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        with setting:
            np.testing.assert_array_equal(made(), expected)


def test_a_client_that_fails_in_a_chunk_is_reported_alone() -> None:
    def failing(context: Context) -> ClientData:
        if context.node_config["partition-id"] == 4:
            raise OSError("no such file")
        return data(context)

    _, history = run(LocalGrid(trainer(data=failing), 21, plan=Plan(8)))
    asked = [c for record in history for c in record.clients if c.client == 4]
    assert {c.status for c in asked} == {"failed"}
    assert "OSError: no such file" in asked[0].reason
    others = [c for r in history for c in r.clients if c.client != 4]
    assert {c.status for c in others} == {"ok", "evaluated"}
    assert not any(c.reason for c in others)


@pytest.mark.parametrize("threads", [1, 2])
def test_lists_of_clients_that_begin_too_late_are_missing(threads: int) -> None:
    def slow(context: Context) -> ClientData:
        time.sleep(0.03)
        return data(context)

    app = trainer(data=slow)
    grid = LocalGrid(app, 21, threads=threads, plan=Plan(4))
    content = RecordDict(
        {"arrays": ArrayRecord(network().state_dict()), "config": ConfigRecord()}
    )
    cohort = Cohort(content, list(grid.get_node_ids()), "train")
    replies = grid.send_and_receive(cohort, timeout=0.06)
    nodes = [reply.metadata.src_node_id for reply in replies]
    assert 3 <= len(nodes) < 21
    assert nodes == cohort.nodes[: len(nodes)]
    everybody = Cohort(content, cohort.nodes, "train")
    assert len(grid.send_and_receive(everybody)) == 21
    nobody = Cohort(content, [], "train")
    assert list(grid.send_and_receive(nobody)) == []


@pytest.mark.parametrize("kind", ["query.label_counts", "train.other"])
def test_a_cohort_of_other_messages_is_answered_message_by_message(kind: str) -> None:
    grid = LocalGrid(trainer(), 21)
    content = RecordDict({"config": ConfigRecord()})
    replies = list(grid.send_and_receive(Cohort(content, [1000, 1001], kind)))
    if kind == "train.other":
        assert all("registered with name 'other'" in r.error.reason for r in replies)
    else:
        counts = [r.content["profile"]["label-counts"] for r in replies]
        assert [sum(c) for c in counts] == SIZES[:2]
