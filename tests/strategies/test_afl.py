import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedweight.clients import TrainingApp, TrainingSettings
from fedweight.core.errors import ConfigurationError
from fedweight.core.module import FlatModule
from fedweight.data import ClientData, Examples
from fedweight.messages import keys
from fedweight.messages.arrays import FlatRecord
from fedweight.simulations import LocalGrid
from fedweight.strategies.afl import AFL, exponentiated, projected

CASES = range(3)
UPDATES = {"projected": projected, "exponentiated": exponentiated}


def federation(kit, strategy, losses, sizes=None):
    clients = {
        k: kit.Client(np.eye(len(losses))[k], n, {keys.LOSS_BEFORE: loss})
        for k, (loss, n) in enumerate(
            zip(losses, sizes or [10.0] * len(losses), strict=True)
        )
    }
    return kit.Federation(strategy, clients, kit.record({"w": np.zeros(len(losses))}))


def build(**options):
    return AFL(min_train_nodes=1, min_available_nodes=1, **options)


def weights_of(record):
    return [c.weight for c in record.clients if c.status == "ok"]


def column(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_golden(kit, golden, case):
    """The model moves by the mixture as it is; the losses change the next one."""
    table = golden("afl")
    expected = table["case"][case]
    options = {name: expected[name] for name in ("update", "step")}
    run = federation(kit, build(**options), table["losses"])
    assert weights_of(run.round()) == pytest.approx([1 / 3] * 3)
    np.testing.assert_allclose(run.vector, 1 / 3)
    record = run.round()
    assert weights_of(record) == pytest.approx(expected["mixture"], abs=1e-8)
    logged = [c.metrics["lambda"] for c in record.clients]
    assert logged == pytest.approx(expected["mixture"], abs=1e-8)


@pytest.mark.parametrize("update", UPDATES)
def test_limits(kit, update):
    """Near a step of 0 all count alike; a large step leaves the worst alone."""
    for step, expected in ((1e-12, [1 / 3] * 3), (1e6, [1.0, 0.0, 0.0])):
        run = federation(kit, build(update=update, step=step), [2.0, 1.0, 0.5])
        for _ in range(3):
            weights = weights_of(run.round())
        assert weights == pytest.approx(expected, abs=1e-9)


mixtures = st.lists(st.floats(0, 1), min_size=1, max_size=6).filter(any)


@pytest.mark.parametrize("update", UPDATES)
@given(entries=mixtures, data=st.data())
def test_a_mixture_stays_one_and_keeps_the_order_of_the_losses(update, entries, data):
    k = len(entries)
    rise = data.draw(st.lists(st.floats(0, 1e6), min_size=k, max_size=k))
    before = column(entries) / sum(entries)
    after = UPDATES[update](before, column(rise), torch.ones(k, dtype=torch.float64))
    assert (after >= 0).all()
    assert float(after.sum()) == pytest.approx(1)
    alike = torch.full_like(before, 1 / k)
    ones = torch.ones_like(before)
    after = UPDATES[update](alike, column(rise), ones).numpy()
    assert (np.diff(after[np.argsort(rise)]) >= -1e-12).all()


@given(entries=mixtures, data=st.data())
def test_the_projection_is_the_nearest_mixture(entries, data):
    k = len(entries)
    rise = data.draw(st.lists(st.floats(0, 10), min_size=k, max_size=k))
    before = column(entries) / sum(entries)
    found = projected(before, column(rise), torch.ones(k, dtype=torch.float64)).numpy()
    goal = (before + column(rise)).numpy()
    # In the direction of every corner of the simplex the distance grows.
    for corner in np.eye(k):
        assert (found - goal) @ (corner - found) >= -1e-9


@pytest.mark.parametrize("update", UPDATES)
@given(data=st.data())
def test_equals_are_one_entry(update, data):
    """Of ten clients that were never seen one number is carried."""
    seen = data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=4))
    rise = data.draw(st.lists(st.floats(0, 3), min_size=len(seen), max_size=len(seen)))
    ones = [1.0] * len(seen)
    short = UPDATES[update](
        column([*seen, 0.5]), column([*rise, 0.0]), column([*ones, 10.0])
    )
    long = UPDATES[update](
        column(seen + [0.5] * 10), column(rise + [0.0] * 10), column(ones + [1.0] * 10)
    )
    np.testing.assert_allclose(long[: len(seen)], short[:-1], atol=1e-12)
    np.testing.assert_allclose(long[len(seen) :], short[-1], atol=1e-12)


