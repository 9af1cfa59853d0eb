import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from hypothesis import given
from hypothesis import strategies as st

from fedweight import run as run_simulation
from fedweight.clients import TrainingSettings
from fedweight.clients.optimizers import SGD
from fedweight.clients.rate_schedules import Exponential
from fedweight.core.errors import ConfigurationError
from fedweight.messages import keys
from fedweight.strategies.fednova import FedNova, gradients_in, normaliser

work = st.lists(st.floats(0.1, 100), min_size=1, max_size=6)


def toy(kit, strategy, normalisers, steps=None):
    steps = steps or normalisers
    clients = {
        k: kit.Client(model, n, {keys.NORMALISER: a, keys.NUM_STEPS: tau})
        for k, (model, n, a, tau) in enumerate(
            zip(
                *(kit.toy["models"], kit.toy["num_examples"], normalisers, steps),
                strict=True,
            )
        )
    }
    return kit.Federation(strategy, clients, kit.record({"w": np.zeros(4)}))


def weights_of(kit, normalisers, sizes, steps=None, **options):
    metrics = {keys.NORMALISER: normalisers, keys.NUM_STEPS: steps or normalisers}
    given = kit.make_round(np.eye(len(sizes)), None, sizes, metrics)
    return FedNova(**options).weights(given).numpy()


def trained(settings, steps, mu=0.0):
    """What a client's probe sees of its training."""
    return SimpleNamespace(
        settings=settings,
        num_steps=steps,
        learning_rate=settings.learning_rate,
        told=ConfigRecord({keys.PROXIMAL_MU: mu}),
    )


def test_golden(kit, golden):
    expected = golden("fednova")
    settings = TrainingSettings()
    normalisers = [normaliser(trained(settings, n)) for n in expected["steps"]]
    assert normalisers == expected["steps"]
    run = toy(kit, FedNova(), normalisers)
    record = run.round()
    assert [c.weight for c in record.clients] == pytest.approx(expected["weights"])
    np.testing.assert_allclose(run.vector, expected["model"])
    assert record.metrics["effective-steps"] == expected["effective_steps"]


def test_golden_of_momentum(golden):
    expected = golden("fednova")
    settings = TrainingSettings(momentum=expected["momentum"])
    found = [normaliser(trained(settings, n)) for n in expected["steps"]]
    assert found == pytest.approx(expected["normalisers_with_momentum"])


@given(
    steps=st.integers(1, 30),
    momentum=st.floats(0, 0.95),
    mu=st.floats(0, 5),
)
def test_it_is_what_pytorchs_sgd_makes_of_a_gradient_of_1(steps, momentum, mu):
    settings = TrainingSettings(learning_rate=0.1, momentum=momentum)
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1, momentum=momentum)
    for _ in range(steps):
        optimizer.zero_grad()
        (x + mu / 2 * x**2).sum().backward()
        optimizer.step()
    found = normaliser(trained(settings, steps, mu))
    assert found == pytest.approx(-float(x.detach()) / 0.1)
    assert found > 0


@pytest.mark.parametrize(
    "more", [{"nesterov": True}, {"dampening": 0.3}, {"nesterov": False}]
)
@pytest.mark.parametrize("mu", [0.0, 2.0])
def test_it_knows_all_of_sgd_and_a_rate_that_falls_with_the_steps(more, mu):
    schedule = Exponential(schedule_over="steps", schedule_factor=0.8)
    settings = TrainingSettings(
        learning_rate=0.1,
        optimizer=SGD(momentum=0.7, **more),
        learning_rate_schedule=schedule,
    )
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1, momentum=0.7, **more)
    falls = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    for _ in range(9):
        optimizer.zero_grad()
        (x + mu / 2 * x**2).sum().backward()
        optimizer.step()
        falls.step()
    found = normaliser(trained(settings, 9, mu))
    assert found == pytest.approx(-float(x.detach()) / 0.1)


@given(steps=st.integers(1, 50), share=st.floats(0, 0.99))
def test_its_parts_are_the_papers_formulas(steps, share):
    rho = [(1 - share ** (steps - j)) / (1 - share) for j in range(steps)]
    assert gradients_in(steps, momentum=share) == pytest.approx(sum(rho))
    powers = [(1 - share) ** (steps - 1 - j) for j in range(steps)]
    assert gradients_in(steps, pull=share) == pytest.approx(sum(powers))


def test_adam_counts_its_steps():
    settings = TrainingSettings(optimizer="adam", momentum=0.9)
    assert normaliser(trained(settings, 7, 0.5)) == 7.0


@given(
    a=st.floats(0.1, 100), sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6)
)
def test_the_same_work_for_all_is_fedavg(kit, a, sizes):
    weights = weights_of(kit, [a] * len(sizes), sizes)
    np.testing.assert_allclose(weights, np.array(sizes) / sum(sizes))


