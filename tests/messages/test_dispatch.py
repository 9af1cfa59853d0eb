"""Cohorts and replies: values to us, sequences of messages to everybody else."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from torch import nn

from fedweight.clients import TrainingApp, TrainingSettings
from fedweight.core.errors import AggregationError
from fedweight.core.module import FlatModule
from fedweight.data import ClientData, Examples
from fedweight.messages import _flower
from fedweight.messages.arrays import FlatRecord
from fedweight.messages.dispatch import Cohort, Replies, Reply
from fedweight.simulations.local import LocalGrid
from fedweight.strategies.fedavg import FedAvg


@pytest.fixture(autouse=True)
def _may_make_messages() -> Iterator[None]:
    with _flower.task_identity(1):
        yield


def linear():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(4, 3)


def model_of(value):
    model = FlatModule(linear()).save()
    return model.with_parameters(torch.full_like(model.parameters, value))


NODES = [1000, 1003, 2**63 + 5]
OWN = {1003: ConfigRecord({"server-round": 3, "mu": 0.5}), 2**63 + 5: ConfigRecord()}


def cohort_of(config_key="config"):
    shared = ConfigRecord({"server-round": 3})
    content = RecordDict({"arrays": FlatRecord(model_of(1.0)), config_key: shared})
    return Cohort(content, NODES, "train", OWN, config_key)


@pytest.mark.parametrize("config_key", ["config", "settings"])
def test_a_cohort_is_the_messages_to_its_clients(config_key):
    cohort = cohort_of(config_key)
    assert isinstance(cohort, Sequence)
    assert len(cohort) == 3
    shared = cohort.content.config_records[config_key]
    for message, node in zip(cohort, NODES, strict=True):
        assert isinstance(message, Message)
        assert message.metadata.dst_node_id == node
        assert message.metadata.message_type == "train"
        assert list(message.content) == ["arrays", config_key]
        assert message.content["arrays"] is cohort.content["arrays"]
        assert message.content[config_key] is OWN.get(node, shared)
        assert cohort.config(node) is OWN.get(node, shared)


def test_a_second_look_finds_the_same_message():
    cohort = cohort_of()
    first = list(cohort)
    again = [cohort[0], cohort[1], cohort[-1]]
    assert all(a is b for a, b in zip(first, again, strict=True))
    assert all(a is b for a, b in zip(cohort[1:], first[1:], strict=True))
    with pytest.raises(IndexError):
        cohort[3]


def test_a_cohort_is_untouched_until_somebody_has_a_message():
    cohort = cohort_of()
    assert len(cohort) == 3
    assert cohort.config(1003)["mu"] == 0.5
    assert cohort.untouched
    message = cohort[1]
    assert not cohort.untouched
    _flower.set_message_id(message, "message-7")
    assert cohort.node_of("message-7") == 1003
    assert cohort.node_of("message-8") is None


def replies_of(cohort):
    return Replies(
        cohort,
        [
            Reply(1000, model_of(2.0), {"num-examples": 5}, {"label-counts": [2, 3]}),
            Reply(2**63 + 5, error="it went away"),
        ],
    )


def test_replies_are_the_messages_of_their_clients():
    cohort = cohort_of()
    good, bad = replies_of(cohort)
    assert good.metadata.src_node_id == 1000
    assert good.metadata.message_type == "train"
    assert list(good.content) == ["metrics", "arrays", "profile"]
    assert good.content["metrics"] == MetricRecord({"num-examples": 5})
    assert good.content["profile"] == ConfigRecord({"label-counts": [2, 3]})
    assert (good.content["arrays"]["weight"].numpy() == 2).all()
    assert bad.metadata.src_node_id == 2**63 + 5
    assert bad.error.reason == "it went away"


def test_replies_are_plain_values_until_somebody_has_a_message():
    replies = replies_of(cohort_of())
    assert len(replies) == 2
    assert [reply.node for reply in replies.plain] == [1000, 2**63 + 5]
    message = replies[0]
    assert replies.plain is None
    assert replies[0] is message
    assert [m is message for m in replies] == [True, False]
    assert replies[-1].has_error()


def test_a_reply_is_read_as_it_was_written():
    layout = model_of(0.0).layout
    replies = replies_of(cohort_of())
    for plain, message in zip(replies.plain, list(replies), strict=True):
        read = Reply.of(message, layout, "arrays")
        assert (read.node, read.error) == (plain.node, plain.error)
        assert dict(read.metrics) == dict(plain.metrics)
        assert dict(read.profile) == dict(plain.profile)
        assert read.model is plain.model
    two = replies[0]
    two.content["more"] = MetricRecord({"x": 1})
    with pytest.raises(AggregationError, match="2 metric records"):
        Reply.of(two, layout, "arrays")


# A whole run: on our grid, on another one, within a wrapper.


class ForeignGrid(Grid):
    """Iterates over messages and returns a list, as Flower's own grids do."""

    def __init__(self, inner):
        self.inner = inner

    def send_and_receive(self, messages, *, timeout=None):
        return list(self.inner.send_and_receive(list(messages), timeout=timeout))

    def get_node_ids(self):
        return self.inner.get_node_ids()

    def set_run(self, run):
        self.inner.set_run(run)

    @property
    def run(self):
        return self.inner.run

    def create_message(self, *arguments, **options):
        return self.inner.create_message(*arguments, **options)

    def push_messages(self, messages):
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids):
        return self.inner.pull_messages(message_ids)

    def client_of(self, node):
        return self.inner.client_of(node)


