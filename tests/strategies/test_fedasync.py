import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedweight.core.errors import ConfigurationError
from fedweight.strategies import FedAsync


def build(**options):
    return FedAsync(min_train_nodes=1, min_available_nodes=1, **options)


def federation(kit, strategy, models, start, rounds, **options):
    """Client k sends the k-th model."""
    return kit.Scheduled(
        strategy,
        {k: kit.Client(model) for k, model in enumerate(models)},
        kit.record({"w": np.array(start, np.float64)}),
        schedule=kit.Script(rounds, **options),
    )


def test_golden(kit, golden):
    table = golden("fedasync")
    models = [model for row in table["round"] for model in row["models"]]
    rounds = [[(k, row["began"][0])] for k, row in enumerate(table["round"])]
    strategy = build(mixing=table["mixing"])
    run = federation(kit, strategy, models, table["start"], rounds)
    for number, row in enumerate(table["round"], 1):
        [client] = run.round().clients
        tau = number - row["began"][0]
        assert client.metrics["staleness"] == tau
        assert client.weight == pytest.approx(0.5 * (1 + tau) ** -0.5, rel=1e-15)
        assert run.vector.tolist() == row["model"]


@given(k=st.integers(1, 4), mixing=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_models_are_mixed_in_one_after_another(kit, k, mixing, seed):
    """It mixes the models, not their differences from where they began."""
    rng = np.random.default_rng(seed)
    rounds, number = [], 0
    for r in range(1, 5):
        rounds.append([(number + i, int(rng.integers(1, r + 1))) for i in range(k)])
        number += k
    models = rng.normal(size=(number, 3))
    run = federation(kit, build(mixing=mixing), models, [0.5, -1.0, 2.0], rounds)
    expected = run.vector
    for r, row in enumerate(rounds, 1):
        run.round()
        for client, began in row:
            share = mixing * (1 + r - began) ** -0.5
            expected = (1 - share) * expected + share * models[client]
        np.testing.assert_allclose(run.vector, expected, rtol=0, atol=1e-13)


def test_mixing_of_1_replaces_the_model_by_a_fresh_one(kit):
    rounds = [[(0, 1)], [(1, 2)]]
    run = federation(kit, build(mixing=1.0), [[3.0], [5.0]], [0.0], rounds)
    for model in (3.0, 5.0):
        run.round()
        assert run.vector.tolist() == [model]


def test_synchronously_the_last_client_counts_most(kit):
    clients = {k: kit.Client([float(k)]) for k in range(3)}
    run = kit.Federation(build(mixing=0.5), clients, kit.record({"w": np.zeros(1)}))
    assert [c.weight for c in run.round().clients] == [0.125, 0.25, 0.5]
    assert run.vector.tolist() == [1.25]


def test_what_it_does_not_take():
    for mixing in (0.0, 1.1, -1.0):
        with pytest.raises(ConfigurationError, match="mixing must be"):
            FedAsync(mixing=mixing)
    with pytest.raises(ConfigurationError, match=r"max_share is 0\.5, but FedAsync"):
        FedAsync(max_share=0.5)
