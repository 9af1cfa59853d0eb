import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedweight.core.errors import ConfigurationError
from fedweight.core.rng import Purpose, generator
from fedweight.metrics import collaborative_fairness, shapley
from fedweight.strategies import Draw, FairIncentive, FedAvg, Selection
from fedweight.strategies.fair_incentive import (
    chances,
    contributions,
    hotelling,
    marginal_cosines,
)


def build(**options):
    return FairIncentive(min_train_nodes=1, min_available_nodes=1, **options)


def federation(kit, strategy, models, sizes=None):
    clients = {
        k: kit.Client(np.array(model, float), n)
        for k, (model, n) in enumerate(
            zip(models, sizes or [10.0] * len(models), strict=True)
        )
    }
    size = len(models[0])
    return kit.Federation(strategy, clients, kit.record({"w": np.zeros(size)}))


def moved_round(run, rows):
    """Run a round in which each client's update is a row and some noise; return both.

    Clients that always sent the same model would have no common direction after one.
    """
    rng = np.random.default_rng(run.number)
    updates = rows + 0.3 * rng.normal(size=rows.shape)
    for client, update in enumerate(updates):
        run.clients[client].model = run.vector + update
    return run.round(), updates


def drawn(record):
    return [c.client for c in record.clients]


def cosine(vector, whole):
    length = np.linalg.norm(vector) * np.linalg.norm(whole)
    return vector @ whole / length if length else 0.0


def by_vectors(rows, shares, orders):
    """The definition, of vectors and sets."""
    parts = shares[:, None] * rows
    whole, found = parts.sum(0), []
    for i, order in enumerate(orders):
        others = [j for j in range(len(rows)) if j != i]
        terms = []
        for size in range(len(rows)):
            some = [others[place] for place in order[:size]]
            without = parts[some].sum(0)
            terms.append(cosine(without + parts[i], whole) - cosine(without, whole))
        found.append(np.mean(terms))
    return found


@pytest.mark.parametrize("case", range(2))
def test_golden_chances(golden, case):
    table = golden("fair_incentive")["chances"]
    expected = table["case"][case]
    found = chances(np.array(table["psi"]), expected["beta"])
    np.testing.assert_allclose(found, expected["chances"], atol=1e-8)


@pytest.mark.parametrize("case", range(2))
def test_golden_contributions(kit, golden, case):
    expected = golden("fair_incentive")["contribution"][case]
    rows, n = np.array(kit.toy["models"]), np.array(kit.toy["num_examples"])
    found = marginal_cosines(
        rows @ rows.T, n / n.sum(), lambda k: np.array(expected["order"])
    )
    np.testing.assert_allclose(found, expected["psi"], atol=1e-8)


def test_golden_hotelling(golden):
    expected = golden("fair_incentive")["hotelling"]
    found = hotelling(np.array(expected["rows"]), np.array(expected["mean"]))
    assert found == pytest.approx(expected["p-value"], abs=1e-8)


@given(st.integers(1, 7), st.integers(0, 2**32))
def test_the_gram_matrix_is_enough(k, seed):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(k, 5)) * 10.0 ** rng.integers(-4, 5)
    shares = rng.dirichlet(np.ones(k))
    orders = [rng.permutation(k - 1) for _ in range(k)]
    found = marginal_cosines(rows @ rows.T, shares, orders.__getitem__)
    np.testing.assert_allclose(found, by_vectors(rows, shares, orders), atol=1e-7)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_over_all_orders_it_is_the_shapley_value(k):
    rng = np.random.default_rng(k)
    rows, shares = rng.normal(size=(k, 6)), rng.dirichlet(np.ones(k))
    parts = shares[:, None] * rows
    whole = parts.sum(0)
    orders = [np.array(one, int) for one in itertools.permutations(range(k - 1))]
    found = np.mean(
        [marginal_cosines(rows @ rows.T, shares, lambda _, o=one: o) for one in orders],
        axis=0,
    )
    exact = shapley(range(k), lambda some: cosine(parts[sorted(some)].sum(0), whole))
    np.testing.assert_allclose(found, [*exact.values.values()], atol=1e-12)
    assert found.sum() == pytest.approx(1)


def test_sums_that_cancel_have_no_direction():
    def orders(k):
        return np.arange(2)

    rows = np.array([[0.1, 0.7], [-0.1, -0.7], [0.3, 0.0]])
    found = marginal_cosines(rows @ rows.T, np.full(3, 1 / 3), orders)
    assert np.isfinite(found).all()
    assert (np.abs(found) <= 2).all()
    for nothing in (np.zeros((3, 3)), np.array([[1.0, -1, 0], [-1, 1, 0], [0, 0, 0]])):
        assert not marginal_cosines(nothing, np.full(3, 1 / 3), orders).any()


samples = st.integers(2, 12).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(1, n - 1), st.integers(0, 2**32))
)