@given(a=work, data=st.data())
def test_without_a_term_the_weights_sum_to_one_or_more(kit, a, data):
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=len(a), max_size=len(a)))
    weights = weights_of(kit, a, sizes)
    assert (weights > 0).all()
    assert weights.sum() >= 1 - 1e-9
    p = np.array(sizes) / sum(sizes)
    # What one gradient of a client is worth is its share of the data.
    np.testing.assert_allclose(weights * a, p * (p @ a))


def test_with_a_term_the_steps_say_how_long_the_step_is(kit):
    run = toy(kit, FedNova(proximal_mu=0.1), [1.5, 2.0, 1.0], [2, 4, 1])
    record = run.round()
    p = np.array([0.5, 0.25, 0.25])
    expected = (p @ [2, 4, 1]) * p / [1.5, 2.0, 1.0]
    np.testing.assert_allclose([c.weight for c in record.clients], expected)
    assert {c.told[0][keys.PROXIMAL_MU] for c in run.clients.values()} == {0.1}


def test_it_finds_the_minimum_of_the_mean_and_fedavg_does_not(kit):
    """Clients of ``(w - c_k)^2 / 2`` that make 1, 5 and 20 small steps of it."""
    centres, steps, rate = np.array([-3.0, 0.0, 9.0]), [1, 5, 20], 0.002
    ends = {}
    for name, normalisers in {"fednova": steps, "fedavg": [1, 1, 1]}.items():
        w = np.zeros(1)
        for _ in range(600):
            shares = 1 - (1 - rate) ** np.array(steps)
            updates = (centres - w) * shares
            weights = weights_of(kit, [float(a) for a in normalisers], [1, 1, 1])
            w = w + weights @ updates
        ends[name] = float(w[0])
    assert ends["fednova"] == pytest.approx(2.0, abs=0.1)
    assert ends["fedavg"] > 5


@pytest.mark.parametrize("a", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", [keys.NORMALISER, keys.NUM_STEPS])
def test_work_that_is_none_rejects_the_reply(kit, a, name):
    run = toy(kit, FedNova(proximal_mu=0.1), [1.0, 2.0, 3.0])
    run.clients[1].metrics[name] = a
    record = run.round()
    unfit = "dropped" if (name, a) == (keys.NUM_STEPS, 0) else "rejected"
    assert [c.status for c in record.clients] == ["ok", unfit, "ok"]
    assert record.status == "ok"


def test_bad_options():
    with pytest.raises(ConfigurationError, match="proximal_mu must be"):
        FedNova(proximal_mu=-1.0)


@pytest.mark.parametrize("mu", [0.0, 0.05])
def test_a_run_with_stragglers(tmp_path, mu):
    """Their work is stretched: one gradient of each is worth its data."""
    settings = {
        "run.rounds": 4,
        "partition.clients": 6,
        "training.epochs": 4,
        "training.momentum": 0.5,
        "strategy.name": "fednova",
        "strategy.stragglers": 0.5,
        "strategy.proximal-mu": mu,
        "objective.name": "proximal",
    }
    made = run_simulation(settings=settings, out=tmp_path / "run", report=False)
    assert made.summary()["failed_rounds"] == 0
    clients = made.clients[made.clients["status"] == "ok"]
    worth = clients["weight"] * clients["normaliser"] / clients["examples"]
    for _, values in worth.groupby(clients["round"]):
        np.testing.assert_allclose(values, values.iloc[0])
    rate = 0.1
    for steps, a in zip(clients["steps"], clients["normaliser"], strict=True):
        assert a == pytest.approx(gradients_in(int(steps), 0.5, rate * mu))
    assert made.rounds["test_loss"].iloc[-1] < made.rounds["test_loss"].iloc[0]


OWN_TERM = """
import torch
from fedweight.clients.objectives import Plain


class Anchored(Plain):
    def penalty_gradient(self, parameters, facts):
        return 0.1 * (parameters - facts.received)
"""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"objective.name": "proximal", "objective.mu": 0.5},
            "FedNova tells clients strategy.proximal-mu = 0, which takes the place of "
            "objective.mu = 0.5",
        ),
        (
            {"objective.name": "anchored:Anchored"},
            "it does not know what the penalty_gradient of Anchored makes",
        ),
        ({"objective.name": "proximal", "objective.mu": 0.0}, ""),
        ({"strategy.name": "fedavg", "objective.name": "anchored:Anchored"}, ""),
    ],
)
def test_terms_that_the_normaliser_does_not_know_are_told(
    tmp_path, monkeypatch, caplog, settings, said
):
    (tmp_path / "anchored.py").write_text(OWN_TERM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = {"run.rounds": 1, "partition.clients": 3, "strategy.name": "fednova"}
    made = run_simulation(settings=given | settings, out=tmp_path / "r", report=False)
    assert made.summary()["failed_rounds"] == 0
    told = [r.getMessage() for r in caplog.records if r.name == "fedweight"]
    assert [said in line for line in told] == [True] * bool(said)
