import numpy as np
import pytest
from flwr.app import ConfigRecord

from fedweight import keys
from fedweight.errors import ConfigurationError
from fedweight.strategies.fedavg import FedAvg
from fedweight.strategies.fedprox import FedProx


def federation(kit, strategy, epochs=5, clients=10):
    """Client k's model is k + 1 everywhere."""
    return kit.Federation(
        strategy,
        {k: kit.Client(np.full(2, k + 1.0)) for k in range(clients)},
        kit.record({"w": np.zeros(2, np.float32)}),
        config=ConfigRecord({keys.LOCAL_EPOCHS: epochs}),
    )


def epochs_told(run):
    return {k: c.told[-1][keys.LOCAL_EPOCHS] for k, c in run.clients.items()}


def test_every_client_is_told_mu_in_one_record(kit):
    run = federation(kit, FedProx(proximal_mu=0.1))
    run.round()
    told = [client.told[-1] for client in run.clients.values()]
    assert {record[keys.PROXIMAL_MU] for record in told} == {0.1}
    assert len(run.grid.config_records) == 1


def test_is_fedavg_on_the_server(kit, golden):
    round = kit.make_round(kit.toy["models"], num_examples=kit.toy["num_examples"])
    assert FedProx().aggregate(round).tolist() == golden("fedavg")["model"]


def test_stragglers_count_in_fedprox_and_not_in_fedavg(kit):
    kept = federation(kit, FedProx(stragglers=0.5, seed=3))
    dropped = federation(kit, FedAvg(drop_stragglers=True, stragglers=0.5, seed=3))
    for _ in range(3):
        with_all, without = kept.round(), dropped.round()
        assert epochs_told(kept) == epochs_told(dropped)
        slow = {k for k, n in epochs_told(kept).items() if n < 5}
        assert len(slow) == 5
        assert all(1 <= epochs_told(kept)[k] <= 4 for k in slow)
        assert with_all.count("ok") == 10
        left = {c.client for c in without.clients if c.status == "dropped"}
        assert left == slow
        fast = [k + 1.0 for k in range(10) if k not in slow]
        np.testing.assert_allclose(kept.vector, 5.5, rtol=1e-6)
        np.testing.assert_allclose(dropped.vector, np.mean(fast), rtol=1e-6)


def test_stragglers_differ_from_round_to_round_and_share_records(kit):
    run = federation(kit, FedProx(stragglers=0.5, seed=3))
    run.round()
    first = epochs_told(run)
    assert len(run.grid.config_records) <= 5  # one for each number of epochs
    run.round()
    assert epochs_told(run) != first


def test_fedavg_counts_partial_work_unless_told(kit):
    run = federation(kit, FedAvg(stragglers=0.5))
    assert run.round().count("ok") == 10


@pytest.mark.parametrize("epochs", [1, 0])
def test_one_epoch_leaves_nothing_to_straggle_over(kit, epochs):
    run = federation(kit, FedProx(stragglers=0.5), epochs=epochs)
    with pytest.raises(ConfigurationError, match="local epochs of 2 or more"):
        run.round()


def test_no_stragglers_at_zero(kit):
    run = federation(kit, FedProx(stragglers=0.0), epochs=1)
    assert run.round().count("ok") == 10


@pytest.mark.parametrize("mu", [-1.0, float("nan"), float("inf")])
def test_mu_out_of_range(mu):
    with pytest.raises(ConfigurationError, match="proximal_mu must be in"):
        FedProx(proximal_mu=mu)
