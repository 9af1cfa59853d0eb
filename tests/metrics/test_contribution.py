import itertools
import logging
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedweight.core.errors import ConfigurationError
from fedweight.metrics import (
    collaborative_fairness,
    contribution_cost,
    leave_one_out,
    shapley,
)

worths = st.floats(-100, 100)


@st.composite
def games(draw, least=1, most=5):
    """Draw client numbers, and a worth of every set of them."""
    clients = draw(st.sets(st.integers(0, 99), min_size=least, max_size=most))
    sets = [
        frozenset(some)
        for size in range(len(clients) + 1)
        for some in itertools.combinations(sorted(clients), size)
    ]
    several = draw(st.lists(worths, min_size=len(sets), max_size=len(sets)))
    return sorted(clients), dict(zip(sets, several, strict=True))


def by_all_orders(clients, worth):
    """The definition, order by order."""
    total = dict.fromkeys(clients, 0.0)
    orders = [*itertools.permutations(clients)]
    for order in orders:
        for place, client in enumerate(order):
            before = worth[frozenset(order[:place])]
            total[client] += worth[frozenset(order[: place + 1])] - before
    return {client: value / len(orders) for client, value in total.items()}


def close(one, other, abs=1e-9):
    return one == pytest.approx(other, rel=1e-9, abs=abs)


@given(games())
def test_exact_values_are_the_mean_over_all_orders(game):
    clients, worth = game
    found = shapley(clients, worth.__getitem__)
    assert close(found.values, by_all_orders(clients, worth))
    assert found.errors == dict.fromkeys(clients, 0.0)
    assert found.evaluations == len(worth) == contribution_cost(len(clients))


@given(games())
def test_all_is_given_away(game):
    clients, worth = game
    gained = worth[frozenset(clients)] - worth[frozenset()]
    several = [shapley(clients, worth.__getitem__)]
    several.append(shapley(clients, worth.__getitem__, permutations=2))
    for found in several:
        assert math.fsum(found.values.values()) == pytest.approx(gained, abs=1e-9)


@given(games(least=2))
def test_clients_that_add_the_same_have_the_same(game):
    clients, worth = game
    one, other = clients[:2]

    def value(some):
        return worth[some - {other} | {one}] if other in some else worth[some]

    def of_either(some):
        # How many of the two there are counts, and not which.
        rest = some - {one, other}
        return value(rest) + len(some & {one, other}) * worth[rest | {one}]

    found = shapley(clients, of_either).values
    assert found[one] == pytest.approx(found[other], rel=1e-9, abs=1e-6)


@given(games(least=2), st.integers(1, 4))
def test_who_never_adds_anything_has_nothing(game, permutations):
    clients, worth = game
    nobody = clients[0]

    def value(some):
        return worth[some - {nobody}]

    assert shapley(clients, value).values[nobody] == 0
    assert shapley(clients, value, permutations=permutations).values[nobody] == 0
    assert leave_one_out(clients, value).values[nobody] == 0


@given(games(), st.integers(1, 5), st.lists(worths, min_size=32, max_size=32))
def test_of_a_sum_it_is_the_sum(game, permutations, others):
    clients, first = game
    second = dict(zip(first, others, strict=False))
    for told in ({}, {"permutations": permutations}):
        parts = [
            shapley(clients, v.__getitem__, **told).values for v in (first, second)
        ]
        both = shapley(clients, lambda some: first[some] + second[some], **told).values
        assert close(both, {c: parts[0][c] + parts[1][c] for c in clients})


def airport(some):
    """What a runway costs that is long enough for each: Shapley values are known."""
    return float(max((c + 1 for c in some), default=0))


def airport_values(n):
    parts = np.cumsum([1 / (n - k) for k in range(n)])
    return dict(enumerate(parts.tolist()))


def test_a_known_game_exactly_and_by_sampling():
    """S. Littlechild, G. Owen 1973: each section is shared by those who need it."""
    assert close(shapley(range(8), airport).values, airport_values(8))
    found = shapley(range(12), airport, permutations=300, seed=1)
    expected = airport_values(12)
    z = [(found.values[c] - expected[c]) / found.errors[c] for c in range(12)]
    # Chosen before: of 12 normal numbers one beyond 4 is one case in 1,300.
    assert max(map(abs, z)) < 4
    assert found.evaluations <= contribution_cost(12, permutations=300)


def test_the_standard_error_is_that_of_the_mean():
    """Over many seeds results scatter as much as the errors say, about the truth."""
    several = [shapley(range(7), airport, permutations=20, seed=s) for s in range(300)]
    expected = airport_values(7)
    for client in range(7):
        values = np.array([one.values[client] for one in several])
        errors = np.array([one.errors[client] for one in several])
        scatter = values.std(ddof=1)
        assert np.sqrt((errors**2).mean()) == pytest.approx(scatter, rel=0.15)
        assert abs(values.mean() - expected[client]) < 4 * scatter / np.sqrt(300)


