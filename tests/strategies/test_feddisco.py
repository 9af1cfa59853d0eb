import logging

import numpy as np
import pytest
import torch

from fedweight.core.errors import ConfigurationError
from fedweight.core.state import pack, unpack
from fedweight.messages import keys
from fedweight.strategies.feddisco import FedDisco, discrepancy
from fedweight.strategies.weights import effective_clients

METRICS = ["kl", "l2", "l1", "cosine"]


def toy_federation(kit, strategy, **changes):
    clients = {
        k: kit.Client(model, n, profile={keys.LABEL_COUNTS: counts})
        for k, (model, n, counts) in enumerate(
            zip(
                kit.toy["models"],
                kit.toy["num_examples"],
                kit.toy["label_counts"],
                strict=True,
            )
        )
    }
    clients.update(changes.get("clients", {}))
    return kit.Federation(strategy, clients, kit.record({"w": np.zeros(4, np.float32)}))


@pytest.mark.parametrize("metric", METRICS)
def test_golden(kit, golden, metric):
    expected = golden("feddisco")[metric]
    counts = torch.tensor(kit.toy["label_counts"])
    assert discrepancy(counts, metric).tolist() == pytest.approx(
        expected["discrepancy"], abs=1e-7
    )
    run = toy_federation(kit, FedDisco(metric=metric))
    record = run.round()
    assert [c.weight for c in record.clients] == pytest.approx(
        expected["weights"], abs=1e-7
    )
    logged = [c.metrics["discrepancy"] for c in record.clients]
    assert logged == pytest.approx(expected["discrepancy"], abs=1e-7)
    model = np.array(expected["weights"]) @ np.array(kit.toy["models"])
    np.testing.assert_allclose(run.vector, model, atol=1e-6)


def test_kl_before_it_is_divided(kit, golden):
    expected = golden("feddisco")["kl"]
    counts = torch.tensor(kit.toy["label_counts"], dtype=torch.float64)
    own = counts / counts.sum(1, keepdim=True)
    raw = torch.special.xlogy(own, own * 4).sum(1)
    assert raw.tolist() == pytest.approx(expected["raw"], abs=1e-7)
    assert discrepancy(counts).tolist() == pytest.approx((raw / raw.sum()).tolist())


@pytest.mark.parametrize("metric", METRICS)
def test_limits(kit, metric):
    p = np.array(kit.toy["num_examples"]) / 200
    no_cost = toy_federation(kit, FedDisco(metric=metric, a=0, b=0))
    assert [c.weight for c in no_cost.round().clients] == pytest.approx(p)
    same_for_all = toy_federation(kit, FedDisco(metric=metric, a=0.5, b=1e9))
    weights = [c.weight for c in same_for_all.round().clients]
    assert weights == pytest.approx([1 / 3] * 3, abs=1e-6)


def test_nothing_left_is_fedavg_with_a_warning(kit, caplog):
    run = toy_federation(kit, FedDisco(metric="l1", a=100, b=0))
    with caplog.at_level(logging.WARNING, logger="fedweight"):
        record = run.round()
    assert [c.weight for c in record.clients] == [0.5, 0.25, 0.25]
    assert "falling back to data size" in caplog.text


def test_target(kit):
    mix = [10, 20, 30, 40]
    at_target = discrepancy(
        torch.tensor([mix, [1, 1, 1, 1]]),
        "l2",
        FedDisco(metric="l2", target=mix)._target(),
    )
    assert at_target[0] == pytest.approx(0, abs=1e-12)
    assert at_target[1] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "jsd"}, "metric must be one of"),
        ({"a": -1}, "a must be in"),
        ({"b": float("inf")}, "b must be in"),
        ({"target": [0.5, 0.5, 0.0]}, "target must be above 0 everywhere"),
        ({"target": [0.0, 0.0], "metric": "l2"}, "target must be above 0 somewhere"),
        ({"target": [-1.0, 2.0]}, "target must be a list"),
        ({"target": [float("nan"), 2.0]}, "target must be a list"),
        ({"target": []}, "target must be a list"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigurationError, match=message):
        FedDisco(**options)


def test_scale_with_cohort(kit):
    """Three clients: the reference is ten."""
    for metric in METRICS:
        scaled = toy_federation(
            kit, FedDisco(metric=metric, a=0.05, b=0.01, scale_with_cohort=True)
        )
        a = 0.05 if metric == "kl" else 0.05 * 10 / 3
        by_hand = toy_federation(kit, FedDisco(metric=metric, a=a, b=0.01 * 10 / 3))
        assert [c.weight for c in scaled.round().clients] == pytest.approx(
            [c.weight for c in by_hand.round().clients]
        )