@given(samples)
def test_hotelling_is_its_definition(drawn):
    n, d, seed = drawn
    rng = np.random.default_rng(seed)
    rows, mean = rng.normal(size=(n, d)), rng.normal(size=d) / 2
    away = rows.mean(0) - mean
    squared = n * away @ np.linalg.solve(np.atleast_2d(np.cov(rows.T)), away)
    expected = stats.f.sf(squared * (n - d) / (d * (n - 1)), d, n - d)
    assert hotelling(rows, mean) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    if d == 1:
        t_test = stats.ttest_1samp(rows[:, 0], mean[0]).pvalue
        assert hotelling(rows, mean) == pytest.approx(t_test, rel=1e-6, abs=1e-9)


def test_hotelling_where_rows_do_not_vary_in_all_directions():
    rows = np.random.default_rng(0).normal(size=(15, 1))
    one = hotelling(rows, np.array([0.3]))
    both = np.hstack([rows, 1 - rows])  # Of two clients contributions sum to one.
    assert hotelling(both, np.array([0.3, 0.7])) == pytest.approx(one)
    assert hotelling(both, np.array([0.3, 0.8])) == 0
    alike = np.full((15, 3), 0.2)
    assert hotelling(alike, alike[0]) == 1
    assert hotelling(alike, alike[0] + 0.1) == 0


def test_without_a_difference_p_values_are_uniform():
    rng = np.random.default_rng(5)
    found = [hotelling(rng.normal(size=(15, 10)), np.zeros(10)) for _ in range(2000)]
    assert stats.kstest(found, "uniform").pvalue > 0.01


NOISY = np.random.default_rng(1).normal(size=(10, 8)) + np.arange(10)[:, None] / 3


def test_all_explore_and_then_some_are_drawn(kit):
    strategy = build(explore_at_most=3, beta=0.0)
    run = federation(kit, strategy, NOISY)
    for number in range(1, 4):
        record = run.round()
        assert drawn(record) == [*range(10)]
        assert record.metrics["exploring"] == 1
        assert strategy.state["method"]["rounds"] == number
    assert not strategy.state["method"]["exploring"]
    before = contributions(strategy.state["method"])
    for _ in range(5):
        record = run.round()
        assert len(drawn(record)) == 4
        assert record.metrics["exploring"] == 0
        logged = {c.client: c.metrics["contribution"] for c in record.clients}
        assert logged == {c: before[c] for c in drawn(record)}
        assert sum(c.weight for c in record.clients) == pytest.approx(1)
    syncs = strategy.state["method"]["syncs"]
    assert sum(syncs.values()) == 3 * 10 + 5 * 4


def test_contributions_are_the_mean_over_rounds(kit):
    """Also when rounds have left the window; and each round as its stream says."""
    strategy = build(window=3, tested=2, settled=0.999, seed=4)
    run = federation(kit, strategy, NOISY[:4], [10.0, 20.0, 30.0, 40.0])
    found = []
    for number in range(1, 7):
        _, rows = moved_round(run, NOISY[:4])
        streams = [generator(4, Purpose.CONTRIBUTION, number, k) for k in range(4)]
        orders = [stream.permutation(3) for stream in streams]
        shares = np.array([0.1, 0.2, 0.3, 0.4])
        found.append(by_vectors(rows, shares, orders))
        known = contributions(strategy.state["method"])
        expected = np.mean(found, axis=0)
        np.testing.assert_allclose([known[k] for k in range(4)], expected, atol=1e-6)
        assert len(strategy.state["method"]["recent"]) == min(number, 3)


def test_exploring_ends_by_the_test(kit):
    run = federation(kit, build(window=4, tested=3, settled=1e-6), NOISY)
    for _ in range(4):
        assert "p-value" not in moved_round(run, NOISY)[0].metrics
    record, _ = moved_round(run, NOISY)
    assert record.metrics["exploring"] == 1
    assert record.metrics["p-value"] > 1e-6
    assert moved_round(run, NOISY)[0].metrics["exploring"] == 0


def test_exploring_goes_on_while_contributions_move(kit):
    strategy = build(window=4, tested=3, settled=0.7)
    run = federation(kit, strategy, NOISY)
    # After every fourth round clients change places: no window is as all before it.
    for number in range(12):
        shift = number // 4
        record, _ = moved_round(run, np.roll(NOISY, shift, axis=0))
        assert strategy.state["method"]["exploring"]
    assert record.metrics["p-value"] < 0.7


def exploiting(strategy, psi):
    before = {client: [value, 1] for client, value in enumerate(psi)}
    state = {**strategy.begin(), "exploring": False, "before": before}
    strategy.restore({**strategy.state, "method": state})
    return strategy