def data(context):
    client = int(context.node_config["partition-id"])
    rng = np.random.default_rng(client)

    def part(n):
        x = rng.normal(size=(n, 4)).astype(np.float32)
        return Examples(x, rng.integers(0, 3, n))

    return ClientData(part(10 + client), part(4))


def failing(context):
    if context.node_config["partition-id"] == 5:
        raise OSError("no such file")
    return data(context)


class Told(FedAvg):
    """Tells some clients something of their own, and asks for it."""

    request = ("label-counts",)

    def tell(self, selection):
        odd = [client % 2 for client in selection.clients]
        return {
            "proximal-mu": [0.3 if o else None for o in odd],
            "local-epochs": [2 if o else None for o in odd],
        }


class Watching(LocalGrid):
    """Notes what came and went."""

    untouched = True

    def send_and_receive(self, messages, *, timeout=None):
        replies = super().send_and_receive(messages, timeout=timeout)
        self.untouched &= messages.untouched and replies.plain is not None
        return replies


def app(data=data):
    return TrainingApp(
        linear, data, num_classes=3, settings=TrainingSettings(batch_size=4)
    )


def run(grid, wrap=lambda strategy: strategy):
    strategy = Told(fraction_train=0.7, min_train_nodes=4, seed=1)
    arrays = ArrayRecord(linear().state_dict())
    result = wrap(strategy).start(grid, arrays, num_rounds=3)
    return strategy.history, result.arrays


def assert_same_history(ours, theirs):
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert (a.status, a.reason) == (b.status, b.reason) == ("ok", "")
        assert a.metrics == pytest.approx(b.metrics, abs=1e-6)
        for one, other in zip(a.clients, b.clients, strict=True):
            assert (one.client, one.status) == (other.client, other.status)
            assert one.reason.split("\n")[0] == other.reason.split("\n")[0]
            assert one.weight == pytest.approx(other.weight, nan_ok=True)
            assert one.metrics == pytest.approx(other.metrics, abs=1e-6)
            assert (one.bytes_up, one.bytes_down) == (other.bytes_up, other.bytes_down)


def test_our_grid_and_a_foreign_one_give_the_same_history():
    grid = Watching(app(failing), 8)
    ours, model = run(grid)
    theirs, other = run(ForeignGrid(LocalGrid(app(failing), 8)))
    assert grid.untouched  # no message was made on our way
    assert_same_history(ours, theirs)
    failed = [c for r in ours for c in r.clients if c.status == "failed"]
    assert {c.client for c in failed} == {5}
    assert all("OSError: no such file" in c.reason for c in failed)
    for name in model:
        np.testing.assert_allclose(model[name].numpy(), other[name].numpy(), atol=1e-6)


def test_a_wrapper_that_changes_replies_is_honoured():
    def clip(strategy):
        return DifferentialPrivacyServerSideFixedClipping(
            strategy, noise_multiplier=0.0, clipping_norm=1e-3, num_sampled_clients=5
        )

    _, plain = run(LocalGrid(app(), 8))
    ours, clipped = run(LocalGrid(app(), 8), clip)
    theirs, other = run(ForeignGrid(LocalGrid(app(), 8)), clip)
    assert_same_history(ours, theirs)
    start = linear().state_dict()

    def moved(model):
        return sum(
            float(np.square(model[name].numpy() - value.numpy()).sum())
            for name, value in start.items()
        )

    assert 0 < moved(clipped) ** 0.5 <= 3e-3 + 1e-6 < moved(plain) ** 0.5
    for name in clipped:
        np.testing.assert_allclose(
            clipped[name].numpy(), other[name].numpy(), atol=1e-6
        )