def test_each_client_is_asked_once(kit):
    run = toy_federation(kit, FedDisco(), clients={2: kit.Client(silent=True)})
    run.round()
    assert run.clients[0].told[0][keys.REQUEST] == [keys.LABEL_COUNTS]
    run.clients[2] = kit.Client(
        kit.toy["models"][2], 50, profile={keys.LABEL_COUNTS: [0, 0, 25, 25]}
    )
    record = run.round()
    assert keys.REQUEST not in run.clients[0].told[1]
    assert run.clients[2].told[-1][keys.REQUEST] == [keys.LABEL_COUNTS]
    assert record.count("ok") == 3
    run.round()
    assert keys.REQUEST not in run.clients[2].told[-1]


def test_who_asks_in_the_config_is_still_heard(kit):
    run = toy_federation(kit, FedDisco())
    run.config[keys.REQUEST] = [keys.LOSS_BEFORE]
    run.round()
    assert run.clients[0].told[0][keys.REQUEST] == [
        keys.LOSS_BEFORE,
        keys.LABEL_COUNTS,
    ]
    run.round()
    assert run.clients[0].told[1][keys.REQUEST] == [keys.LOSS_BEFORE]


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ([1, 2, 3], "has 3 entries for 4 classes"),
        ([1, 2, 3, -4], "numbers of 0 or more"),
        ([1.0, 2.0, 3.0, float("nan")], "numbers of 0 or more"),
        ("many", "numbers of 0 or more"),
    ],
)
def test_unfit_counts_are_rejected(kit, counts, reason):
    odd = kit.Client(np.ones(4), profile={keys.LABEL_COUNTS: counts})
    run = toy_federation(kit, FedDisco(target=[1, 1, 1, 1]), clients={1: odd})
    record = run.round()
    assert record.status == "ok"
    assert [c.status for c in record.clients] == ["ok", "rejected", "ok"]
    assert reason in record.clients[1].reason


def test_a_client_without_counts_is_rejected(kit):
    run = toy_federation(kit, FedDisco(), clients={1: kit.Client(np.ones(4))})
    record = run.round()
    assert "asked for 'label-counts'" in record.clients[1].reason


@pytest.mark.parametrize("metric", METRICS)
def test_an_empty_client_is_the_most_discrepant(metric):
    d = discrepancy(torch.tensor([[5, 5, 0], [9, 0, 0], [0, 0, 0]]), metric)
    assert d[2] == d[1] > d[0] >= 0
    assert discrepancy(torch.zeros(2, 3), metric).tolist() == [0.0, 0.0]


def test_the_table_goes_on_through_json(kit):
    run = toy_federation(kit, FedDisco())
    before = run.round()
    again = toy_federation(kit, FedDisco())
    again.strategy.restore(unpack(*pack(run.strategy.state)))
    after = again.round()
    assert keys.REQUEST not in again.clients[0].told[0]
    assert [c.weight for c in after.clients] == [c.weight for c in before.clients]


@pytest.mark.parametrize("metric", METRICS)
def test_only_the_divergence_depends_on_who_else_takes_part(metric):
    counts = torch.tensor([[9, 1, 0], [3, 3, 4], [0, 8, 2]])
    all_three, two = discrepancy(counts, metric), discrepancy(counts[:2], metric)
    assert torch.equal(all_three[:2], two) == (metric != "kl")
    assert metric != "kl" or float(all_three.sum()) == pytest.approx(1)


def skewed(k, seed=0):
    """Label counts of k clients, Dirichlet 0.3 on ten classes; sizes 10 to 200."""
    stream = np.random.default_rng(seed)
    sizes = stream.integers(10, 200, k)
    shares = stream.dirichlet(np.full(10, 0.3), k)
    return sizes, [stream.multinomial(n, p) for n, p in zip(sizes, shares, strict=True)]


def weights_of_skewed(kit, k, **options):
    sizes, counts = skewed(k)
    strategy = FedDisco(**options)
    known = {c: own.tolist() for c, own in enumerate(counts)}
    round = kit.make_round(np.zeros((k, 1)), num_examples=sizes.tolist(), state=known)
    return strategy.weights(round)[0]


def test_a_hundred_clients_count_nearly_alike_unless_b_is_scaled(kit):
    drowned = weights_of_skewed(kit, 100)
    assert drowned.max() < 1.3 * drowned.min()
    scaled = weights_of_skewed(kit, 100, scale_with_cohort=True)
    assert effective_clients(drowned) > 99
    assert effective_clients(scaled) < 90


@pytest.mark.parametrize("metric", ["l2", "l1", "cosine"])
def test_the_default_a_is_large_for_other_discrepancies(kit, metric, caplog):
    """Half of ten clients with skewed labels count nothing; all of them is FedAvg."""
    weights = weights_of_skewed(kit, 10, metric=metric)
    sizes = skewed(10)[0]
    if metric == "l1":
        np.testing.assert_allclose(weights, sizes / sizes.sum())
        assert "falling back to data size" in caplog.text
    else:
        assert int((weights == 0).sum()) >= 5
    assert (weights_of_skewed(kit, 10) > 0).all()