def test_clients_are_drawn_in_proportion(kit, golden):
    """One in a round: their numbers of rounds are as the chances say."""
    table = golden("fair_incentive")["chances"]
    strategy = exploiting(build(beta=30.0, fraction_train=0.34), table["psi"])
    run = federation(kit, strategy, NOISY[:3])
    rounds = 1500
    seen = np.bincount([drawn(run.round())[0] for _ in range(rounds)], minlength=3)
    expected = rounds * np.array(table["case"][0]["chances"])
    assert stats.chisquare(seen, expected * rounds / expected.sum()).pvalue > 0.01
    syncs = strategy.state["method"]["syncs"]
    assert collaborative_fairness(table["psi"], [syncs[k] for k in range(3)]) > 0.9


def test_no_contribution_is_too_small_to_be_drawn(kit):
    strategy = exploiting(build(beta=1e6), [0.0, 0.5, 1.0, -1.0])
    run = federation(kit, strategy, NOISY[:4])
    assert drawn(run.round()) == [2]
    assert strategy.draw(Selection(1, (0, 1, 2, 3), strategy.begin())) == Draw(1.0)


def test_who_was_not_explored_is_drawn_as_the_mean():
    strategy = build(beta=2.0)
    state = {**strategy.begin(), "exploring": False}
    state["before"] = {3: [0.1, 1], 5: [0.6, 2]}
    fraction, found = strategy.draw(Selection(9, (3, 4, 5), state))
    assert fraction == 0.4
    np.testing.assert_allclose(found, chances(np.array([0.1, 0.2, 0.3]), 2.0))
    nobody = strategy.draw(Selection(9, (3, 4), {**state, "before": {}}))
    assert nobody.chances.tolist() == [0.5, 0.5]


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=9), st.floats(0, 1e9))
def test_chances_are_a_distribution_in_the_order_of_the_contributions(psi, beta):
    found = chances(np.array(psi), beta)
    assert (found > 0).all()
    assert found.sum() == pytest.approx(1)
    assert (np.diff(found[np.argsort(psi)]) >= -1e-15).all()
    np.testing.assert_allclose(chances(np.array(psi), 0.0), 1 / len(psi))


def test_clients_may_stay_away_while_exploring(kit):
    strategy = build(window=4, tested=3, settled=1e-6)
    run = federation(kit, strategy, NOISY)
    run.clients[0].silent = True
    for _ in range(2):
        moved_round(run, NOISY)
    run.clients[0].silent = False
    for _ in range(3):
        record, _ = moved_round(run, NOISY)
    # One is tested who was there in the last four rounds; the new one is not.
    assert record.metrics["p-value"] > 0
    known = strategy.state["method"]["before"]
    assert known[0][1] == 3
    assert known[1][1] == 5


def test_a_failed_round_leaves_all_as_it_was(kit):
    strategy = build(min_replies=4)
    run = federation(kit, strategy, NOISY[:4])
    run.round()
    before = strategy.state["method"]
    run.clients[2].error = "no power"
    assert run.round().status == "failed"
    assert strategy.state["method"] == before


def test_goes_on_from_its_state(kit):
    options = {"explore_at_most": 2, "beta": 3.0, "seed": 7}
    one, other = build(**options), build(**options)
    run, again = (federation(kit, s, NOISY) for s in (one, other))
    for _ in range(4):
        run.round()
    again.number, again.arrays = run.number, run.arrays
    other.restore(one.state)
    for _ in range(3):
        assert drawn(run.round()) == drawn(again.round())
    np.testing.assert_array_equal(run.vector, again.vector)
    assert one.state == other.state


def test_updates_without_products_fail_the_round(kit):
    strategy = build()
    run = federation(kit, strategy, [[1e200, 0.0], [1.0, 0.0]])
    record = run.round()
    assert record.status == "failed"
    assert "max_update_norm rejects" in record.reason
    assert strategy.state["method"] == strategy.begin()


def test_too_many_to_compare_are_refused():
    strategy = build()
    several = Selection(1, tuple(range(2001)), strategy.begin())
    with pytest.raises(ConfigurationError, match="at most 2000 clients"):
        strategy.draw(several)
    assert strategy.draw(several._replace(clients=(0,))) == Draw(1.0)


def test_while_exploring_it_is_fedavg(kit):
    strategies = build(), FedAvg(min_train_nodes=1, min_available_nodes=1)
    ours, plain = (federation(kit, s, NOISY) for s in strategies)
    for _ in range(3):
        ours.round()
        plain.round()
    np.testing.assert_array_equal(ours.vector, plain.vector)


@settings(max_examples=20)
@given(st.integers(1, 40))
def test_one_update_for_all_is_shared_alike(k):
    found = marginal_cosines(
        np.ones((k, k)), np.full(k, 1 / k), lambda _: np.arange(k - 1)
    )
    np.testing.assert_allclose(found, 1 / k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "beta must be"),
        ({"beta": math.inf}, "beta must be"),
        ({"settled": 1.0}, "settled must be"),
        ({"window": 1}, "window must be"),
        ({"tested": 0}, "tested must be"),
        ({"explore_at_most": 0}, "explore_at_most must be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigurationError, match=message):
        FairIncentive(**options)
