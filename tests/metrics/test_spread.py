import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import spatial, stats

from fedweight import metrics
from fedweight.core.errors import ConfigurationError
from fedweight.metrics import (
    best10,
    client_spread,
    deviation,
    entropy,
    gini,
    jain,
    mean,
    minimum,
    uniform_cosine,
    variance,
    worst10,
)

NAN = math.nan


def test_by_hand():
    spread = client_spread([0.4, 0.1, 0.3, 0.2])
    assert spread["mean"] == pytest.approx(0.25)
    assert spread["std"] == pytest.approx(math.sqrt(0.0125))
    assert spread["worst10"] == 0.1
    assert spread["best10"] == 0.4


def test_a_tenth_is_rounded_up_to_whole_clients():
    values = [k / 100 for k in range(11)]
    spread = client_spread(values)
    assert spread["worst10"] == pytest.approx(0.005)
    assert spread["best10"] == pytest.approx(0.095)
    assert client_spread(values[:10])["worst10"] == 0.0


def test_clients_without_a_value_are_left_out():
    assert client_spread([NAN, 0.5, NAN]) == client_spread([0.5])
    assert client_spread(iter([0.5, 0.7])) == client_spread([0.7, 0.5])


@pytest.mark.parametrize("values", [[], [NAN, NAN]])
def test_nobody_is_nan(values):
    spread = client_spread(values)
    assert list(spread) == ["mean", "std", "worst10", "best10"]
    assert all(map(math.isnan, spread.values()))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_order(values):
    spread = client_spread(values)
    slack = 1e-12
    assert min(values) - slack <= spread["worst10"] <= spread["mean"] + slack
    assert spread["mean"] - slack <= spread["best10"] <= max(values) + slack
    assert spread["std"] == pytest.approx(np.std(values), abs=1e-12)


# Each metric.

SHARED_OUT = [jain, gini, entropy, uniform_cosine]
EVERY = [mean, variance, deviation, worst10, best10, minimum, *SHARED_OUT]
AMOUNTS = st.lists(st.floats(0, 1), min_size=1, max_size=40)


def as_before(values):
    """What the columns of rounds.csv were computed by, before they had names."""
    known = np.sort([v for v in values if not math.isnan(v)])
    tenth = math.ceil(len(known) / 10)
    return {
        "mean": float(known.mean()),
        "std": float(known.std()),
        "worst10": float(known[:tenth].mean()),
        "best10": float(known[-tenth:].mean()),
    }


@given(st.lists(st.floats(-100, 100) | st.just(NAN), max_size=60))
def test_the_columns_have_the_numbers_that_they_had(values):
    if all(map(math.isnan, values)):
        return
    assert client_spread(values) == as_before(values)


@pytest.mark.parametrize("metric", EVERY)
@given(st.data())
def test_neither_order_nor_absent_clients_change_a_bit(metric, data):
    values = data.draw(AMOUNTS)
    mixed = data.draw(st.permutations([*values, NAN]))
    assert metric(mixed) == metric(values)
    assert metric(np.array(mixed)) == metric(values)


@pytest.mark.parametrize("metric", EVERY)
def test_of_nobody_every_metric_is_nan(metric):
    assert math.isnan(metric([]))
    assert math.isnan(metric([NAN, NAN]))


# Below that a unit takes bits from a number, or all of it.
SCALED = st.lists(st.just(0.0) | st.floats(1e-300, 1), min_size=1, max_size=40)


@given(SCALED, st.floats(1e-3, 1e3))
def test_ranges_and_units(values, unit):
    k = len(values)
    slack = 1e-9
    assert 1 / k - slack <= jain(values) <= 1
    assert 0 <= gini(values) <= 1 - 1 / k + slack
    assert 0 <= entropy(values) <= 1
    assert 1 / math.sqrt(k) - slack <= uniform_cosine(values) <= 1
    for metric in SHARED_OUT:
        scaled = metric([unit * v for v in values])
        assert scaled == pytest.approx(metric(values), abs=1e-6)