def by_hand(mixture, losses, drawn, step):
    """All N entries, as the definition has it."""
    v = mixture.copy()
    v[drawn] += step * losses[drawn]
    u = np.sort(v)[::-1]
    spare = (1 - np.cumsum(u)) / np.arange(1, len(v) + 1)
    return np.maximum(v + spare[np.nonzero(u + spare > 0)[0].max()], 0)


def test_partial_participation_is_that_of_all_entries(kit):
    losses = np.random.default_rng(0).uniform(0, 3, 30)
    run = federation(kit, build(fraction_train=0.2, step=0.002), losses.tolist())
    mixture = np.full(30, 1 / 30)
    for _ in range(12):
        record = run.round()
        drawn = [c.client for c in record.clients]
        own = mixture[drawn]
        np.testing.assert_allclose(weights_of(record), own / own.sum(), atol=1e-12)
        mixture = by_hand(mixture, losses, drawn, 0.002)
        state = run.strategy.state["method"]
        whole = np.full(30, state["unseen"])
        whole[[*state["seen"]]] = [*state["seen"].values()]
        np.testing.assert_allclose(whole, mixture, atol=1e-12)
        assert len(state["seen"]) <= 6 * run.number


def test_where_all_have_none_they_count_by_size(kit, caplog):
    run = federation(kit, build(step=100.0), [5.0, 0.1, 0.1], [10.0, 10.0, 30.0])
    run.round()
    run.clients[0].silent = True
    assert weights_of(run.round()) == [0.25, 0.75]
    assert "falling back to data size" in caplog.text


def test_entries_of_0_come_back_if_projected(kit):
    run = federation(kit, build(step=1.0), [5.0, 0.1])
    run.round()
    assert weights_of(run.round()) == [1.0, 0.0]
    run.clients[0].metrics[keys.LOSS_BEFORE] = 0.0
    run.clients[1].metrics[keys.LOSS_BEFORE] = 5.0
    run.round()
    assert weights_of(run.round()) == [0.0, 1.0]


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("loss", [0.0, 1e300])
def test_no_loss_breaks_the_mixture(kit, update, loss):
    run = federation(kit, build(update=update, step=1e6), [loss, 1.0, 0.5])
    for _ in range(4):
        assert run.round().status == "ok"
        state = run.strategy.state["method"]["seen"]
        assert sum(state.values()) == pytest.approx(1)


@pytest.mark.parametrize("update", UPDATES)
def test_clients_may_come_and_go(kit, update):
    run = federation(kit, build(update=update, step=1e3), [9.0, 1.0, 0.5, 3.0])
    later = {k: run.clients.pop(k) for k in (2, 3)}
    for _ in range(2):
        assert run.round().status == "ok"
    assert run.strategy.state["method"]["unseen"] is None
    run.clients.update(later)
    del run.clients[0]
    for _ in range(2):
        assert sum(weights_of(run.round())) == pytest.approx(1)
    assert sum(run.strategy.state["method"]["seen"].values()) == pytest.approx(1)


@pytest.mark.parametrize("loss", [-0.1, math.nan, math.inf])
def test_a_loss_that_is_none_rejects_the_reply(kit, loss):
    run = federation(kit, build(), [1.0, loss, 1.0])
    record = run.round()
    assert [c.status for c in record.clients] == ["ok", "rejected", "ok"]
    assert "'loss-before'" in record.clients[1].reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update": "mirror"}, "update must be one of"),
        ({"step": 0.0}, "step must be"),
        ({"step": math.inf}, "step must be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigurationError, match=message):
        AFL(**options)


def test_the_worst_served_client_gains(kit):
    """Three clients agree; the fourth, small one is served better than by FedAvg."""

    def data(context):
        client = context.node_config["partition-id"]
        rng = np.random.default_rng(client)
        x = rng.normal(size=(40 if client < 3 else 10, 2)).astype(np.float32)
        y = (x[:, 0] > 0).astype(int)
        part = Examples(x, y if client < 3 else 1 - y)
        return ClientData(part, part)

    def worst(strategy):
        model = nn.Linear(2, 2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        app = TrainingApp(
            lambda: nn.Linear(2, 2),
            data,
            num_classes=2,
            settings=TrainingSettings(batch_size=10),
        )
        start = FlatRecord(FlatModule(model).save())
        strategy.start(LocalGrid(app, 4), start, num_rounds=40)
        return max(c.metrics[keys.LOSS_BEFORE] for c in strategy.history[-1].clients)

    agnostic = worst(AFL(fraction_evaluate=0.0))
    assert agnostic < 0.8
    assert agnostic < 0.6 * worst(AFL(fraction_evaluate=0.0, step=1e-12))
