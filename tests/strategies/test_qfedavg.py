import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedweight import run as run_simulation
from fedweight.clients import TrainingSettings
from fedweight.core.errors import ConfigurationError
from fedweight.messages import keys
from fedweight.strategies.qfedavg import QFedAvg

CASES = range(3)


def toy(kit, strategy, losses):
    clients = {
        k: kit.Client(model, n, {keys.LOSS_BEFORE: loss})
        for k, (model, n, loss) in enumerate(
            zip(kit.toy["models"], kit.toy["num_examples"], losses, strict=True)
        )
    }
    return kit.Federation(strategy, clients, kit.record({"w": np.zeros(4)}))


def weights_of(kit, models, losses, **options):
    given = kit.make_round(models, metrics={keys.LOSS_BEFORE: losses})
    return QFedAvg(**options).weights(given).numpy()


@pytest.mark.parametrize("case", CASES)
def test_golden(kit, golden, case):
    table = golden("qfedavg")
    expected = table["case"][case]
    rate = table["local_learning_rate"]
    for told in ({"local_learning_rate": rate}, {"lipschitz": 1 / rate}):
        run = toy(kit, QFedAvg(q=expected["q"], **told), table["losses"])
        record = run.round()
        np.testing.assert_allclose(run.vector, expected["model"], atol=1e-8)
        if "h" in expected:
            h = np.array(expected["h"])
            losses = np.array(table["losses"])
            weights = losses ** expected["q"] / (h.sum() * rate)
            found = [c.weight for c in record.clients]
            assert found == pytest.approx(weights, rel=1e-8)
        assert record.metrics["step-length"] == pytest.approx(
            sum(c.weight for c in record.clients)
        )


models = st.lists(
    st.lists(st.floats(-10, 10), min_size=3, max_size=3), min_size=1, max_size=5
)


@given(models=models, data=st.data())
def test_with_q_0_it_is_the_plain_mean(kit, models, data):
    k = len(models)
    losses = data.draw(st.lists(st.floats(0, 1e30), min_size=k, max_size=k))
    weights = weights_of(kit, models, losses, q=0.0)
    np.testing.assert_allclose(weights, 1 / k, rtol=1e-12)


@given(models=models, q=st.floats(0, 5), data=st.data())
def test_weights_are_the_papers_and_sum_to_one_at_most(kit, models, q, data):
    k = len(models)
    losses = data.draw(st.lists(st.floats(1e-2, 1e2), min_size=k, max_size=k))
    lipschitz = data.draw(st.floats(0.1, 100))
    weights = weights_of(kit, models, losses, q=q, lipschitz=lipschitz)
    f, g = np.array(losses) + 1e-10, -lipschitz * np.array(models)
    h = q * f ** (q - 1) * (g**2).sum(1) + lipschitz * f**q
    step = (f**q) @ g / h.sum()
    np.testing.assert_allclose(weights @ np.array(models), -step, rtol=1e-6, atol=1e-12)
    assert (weights >= 0).all()
    assert weights.sum() <= 1 + 1e-9


@given(q=st.floats(0.1, 5), losses=st.lists(st.floats(0.1, 10), min_size=2, max_size=5))
def test_the_higher_the_loss_the_higher_the_weight(kit, q, losses):
    weights = weights_of(kit, np.eye(len(losses)), losses, q=q)
    assert (np.diff(weights[np.argsort(losses)]) >= 0).all()


def test_a_larger_q_gives_the_worst_more_and_shortens_the_step(kit):
    shares, lengths = [], []
    for q in (0.0, 0.5, 1.0, 5.0, 50.0):
        weights = weights_of(kit, np.eye(3), [2.0, 1.0, 0.5], q=q)
        shares.append(weights[0] / weights.sum())
        lengths.append(weights.sum())
    assert (np.diff(shares) > 0).all()
    assert (np.diff(lengths) < 0).all()
    assert shares[-1] == pytest.approx(1)


def test_a_smaller_lipschitz_lengthens_the_step(kit):
    lengths = [
        weights_of(kit, np.eye(3), [2.0, 1.0, 0.5], lipschitz=lipschitz).sum()
        for lipschitz in (1e-9, 0.1, 1.0, 10.0)
    ]
    assert (np.diff(lengths) < 0).all()
    assert lengths[0] == pytest.approx(1)


@pytest.mark.parametrize("q", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("loss", [0.0, 1e300])
def test_no_loss_leaves_the_range_of_numbers(kit, q, loss):
    weights = weights_of(kit, np.eye(3), [loss, 1.0, 0.5], q=q)
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()
    assert weights.any()


def test_the_default_is_that_of_the_clients():
    assert QFedAvg().local_learning_rate == TrainingSettings().learning_rate


@pytest.mark.parametrize("loss", [-0.1, math.nan])
def test_a_loss_that_is_none_rejects_the_reply(kit, loss):
    record = toy(kit, QFedAvg(), [1.0, loss, 1.0]).round()
    assert [c.status for c in record.clients] == ["ok", "rejected", "ok"]
    assert "'loss-before'" in record.clients[1].reason


@pytest.mark.parametrize(
    "options", [{"q": -1.0}, {"lipschitz": 0.0}, {"local_learning_rate": 0.0}]
)
def test_bad_options(options):
    [name] = options
    with pytest.raises(ConfigurationError, match=f"{name} must be"):
        QFedAvg(**options)


def test_a_run_tells_the_clients_learning_rate(tmp_path):
    """With L as by hand, the run has the same bits."""

    def play(name, **strategy):
        settings = {
            "run.rounds": 3,
            "partition.clients": 5,
            "training.learning-rate": 0.05,
            "strategy.name": "qfedavg",
            "strategy.q": 0.5,
            **{f"strategy.{key}": value for key, value in strategy.items()},
        }
        made = run_simulation(settings=settings, out=tmp_path / name, report=False)
        assert made.summary()["failed_rounds"] == 0
        return made

    told, by_hand = play("told"), play("by-hand", lipschitz=20.0)
    other = play("other", lipschitz=10.0)
    weights = [made.weights.to_numpy() for made in (told, by_hand, other)]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert (weights[2] > weights[1]).all()
    assert told.rounds["test_loss"].iloc[-1] < told.rounds["test_loss"].iloc[0]
