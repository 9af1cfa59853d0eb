import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from torch import nn

from fedweight.clients import TrainingApp, TrainingSettings
from fedweight.core.errors import ConfigurationError
from fedweight.core.module import FlatModule
from fedweight.data import ClientData, Examples
from fedweight.messages import keys
from fedweight.messages.arrays import FlatRecord
from fedweight.simulations import LocalGrid, Plan
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


@pytest.mark.parametrize(
    ("clients", "share", "slow"),
    [(10, 0.5, 5), (7, 0.5, 3), (10, 0.04, 0), (3, 0.9, 3)],
)
def test_how_many_straggle(kit, clients, share, slow):
    """All but round(K (1 - share)), and halves are rounded up."""
    run = federation(kit, FedProx(stragglers=share, seed=1), clients=clients)
    run.round()
    assert sum(n < 5 for n in epochs_told(run).values()) == slow


def test_no_stragglers_at_zero(kit):
    run = federation(kit, FedProx(stragglers=0.0), epochs=1)
    assert run.round().count("ok") == 10


@pytest.mark.parametrize("mu", [-1.0, float("nan"), float("inf")])
def test_mu_out_of_range(mu):
    with pytest.raises(ConfigurationError, match="proximal_mu must be in"):
        FedProx(proximal_mu=mu)


def test_it_asks_for_nothing_more_than_fedavg(kit):
    runs = [federation(kit, FedProx(proximal_mu=0.1)), federation(kit, FedAvg())]
    told = []
    for run in runs:
        assert run.round().status == "ok"
        told.append([dict(client.told[-1]) for client in run.clients.values()])
    assert told[0] == [{**one, keys.PROXIMAL_MU: 0.1} for one in told[1]]


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def client_data(context):
    client = int(context.node_config["partition-id"])
    stream = np.random.default_rng(client)
    x = stream.normal(size=(12 + client, 4)).astype(np.float32) + client
    part = Examples(x, stream.integers(0, 3, len(x)))
    return ClientData(part, part)


class Kept(FedProx):
    """Keeps how far the clients went; so it is given each client's model."""

    def aggregate(self, round):
        round.log("length", round.updates.norms())
        return super().aggregate(round)


def trained(strategy, chunk, momentum=0.9, rounds=2):
    settings = TrainingSettings(
        epochs=3, batch_size=4, learning_rate=0.1, momentum=momentum
    )
    app = TrainingApp(network, client_data, num_classes=3, settings=settings)
    start = FlatRecord(FlatModule(network()).save())
    grid = LocalGrid(app, 4, plan=Plan(chunk))
    result = strategy.start(grid, start, num_rounds=rounds)
    return np.concatenate([a.numpy().reshape(-1) for a in result.arrays.values()])


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_mu_of_0_gives_fedavgs_bits(chunk):
    none = trained(FedProx(proximal_mu=0.0, fraction_evaluate=0.0), chunk)
    np.testing.assert_array_equal(none, trained(FedAvg(fraction_evaluate=0.0), chunk))
    some = trained(FedProx(proximal_mu=0.1, fraction_evaluate=0.0), chunk)
    assert (some != none).any()


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_larger_mu_the_nearer_clients_stay_up_to_a_tenth_of_the_bound(
    chunk, momentum
):
    bound = TrainingSettings(learning_rate=0.1, momentum=momentum).diverging_mu
    lengths = []
    for share in (0.0, 0.001, 0.01, 0.1, 0.97):
        strategy = Kept(proximal_mu=share * bound, fraction_evaluate=0.0)
        trained(strategy, chunk, momentum, rounds=1)
        clients = strategy.history[-1].clients
        lengths.append([client.metrics["length"] for client in clients])
    *nearer, tenth, nearly_all = np.array(lengths)
    assert (np.diff([*nearer, tenth], axis=0) < 0).all()
    assert nearly_all.max() > tenth.max()  # Beside the bound a client swings.
