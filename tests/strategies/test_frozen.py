"""Frozen tensors keep their bits: in every method, whoever adds the models up."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from torch import nn

from fedweight.clients import TrainingApp, TrainingSettings
from fedweight.core.module import FlatModule
from fedweight.data import ClientData, Examples
from fedweight.messages.arrays import FlatRecord, complete
from fedweight.simulations import Plan
from fedweight.simulations.local import LocalGrid
from fedweight.strategies import STRATEGIES, strategy_class
from fedweight.strategies.fedavg import FedAvg
from fedweight.strategies.fedlaw import FedLAW
from fedweight.strategies.ida import IDA
from fedweight.strategies.server_optimizers import ServerAdam, ServerMomentum

METHODS = sorted(STRATEGIES.entries)
FEATURES, CLASSES, CLIENTS = 4, 3, 5

PROXY = SimpleNamespace(
    x=np.random.default_rng(0).normal(size=(12, FEATURES)).astype(np.float32),
    y=np.arange(12) % CLASSES,
)


def network():
    """A frozen layer before trained ones, with values that rounding would move."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(FEATURES, 6),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.Linear(6, CLASSES),
            nn.Linear(CLASSES, CLASSES),
        )
    for parameter in (*model[0].parameters(), model[3].bias):
        parameter.requires_grad_(False)
    return model


FROZEN = ["0.weight", "0.bias", "3.bias"]


def client_data(context):
    client = int(context.node_config["partition-id"])
    stream = np.random.default_rng(client)
    x = stream.normal(size=(6 + 2 * client, FEATURES)).astype(np.float32)
    part = Examples(x, stream.integers(0, CLASSES, len(x)))
    return ClientData(part, part)


class Foreign(LocalGrid):
    """Looks at every message, as a grid that is not ours does."""

    sums_models = False

    def send_and_receive(self, messages, *, timeout=None):
        return list(super().send_and_receive(list(messages), timeout=timeout))


def build(name, **options):
    cls = strategy_class(name)
    inputs = {"model": network(), "proxy": PROXY}
    needed = {key: inputs[key] for key in cls.needs}
    few = {
        "autoflip": {"prune": 0.1},  # Pruned, a bias of zeros stays one.
        "fedcollab": {"discriminator_rounds": 20},
        "fedlex": {"explore_epochs": 1},
    }
    more = {**few.get(name, {}), **options}
    return cls(**needed, fraction_evaluate=0.0, **more)


@cache
def app_of(model):
    """One for all: to try a model, and to trace it, takes longer than a run."""
    settings = TrainingSettings(batch_size=4, learning_rate=0.1, weight_decay=0.01)
    return TrainingApp(model, client_data, num_classes=CLASSES, settings=settings)


def run(strategy, grid=LocalGrid, told=True, chunk=1, rounds=3, model=network):
    grid = grid(app_of(model), CLIENTS, plan=Plan(chunk))
    whole = FlatModule(model()).save()
    if told == "part":
        start = FlatRecord(whole.travelling())
    elif told:
        start = FlatRecord(whole)
    else:
        start = ArrayRecord(model().state_dict())
    result = strategy.start(grid, start, num_rounds=rounds, train_config=ConfigRecord())
    statuses = [record.status for record in strategy.history if record.number]
    assert statuses == ["ok"] * rounds
    if told == "part":
        assert not {*FROZEN} & {*result.arrays}
        return dict(complete(result.arrays, whole.base).named_arrays())
    return {name: array.numpy() for name, array in result.arrays.items()}


def assert_kept(arrays, others_moved=True):
    for name, before in network().state_dict().items():
        if name in FROZEN:
            np.testing.assert_array_equal(arrays[name], before)
        elif others_moved:
            assert (arrays[name] != before.numpy()).any(), name


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("grid", [LocalGrid, Foreign])
@pytest.mark.parametrize("told", [True, False, "part"])
def test_frozen_tensors_keep_their_bits(name, chunk, grid, told):
    assert_kept(run(build(name), grid, told, chunk))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("grid", [LocalGrid, Foreign])
def test_it_makes_no_difference_whether_they_travel(name, grid):
    with_them, without = build(name), build(name)
    found = run(without, grid, "part", 5)
    for tensor, values in run(with_them, grid, True, 5).items():
        np.testing.assert_array_equal(found[tensor], values)
    frozen = 4 * (6 * FEATURES + 6 + CLASSES)
    # What comes before the rounds may ask a client twice.
    for k, one in enumerate(without.history):
        if not one.number:
            continue
        for mine, other in zip(one.clients, with_them.history[k].clients, strict=True):
            assert other.bytes_up - mine.bytes_up == frozen
            assert other.bytes_down - mine.bytes_down == frozen


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("optimizer", [ServerAdam, ServerMomentum])
@pytest.mark.parametrize("told", [True, False])
def test_with_a_server_optimizer_too(name, optimizer, told):
    assert_kept(run(build(name, server_optimizer=optimizer()), told=told))


