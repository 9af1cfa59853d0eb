"""Frozen tensors go once, to the clients that do not have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from torch import nn

from fedweight.apps import NumberedGrid
from fedweight.clients import TrainingApp
from fedweight.core.module import FlatModule
from fedweight.data import ClientData, Examples
from fedweight.messages import _flower, keys
from fedweight.messages.arrays import FlatRecord
from fedweight.simulations.local import LocalGrid
from fedweight.strategies import FedAvg

FEATURES, CLASSES, CLIENTS = 4, 3, 4


@pytest.fixture(autouse=True)
def _identity():
    with _flower.task_identity(run_id=0):
        yield


def network(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(FEATURES, 6), nn.ReLU(), nn.Linear(6, CLASSES))
    model[0].requires_grad_(False)
    return model


def client_data(context):
    client = int(context.node_config["partition-id"])
    stream = np.random.default_rng(client)
    x = stream.normal(size=(8, FEATURES)).astype(np.float32)
    part = Examples(x, stream.integers(0, CLASSES, len(x)))
    return ClientData(part, part)


class Nodes(LocalGrid):
    """Clients that get messages one by one, and may be restarted, or come late."""

    sums_models = False

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.sent = []
        self.late = 0
        self.restarts = {}

    def get_node_ids(self):
        return [*super().get_node_ids()][: CLIENTS - self.late]

    def send_and_receive(self, messages, *, timeout=None):
        several = list(messages)
        for message in several:
            arrays = sum(len(r) for r in message.content.array_records.values())
            self.sent.append((message.metadata.message_type, arrays))
            told = message.content.config_records.get(keys.CONFIG, {})
            if message.metadata.message_type == "train":
                for client in self.restarts.pop(told[keys.ROUND], ()):
                    del self.contexts[client]
        return list(super().send_and_receive(several, timeout=timeout))


SERVER = 1


def federation(built, rounds=4, change=None, **options):
    """Run with clients that build the model from a seed of their own."""
    app = TrainingApp(lambda: network(built), client_data, num_classes=CLASSES)
    nodes = Nodes(app, CLIENTS)
    whole = FlatModule(network(SERVER)).save()
    grid = NumberedGrid(nodes)
    grid.bring(whole.base)
    strategy = FedAvg(min_available_nodes=1, **options)
    if change is not None:
        change(nodes, strategy)
    told = ConfigRecord({keys.BASE: whole.base.digest})
    result = strategy.start(
        grid,
        FlatRecord(whole.travelling()),
        num_rounds=rounds,
        train_config=told,
        evaluate_config=ConfigRecord(dict(told)),
    )
    arrays = {name: array.numpy() for name, array in result.arrays.items()}
    return strategy, nodes, arrays


def queries(nodes):
    return [arrays for kind, arrays in nodes.sent if kind == "query.base"]


def test_clients_that_build_the_same_are_sent_nothing():
    strategy, nodes, arrays = federation(SERVER)
    assert [r.status for r in strategy.history] == ["ok"] * 4
    assert queries(nodes) == [0] * CLIENTS
    assert list(arrays) == ["2.weight", "2.bias"]
    assert {n for kind, n in nodes.sent if kind in ("train", "evaluate")} == {2}


def test_others_are_sent_it_once_and_train_the_same():
    strategy, nodes, arrays = federation(built=7)
    assert [r.status for r in strategy.history] == ["ok"] * 4
    assert {c.status for r in strategy.history for c in r.clients} == {"ok"}
    assert queries(nodes) == [0] * CLIENTS + [2] * CLIENTS
    _, _, expected = federation(SERVER)
    for name, values in expected.items():
        np.testing.assert_array_equal(arrays[name], values)


def test_a_client_that_was_restarted_is_sent_it_again_and_goes_on():
    def change(nodes, strategy):
        nodes.restarts = {3: [2]}

    strategy, nodes, _ = federation(7, rounds=5, change=change)
    assert [r.status for r in strategy.history] == ["ok"] * 5
    lost = [
        (r.number, c.status, c.reason)
        for r in strategy.history
        for c in r.clients
        if c.status != "ok"
    ]
    assert [(number, status) for number, status, _ in lost] == [(3, "failed")]
    assert keys.OTHER_BASE in lost[0][2]
    # Asked, and sent, once more: it, and nobody else.
    assert queries(nodes) == [0] * CLIENTS + [2] * CLIENTS + [0, 2]


def test_one_that_builds_the_same_does_not_notice_that_it_was_restarted():
    def change(nodes, strategy):
        nodes.restarts = {3: [2]}

    strategy, _, arrays = federation(SERVER, rounds=5, change=change)
    assert {c.status for r in strategy.history for c in r.clients} == {"ok"}
    _, _, expected = federation(SERVER, rounds=5)
    for name, values in expected.items():
        np.testing.assert_array_equal(arrays[name], values)


def test_a_client_that_comes_late_is_sent_it_when_it_is_there():
    def change(nodes, strategy):
        nodes.late = 2
        configure = strategy.configure_train

        def configured(round, *rest):
            nodes.late = 2 if round < 3 else 0
            return configure(round, *rest)

        object.__setattr__(strategy, "configure_train", configured)

    strategy, nodes, _ = federation(7, rounds=4, change=change)
    asked = [len(r.clients) for r in strategy.history]
    assert asked == [2, 2, 4, 4]
    assert {c.status for r in strategy.history for c in r.clients} == {"ok"}
    assert queries(nodes) == [0, 0, 2, 2] * 2


def test_a_client_that_is_sent_no_frozen_tensors_says_what_it_lacks():
    app = TrainingApp(lambda: network(7), client_data, num_classes=CLASSES)
    whole = FlatModule(network(SERVER)).save()
    strategy = FedAvg()
    strategy.start(
        LocalGrid(app, CLIENTS),
        FlatRecord(whole.travelling()),
        num_rounds=1,
        train_config=ConfigRecord({keys.BASE: whole.base.digest}),
    )
    reasons = {c.reason for c in strategy.history[0].clients}
    for reason in reasons:
        assert keys.OTHER_BASE in reason
        assert whole.base.digest[:12] in reason


def test_tensors_of_another_model_are_not_taken(caplog):
    class Wrong(NumberedGrid):
        def bring(self, base):
            super().bring(base)
            wrong = FlatRecord(FlatModule(network(3)).save().base.alone)
            lacking = self._sender._lacking

            def sent(content, nodes):
                if content.array_records:
                    content[keys.ARRAYS] = ArrayRecord(dict(wrong.items()))
                return lacking(content, nodes)

            self._sender._lacking = sent

    app = TrainingApp(lambda: network(7), client_data, num_classes=CLASSES)
    nodes = Nodes(app, CLIENTS)
    grid = Wrong(nodes)
    grid.bring(FlatModule(network(SERVER)).copy_base())
    list(grid.get_node_ids())
    assert caplog.text.count("did not take") == CLIENTS
    assert all(keys.BASE not in c.state for c in nodes.contexts.values())