@given(st.floats(0, 1e6), st.integers(1, 40))
def test_equal_shares(value, k):
    values = [value] * k
    assert jain(values) == pytest.approx(1)
    assert uniform_cosine(values) == pytest.approx(1)
    assert entropy(values) == pytest.approx(1)
    assert gini(values) == pytest.approx(0, abs=1e-12)
    assert deviation(values) == pytest.approx(0, abs=1e-9 * max(value, 1))
    assert worst10(values) == pytest.approx(best10(values))


@given(st.floats(1e-300, 1e300), st.integers(2, 40))
def test_one_has_everything(value, k):
    values = [value, *[0.0] * (k - 1)]
    assert jain(values) == pytest.approx(1 / k)
    assert uniform_cosine(values) == pytest.approx(1 / math.sqrt(k))
    assert entropy(values) == 0
    assert gini(values) == pytest.approx(1 - 1 / k)


@given(st.integers(1, 20), st.integers(0, 20))
def test_some_share_alike(m, others):
    assert jain([0.3] * m + [0.0] * others) == pytest.approx(m / (m + others))


@given(AMOUNTS)
def test_they_equal_numpy_and_scipy(values):
    x = np.array(values)
    assert mean(values) == pytest.approx(np.mean(x))
    assert variance(values) == pytest.approx(np.var(x), abs=1e-15)
    assert deviation(values) == pytest.approx(np.std(x), abs=1e-12)
    assert minimum(values) == x.min()
    if x.max() < 1e-100:  # Their squares are 0 in float64.
        return
    pairs = np.abs(x[:, None] - x[None]).sum()
    assert gini(values) == pytest.approx(pairs / (2 * len(x) * x.sum()), abs=1e-9)
    cosine = 1 - spatial.distance.cosine(x, np.ones(len(x)))
    assert uniform_cosine(values) == pytest.approx(cosine)
    if len(x) > 1:
        bits = stats.entropy(x) / math.log(len(x))
        assert entropy(values) == pytest.approx(bits, abs=1e-9)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9)), min_size=1))
def test_a_client_of_size_n_counts_as_n_of_size_one(pairs):
    values, sizes = map(list, zip(*pairs, strict=True))
    repeated = [v for v, n in pairs for _ in range(n)]
    for metric in (mean, variance, deviation):
        found, expected = metric(values, sizes), metric(repeated)
        assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)
        mixed = metric(values[::-1], sizes[::-1])
        assert mixed == found or math.isnan(mixed)


def test_a_client_without_a_value_has_no_size_either():
    assert mean([0.5, NAN, 1.0], sizes=[1, NAN, 3]) == 0.875


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: jain([0.5, -0.1]), "jain: values must be finite and 0 or more, got -"),
        (lambda: gini([0.5, math.inf]), "gini: values must be finite and 0 or more"),
        (lambda: mean([1, 2], sizes=[1]), "sizes must be as many as values, 2, got 1"),
        (lambda: mean([1], sizes=[-1]), "sizes must be finite and 0 or more, got -1"),
        (lambda: mean([[1, 2]]), "values must be a list of numbers, one a client"),
        (
            lambda: mean("ab"),
            "values must be a list of numbers, one a client, got 'ab'",
        ),
        (
            lambda: mean(None),
            "values must be a list of numbers, one a client, got None",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(call, said):
    with pytest.raises(ConfigurationError) as caught:
        call()
    assert said in str(caught.value)


def test_all_measures_at_once_are_those_of_the_functions():
    values, sizes = [0.2, 0.9, float("nan"), 0.7], [5, 1, 8, 2]
    found = metrics.spread_measures(values, sizes)
    for name in ("mean", "variance", "deviation"):
        measure = getattr(metrics, name)
        assert found[name] == measure(values)
        assert found[f"weighted_{name}"] == measure(values, sizes)
    for name in (
        *("worst10", "best10", "minimum", "jain", "gini", "entropy"),
        "uniform_cosine",
    ):
        assert found[name] == getattr(metrics, name)(values)
    assert "weighted_mean" not in metrics.spread_measures(values)
    negative = metrics.spread_measures([-1.0, 2.0])
    assert negative["mean"] == 0.5
    assert math.isnan(negative["jain"])
    assert all(map(math.isnan, metrics.spread_measures([]).values()))