@pytest.mark.parametrize("name", METHODS)
def test_where_the_strategy_is_told_the_names(name):
    strategy = build(name, frozen=FROZEN, buffers=["1.running_mean", "1.running_var"])
    assert_kept(run(strategy, told=False))
    assert strategy._now.model.layout == FlatModule(network()).layout


def test_what_is_frozen_is_in_no_distance():
    """A frozen base of large values would drown the rest in its rounding."""

    def large():
        model = network()
        with torch.no_grad():
            model[0].weight.mul_(1e6)
            model[0].bias.fill_(0)
        return model

    strategy = IDA(fraction_evaluate=0.0)
    run(strategy, model=large, rounds=1)
    distances = [c.metrics["distance"] for c in strategy.history[0].clients]
    exact = IDA(fraction_evaluate=0.0, accumulate="float64")
    run(exact, model=large, rounds=1)
    for client, found in zip(exact.history[0].clients, distances, strict=True):
        assert found == pytest.approx(client.metrics["distance"], rel=1e-5)


def test_fedlaw_shrinks_what_is_trained_only():
    """Ten rounds scaled a frozen layer 4.45 times once."""
    strategy = build("fedlaw", shrink=0.9)
    arrays = run(strategy, rounds=10)
    assert_kept(arrays)


def test_fedlaws_gamma_is_learned_for_what_is_trained(kit):
    """Two layers, the first frozen: its gradient by gamma is that of the second."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model = model.double()
    model[0].weight.requires_grad_(False)
    proxy = SimpleNamespace(x=np.array([[1.0, 0.5], [0.0, 2.0]]), y=np.array([0, 1]))
    start = {n: t.numpy() for n, t in model.state_dict().items()}
    stream = np.random.default_rng(3)
    rows = [start["1.weight"] + stream.normal(size=(2, 2)) for _ in range(2)]
    clients = {
        k: kit.Client({"0.weight": start["0.weight"], "1.weight": row})
        for k, row in enumerate(rows)
    }
    strategy = FedLAW(
        model=model,
        proxy=proxy,
        server_epochs=1,
        optimizer="sgd",
        revert_if_worse=False,
    )
    run = kit.Federation(strategy, clients, kit.record(start))
    record = run.round()
    by = torch.zeros((), dtype=torch.float64, requires_grad=True)
    mean = torch.from_numpy(np.mean(rows, 0))
    hidden = torch.from_numpy(proxy.x) @ model[0].weight.T
    loss = nn.functional.cross_entropy(
        hidden @ (by.exp() * mean).T, torch.from_numpy(proxy.y)
    )
    loss.backward()
    assert record.metrics["gamma"] == pytest.approx(float((-0.01 * by.grad).exp()))


def test_an_update_of_nothing_moves_nothing_under_any_rule(kit):
    """The server knows names only: what no client changed, it leaves alone."""
    stream = np.random.default_rng(0)
    start = {n: stream.normal(size=50).astype(np.float32) for n in ("base", "head")}

    class Shrinking(FedAvg):
        def aggregate(self, round):
            round.log("weight", round.size_weights)
            return 0.5 * super().aggregate(round)

    for strategy in (
        FedAvg(),
        Shrinking(),
        IDA(),
        FedAvg(server_optimizer=ServerAdam()),
    ):
        clients = {
            k: kit.Client({**start, "head": start["head"] + k + 1}, 3.0 + k)
            for k in range(4)
        }
        run = kit.Federation(strategy, clients, kit.record(start))
        for _ in range(3):
            assert run.round().status == "ok"
        found = {n: a.numpy() for n, a in run.arrays.items()}
        np.testing.assert_array_equal(found["base"], start["base"])
        assert (found["head"] != start["head"]).all()


def test_momentum_goes_on_for_a_tensor_that_rests_a_round(kit):
    start = {"w": np.zeros(2), "v": np.ones(2)}
    strategy = FedAvg(server_optimizer=ServerMomentum(beta=0.5))
    clients = {k: kit.Client({"w": np.ones(2), "v": np.ones(2)}) for k in range(2)}
    run = kit.Federation(strategy, clients, kit.record(start))
    run.round()
    for client in clients.values():
        client.model = None  # It sends back what it received.
    run.round()
    np.testing.assert_allclose(run.vector, [1.5, 1.5, 1, 1])
