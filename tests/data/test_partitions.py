"""Partitions: disjoint, covering, deterministic, always ending, and what they claim."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedweight import data
from fedweight.core.errors import ConfigurationError, DataError
from fedweight.data import DataSet, Examples
from fedweight.data.partitions import (
    classes,
    dirichlet,
    iid,
    natural,
    niid2,
    quantity,
    shards,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def counts(labels, parts):
    return np.stack([np.bincount(labels[p], minlength=labels.max() + 1) for p in parts])


def assert_partition(parts, n):
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()
    everything = np.concatenate(parts)
    assert sorted(everything.tolist()) == list(range(n))


def dataset(labels, natural_clients=None):
    x = np.arange(len(labels), dtype=np.float32)[:, None]
    train = Examples(x, np.asarray(labels, np.int64))
    number = int(max(labels)) + 1
    return DataSet("toy", train, train.take(slice(0, 1)), number, natural_clients)


labels_of = st.lists(st.integers(0, 6), min_size=1, max_size=120).map(
    lambda values: np.array(values, np.int64)
)


@settings(max_examples=60, deadline=None)
@given(labels_of, st.integers(1, 15), st.integers(0, 3), st.data())
def test_every_partition_is_disjoint_covering_and_deterministic(labels, k, seed, draw):
    n, c = len(labels), len(np.unique(labels))
    alpha = draw.draw(st.sampled_from([1e-300, 1e-6, 0.05, 0.5, 10.0, 1e9, 1e300]))
    least = draw.draw(st.integers(0, n // k))
    balanced = draw.draw(st.booleans())
    each = draw.draw(st.integers(1, c))
    cases = [
        (iid, {}),
        (dirichlet, {"alpha": alpha, "min_size": least, "balanced": balanced}),
        (quantity, {"alpha": alpha, "min_size": least}),
        (natural, {}),
    ]
    if k * each >= c:
        cases.append((classes, {"classes_per_client": each}))
    if (k - 1) * each >= c and k >= 2:
        cases.append((niid2, {"classes_per_client": each}))
    if k <= n:
        cases.append((shards, {"shards_per_client": max(1, n // k // 2)}))
    for function, options in cases:
        parts = function(labels, k, rng(seed), **options)
        again = function(labels, k, rng(seed), **options)
        if function is natural:
            chosen = np.sort(np.concatenate(parts))
            assert len(parts) == min(k, c)
            assert len(np.unique(chosen)) == len(chosen)
            assert len(parts) < c or len(chosen) == n
        else:
            assert len(parts) == k
            assert_partition(parts, n)
        if "min_size" in options:
            assert min(map(len, parts)) >= least
        assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_dirichlet_ends_with_extreme_skew_and_very_many_clients():
    labels = np.repeat(np.arange(10), 6000)
    start = time.perf_counter()
    parts = dirichlet(labels, 1000, rng(), alpha=0.05, min_size=10)
    assert time.perf_counter() - start < 10
    assert_partition(parts, 60_000)
    assert min(map(len, parts)) >= 10


def test_dirichlet_limits():
    labels = np.repeat(np.arange(10), 100)
    even = counts(labels, dirichlet(labels, 10, rng(), alpha=1e9))
    assert (even == 10).all()
    extreme = counts(labels, dirichlet(labels, 10, rng(), alpha=1e-12))
    assert ((extreme == 0) | (extreme == 100)).all()


def test_dirichlet_skew_falls_with_alpha():
    labels = np.repeat(np.arange(10), 500)
    spread = [
        counts(labels, dirichlet(labels, 20, rng(), alpha=alpha)).std()
        for alpha in (0.05, 0.5, 5, 500)
    ]
    assert spread == sorted(spread, reverse=True)


def test_dirichlet_shares_have_the_mean_and_variance_of_the_distribution():
    labels = np.zeros(10_000, np.int64)
    sizes = [
        [len(part) for part in dirichlet(labels, 5, rng(seed), alpha=0.5)]
        for seed in range(400)
    ]
    shares = np.array(sizes) / 10_000
    np.testing.assert_allclose(shares.mean(axis=0), 0.2, atol=0.05)
    # Var = a (A - a) / (A^2 (A + 1)) with a = 0.5 and A = 2.5
    np.testing.assert_allclose(shares.var(axis=0), 0.0457, atol=0.015)


def test_balanced_gives_a_full_client_no_further_class():
    labels = np.repeat(np.arange(10), 100)
    for seed in range(20):
        table = counts(labels, dirichlet(labels, 5, rng(seed), balanced=True))
        before = np.cumsum(table, axis=1) - table
        assert (table[before >= 200] == 0).all()


def test_least_size_takes_from_the_largest_only():
    labels = np.repeat(np.arange(4), 50)
    plain = dirichlet(labels, 8, rng(2), alpha=0.05)
    filled = dirichlet(labels, 8, rng(2), alpha=0.05, min_size=10)
    largest = max(map(len, filled))
    for a, b in zip(plain, filled, strict=True):
        if len(a) < 10:
            assert len(b) == 10
            assert set(a) <= set(b)
        elif len(b) < len(a):
            assert len(b) >= largest - 1
        else:
            assert np.array_equal(a, b)


def test_niid2_is_the_setting_of_the_paper_at_six_clients():
    labels = np.repeat(np.arange(10), 600)
    table = counts(labels, niid2(labels, 6, rng()))
    assert ((table[:5] > 0).sum(axis=1) == 2).all()
    assert ((table[:5] > 0).sum(axis=0) == 1).all()
    assert (table[5] == 100).all()
    assert (table.sum(axis=1) == 1000).all()


def test_classes_deals_each_class_equally_often():
    labels = np.repeat(np.arange(10), 60)
    table = counts(labels, classes(labels, 15, rng(), classes_per_client=3)) > 0
    assert (table.sum(axis=1) == 3).all()
    assert set(table.sum(axis=0)) <= {4, 5}


def test_shards_of_equal_size_hold_few_classes():
    labels = rng().permutation(np.repeat(np.arange(10), 60))
    parts = shards(labels, 100, rng(), shards_per_client=2)
    assert {len(part) for part in parts} == {6}
    assert ((counts(labels, parts) > 0).sum(axis=1) <= 2).all()


def test_quantity_skews_sizes_but_not_labels():
    labels = np.repeat(np.arange(4), 5000)
    table = counts(labels, quantity(labels, 10, rng(), alpha=0.5))
    sizes = table.sum(axis=1)
    assert sizes.max() > 3 * np.median(sizes)
    large = table[sizes > 1000]
    np.testing.assert_allclose(large / large.sum(1, keepdims=True), 0.25, atol=0.06)


def test_natural_takes_the_largest_clients_in_their_order():
    ids = np.array([4, 4, 9, 1, 1, 1, 9, 2])
    taken = natural(ids, 3, rng())
    assert [part.tolist() for part in taken] == [[3, 4, 5], [0, 1], [2, 6]]
    assert len(natural(ids, None, rng())) == len(natural(ids, 99, rng())) == 4


def test_dispatch_counts_in_the_original_numbers():
    toy = dataset([0, 1] * 20, np.repeat(np.arange(4), 10))
    rows = np.arange(10, 40)
    for name in ("iid", "dirichlet"):
        parts = data.partition(toy, name, 3, 0, rows=rows)
        assert sorted(np.concatenate(parts).tolist()) == rows.tolist()
    natural_ones = data.partition(toy, "natural", 3, 0, rows=rows)
    assert [part.tolist() for part in natural_ones] == [  # the first three, as ever
        *([], list(range(10, 20)), list(range(20, 30)))
    ]
    assert [part[0] for part in data.partition(toy, "natural", None, 0)] == [
        *(0, 10, 20, 30)
    ]


def test_the_seed_decides():
    toy = dataset(np.repeat(np.arange(5), 40))
    a, b, c = (data.partition(toy, "dirichlet", 4, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(p, q) for p, q in zip(a, b, strict=True))
    assert not all(np.array_equal(p, q) for p, q in zip(a, c, strict=True))


def test_catalogue_describes_every_partition():
    lines = data.partition_catalogue()
    assert set(lines) == {
        *("iid", "dirichlet", "dirichlet-sampled", "niid2", "shards"),
        *("classes", "quantity", "attribute", "natural"),
    }
    assert all(len(line) > 20 for line in lines.values())


@pytest.mark.parametrize(
    ("name", "k", "options", "message"),
    [
        ("dirichlt", 3, {}, "Did you mean 'dirichlet'"),
        ("dirichlet", 3, {"alfa": 1.0}, "no option 'alfa'. Did you mean 'alpha'"),
        ("dirichlet", 3, {"alpha": 0.0}, r"alpha must be in \(0, inf\), got 0"),
        ("dirichlet", 3, {"alpha": float("nan")}, "alpha must be in"),
        ("dirichlet", 3, {"alpha": "x"}, "alpha must be a number, got 'x'"),
        ("dirichlet", 3, {"min_size": 14}, "min_size must be from 0 to 13"),
        ("dirichlet", 3, {"min_size": -1}, "min_size must be from 0"),
        ("dirichlet", 3, {"balanced": 1}, "balanced must be true or false"),
        ("quantity", 3, {"alpha": -1.0}, "alpha must be in"),
        ("shards", 30, {}, "60 shards of 40 examples"),
        ("shards", 3, {"shards_per_client": 0}, "shards_per_client must be in"),
        ("shards", 3, {"shards_per_client": 2.0}, "must be a whole number"),
        ("classes", 3, {"classes_per_client": 6}, r"must be in \[1, 5\]"),
        ("classes", 2, {"classes_per_client": 1}, "Take 3 or more"),
        ("niid2", 1, {}, "num_clients must be in"),
        ("niid2", 3, {"classes_per_client": 1}, "leaves classes without a client"),
        ("iid", 0, {}, "num_clients must be in"),
        ("iid", None, {}, "needs num_clients"),
    ],
)
def test_errors_name_parameter_value_and_remedy(name, k, options, message):
    with pytest.raises(ConfigurationError, match=message):
        data.partition(dataset(np.repeat(np.arange(5), 8)), name, k, 0, **options)


def test_natural_needs_natural_clients():
    with pytest.raises(DataError, match="'toy' has no natural clients"):
        data.partition(dataset([0, 1]), "natural", None, 0)


def test_a_partition_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_partition_for_test.py").write_text(
        "import numpy as np\n"
        "def by_value(dataset, num_clients, rng, *, above=0.0):\n"
        "    big = dataset.train.x[:, 0] > above\n"
        "    return [np.flatnonzero(big), np.flatnonzero(~big)]\n"
        "def twice(dataset, num_clients, rng):\n"
        "    return [np.array([0]), np.array([0])]\n"
        "def outside(dataset, num_clients, rng):\n"
        "    return [np.array([0]), np.array([99])]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    toy = dataset([0, 1] * 5)
    own = "own_partition_for_test"
    rows = np.arange(2, 10)
    parts = data.partition(toy, f"{own}:by_value", 2, 0, rows=rows, above=6.5)
    assert [part.tolist() for part in parts] == [[7, 8, 9], [2, 3, 4, 5, 6]]
    for name, k, message in [
        ("by_value", 3, "returned 2 parts for 3 clients"),
        ("twice", 2, "an example twice"),
        ("outside", 2, "outside 0 to 9"),
    ]:
        with pytest.raises(DataError, match=message):
            data.partition(toy, f"{own}:{name}", k, 0)


@given(st.integers(0, 60), st.integers(1, 70))
def test_iid_parts_are_of_equal_size_and_some_empty_where_there_are_more(n, k):
    sizes = [len(part) for part in iid(np.zeros(n, np.int64), k, rng())]
    assert max(sizes) - min(sizes) <= 1
    assert sizes.count(0) == max(0, k - n)


def test_quantity_limits():
    labels = np.zeros(1003, np.int64)
    for seed in range(5):
        even = [len(p) for p in quantity(labels, 6, rng(seed), alpha=1e9)]
        assert max(even) - min(even) <= 1
        extreme = [len(p) for p in quantity(labels, 6, rng(seed), alpha=1e-12)]
        assert sorted(extreme) == [0] * 5 + [1003]


@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0])
def test_balanced_sizes_differ_less(alpha):
    labels = np.repeat(np.arange(10), 100)
    spread = {
        balanced: np.mean(
            [
                np.std(
                    [
                        len(part)
                        for part in dirichlet(
                            labels, 10, rng(seed), alpha=alpha, balanced=balanced
                        )
                    ]
                )
                for seed in range(20)
            ]
        )
        for balanced in (False, True)
    }
    assert spread[True] < spread[False]


@pytest.mark.parametrize("k", [3, 7, 10, 40, 200])
@pytest.mark.parametrize("each", [1, 2, 5])
def test_all_but_as_many_clients_as_borders_see_as_many_classes_as_shards(k, each):
    for seed in range(5):
        sizes = rng(seed).integers(1, 300, 6)
        labels = rng(seed).permutation(np.repeat(np.arange(6), sizes + 200))
        parts = shards(labels, k, rng(seed), shards_per_client=each)
        seen = (counts(labels, parts) > 0).sum(axis=1)
        assert (seen > each).sum() <= 5


def test_shards_of_one_example_are_iid():
    """The counts of a class are as when 100 of 1,000 examples are drawn at random."""
    labels = np.repeat(np.arange(10), 100)
    of_one_class = [
        counts(labels, shards(labels, 10, rng(seed), shards_per_client=100))[:, 0]
        for seed in range(300)
    ]
    # Hypergeometric: mean 10, variance 100 * 0.1 * 0.9 * 900 / 999.
    table = np.array(of_one_class)
    np.testing.assert_allclose(table.mean(axis=0), 10, atol=0.7)
    assert table.var() == pytest.approx(8.108, rel=0.1)


def test_with_all_classes_everybody_has_as_much_of_each():
    labels = np.repeat(np.arange(4), [40, 41, 7, 93])
    table = counts(labels, classes(labels, 5, rng(), classes_per_client=4))
    assert (table.max(axis=0) - table.min(axis=0) <= 1).all()


def test_a_class_with_few_examples_is_not_with_all_who_hold_it():
    labels = np.repeat([0, 1], [50, 3])
    table = counts(labels, classes(labels, 10, rng(), classes_per_client=2))
    assert table[:, 1].tolist() == [1, 1, 1, *[0] * 7]
    assert (table[:, 0] == 5).all()


def test_the_balanced_client_of_niid2_has_its_share_of_every_class():
    sizes = [10, 25, 61, 7]
    labels = np.repeat(np.arange(4), sizes)
    table = counts(labels, niid2(labels, 6, rng(), classes_per_client=2))
    assert table[-1].tolist() == [round(n / 6) for n in sizes]
    assert ((table[:-1] > 0).sum(axis=1) <= 2).all()