def test_the_same_seed_gives_the_same_and_more_begin_alike():
    asked = []

    def value(some):
        asked.append(some)
        return airport(some)

    first = shapley([3, 1, 2, 0, *range(4, 12)], value, permutations=5, seed=3)
    before = list(asked)
    assert shapley(range(12), airport, permutations=5, seed=3) == first
    assert shapley(range(12), airport, permutations=5, seed=4) != first
    asked.clear()
    shapley(range(12), value, permutations=6, seed=3)
    assert asked[: len(before)] == before
    assert len(set(before)) == len(before) == first.evaluations


def test_truncation_saves_evaluations_and_costs_at_most_the_tolerance():
    def value(some):
        return 1 - 0.5 ** len(some)

    whole = shapley(range(20), value, permutations=50)
    short = shapley(range(20), value, permutations=50, tolerance=0.01)
    assert whole.evaluations <= contribution_cost(20, permutations=50)
    # After seven clients less than a hundredth is missing.
    assert short.evaluations <= 2 + 50 * 7 < whole.evaluations
    lost = value(range(20)) - math.fsum(short.values.values())
    assert 0 < lost < 0.01


def test_sampling_is_not_done_where_all_sets_cost_no_more():
    found = shapley(range(4), airport, permutations=5)
    assert found.evaluations == 16 == contribution_cost(4, permutations=5)
    assert set(found.errors.values()) == {0.0}
    fewer = shapley(range(4), airport, permutations=4)
    assert fewer.evaluations <= 14 == contribution_cost(4, permutations=4)
    assert max(fewer.errors.values()) > 0


def test_one_permutation_says_nothing_of_its_error():
    found = shapley(range(12), airport, permutations=1)
    assert all(map(math.isnan, found.errors.values()))
    assert found.evaluations == 13 == contribution_cost(12, permutations=1)


@given(games())
def test_leave_one_out(game):
    clients, worth = game
    asked = []
    found = leave_one_out(reversed(clients), lambda s: asked.append(s) or worth[s])
    everybody = frozenset(clients)
    expected = {c: worth[everybody] - worth[everybody - {c}] for c in clients}
    assert found.values == expected
    cost = contribution_cost(len(clients), "leave-one-out")
    assert len(asked) == found.evaluations == cost


def test_the_cost_is_told_first(caplog):
    def value(some):
        assert "16 sets" in caplog.text
        return 0.0

    with caplog.at_level(logging.INFO, "fedweight"):
        shapley(range(4), value)


pairs = st.lists(st.tuples(worths, worths), min_size=2, max_size=30)


@given(pairs)
def test_collaborative_fairness_is_pearsons_correlation(several):
    x, y = zip(*several, strict=True)
    found = collaborative_fairness(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(found)
        return
    assert -1 <= found <= 1
    assert collaborative_fairness(y, x) == pytest.approx(found, abs=1e-9)
    # Where scipy itself warns of digits lost it is no oracle.
    if min(np.std(x), np.std(y)) > 1e-3:
        assert found == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9)


def test_limits_of_collaborative_fairness():
    nan = math.nan
    assert collaborative_fairness([1, 2, 3], [20, 40, 60]) == pytest.approx(1)
    assert collaborative_fairness([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert collaborative_fairness([1, nan, 3, 2], [1, 7, 3, nan]) == pytest.approx(1)
    for undefined in (([], []), ([1], [1]), ([1, 2], [0.1, 0.1]), ([1, nan], [1, 2])):
        assert math.isnan(collaborative_fairness(*undefined))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shapley(range(11), airport), "permutations must be said.* 2\\^11"),
        (lambda: contribution_cost(11), "permutations must be said"),
        (lambda: shapley(range(3), airport, permutations=0), "permutations must be"),
        (lambda: shapley(range(3), airport, tolerance=-1), "tolerance must be"),
        (lambda: shapley(range(3), airport, seed=-1), "seed must be"),
        (lambda: shapley([], airport), "clients must be one or more"),
        (lambda: leave_one_out([1, 1], airport), "each of them once"),
        (lambda: shapley([1, 2], lambda s: math.nan), "value of clients .* finite"),
        (lambda: leave_one_out([1], lambda s: "much"), "must be a finite number"),
        (lambda: contribution_cost(0), "clients must be a whole number"),
        (lambda: contribution_cost(3, "banzhaf"), "method must be one of"),
        (lambda: collaborative_fairness([1, 2], [1]), "rewards must be as many"),
        (lambda: collaborative_fairness([1, math.inf], [1, 2]), "contributions must"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ConfigurationError, match=message):
        call()


@pytest.mark.parametrize("clients", [3, None, [0, "a"], [[1], [2]], [math.nan, 1]])
def test_clients_that_are_no_numbers_are_refused(clients):
    for function in (leave_one_out, shapley):
        with pytest.raises(ConfigurationError, match="clients must be one or more"):
            function(clients, len)


def test_numbers_of_numpy_are_numbers():
    assert contribution_cost(np.int64(3)) == 8
    found = shapley(np.arange(3), len, permutations=np.int64(2), seed=np.int64(3))
    assert found.values == {0: 1.0, 1: 1.0, 2: 1.0}


@pytest.mark.parametrize("value", [1e308, 10**400, math.nan, "x"])
def test_values_that_cannot_be_summed_are_refused(value):
    with pytest.raises(ConfigurationError, match="the value of clients"):
        leave_one_out(range(3), lambda some: value)
