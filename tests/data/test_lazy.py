"""Clients computed when asked for: the same whoever asks, and free if nobody does."""

from __future__ import annotations

import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedweight import data
from fedweight.core.errors import ConfigurationError, DataError
from fedweight.data import DataSet, Examples, FederatedData, federate
from fedweight.data.lazy import LazyParts, dirichlet_sampled
from fedweight.data.partitions import dirichlet

NAME = "dirichlet-sampled"


def dataset(labels, num_classes=None):
    x = np.arange(len(labels), dtype=np.float32)[:, None]
    train = Examples(x, np.asarray(labels, np.int64))
    return DataSet(
        "toy", train, train.take(slice(0, 1)), num_classes or int(max(labels)) + 1
    )


def numbers(examples):
    return examples.x[:, 0].astype(int).tolist()


labels_of = st.lists(st.integers(0, 6), min_size=1, max_size=120).map(
    lambda values: np.array(values, np.int64)
)
alphas = st.sampled_from([1e-308, 1e-300, 1e-6, 0.05, 0.5, 10.0, 1e9, 1e300, 1e308])
sigmas = st.sampled_from([0.0, 1e-9, 0.3, 2.0, 50.0, 1e200])


@settings(max_examples=80, deadline=None)
@given(labels_of, alphas, sigmas, st.integers(0, 3), st.data())
def test_a_client_has_the_same_whoever_asked_before_and_among_however_many(
    labels, alpha, sigma, seed, draw
):
    n = len(labels)
    options = {
        "alpha": alpha,
        "size_sigma": sigma,
        "examples_per_client": draw.draw(st.integers(1, n)),
    }
    few = dirichlet_sampled(labels, 40, seed, **options)
    many = dirichlet_sampled(labels, 70_000, seed, **options)
    asked = draw.draw(st.lists(st.integers(0, 39), min_size=1, max_size=8))
    in_order = {client: few[client] for client in sorted(set(asked))}
    for client in asked:
        part = many[client]
        np.testing.assert_array_equal(part, in_order[client])
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()
        assert 0 <= part[0] <= part[-1] < n
        assert 1 <= len(part) == few.sizes[client] == many.sizes[client]
    if sigma == 0:
        assert set(many.sizes[:100].tolist()) == {options["examples_per_client"]}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.sampled_from([0.0, 0.2, 0.5, 0.9, 0.999]),
    st.sampled_from([0.0, 0.02, 0.3]),
)
def test_a_federation_holds_out_as_any_other_and_counts_right(
    size, sigma, held_out, proxy
):
    rng = np.random.default_rng(0)
    toy = dataset(rng.integers(0, 4, 200), num_classes=5)
    options = {"examples_per_client": size, "size_sigma": sigma}
    fed = federate(toy, NAME, 30, held_out, proxy, seed=1, **options)
    kept = set(numbers(fed.proxy))
    rows = np.array(sorted(set(range(200)) - kept))
    parts = data.partition(toy, NAME, 30, 1, rows=rows, **options)
    assert fed.is_lazy
    assert fed.sizes.dtype == np.int64
    for i in (3, 29, 0, 3):
        client = fed.client(i)
        train, held = numbers(client.train), numbers(client.held_out)
        assert sorted(train + held) == parts[i].tolist()
        assert train == sorted(train)
        assert not kept & {*train, *held}
        n = len(parts[i])
        assert len(held) == min(round(held_out * n), n - 1)
        assert len(train) == fed.sizes[i] >= 1
        np.testing.assert_array_equal(client.train.y, toy.train.y[train])
        for _ in range(2):  # What is remembered, and what is drawn again.
            for counts, half in zip(fed.labels(i), (train, held), strict=True):
                expected = np.bincount(toy.train.y[half], minlength=5)
                np.testing.assert_array_equal(counts, expected)
    table = fed.label_counts
    assert table.shape == (30, 5)
    assert table.sum(axis=1).tolist() == fed.sizes.tolist()


def test_the_numbers_of_a_seed_do_not_change():
    labels = np.repeat([0, 1, 2], [6, 4, 2])
    options = {"alpha": 0.7, "examples_per_client": 4, "size_sigma": 0.6}
    parts = dirichlet_sampled(labels, 1_000_000, 7, **options)
    assert [parts[k].tolist() for k in (0, 1, 999_999)] == [
        [5],
        list(range(12)),
        [6, 7],
    ]
    assert parts.sizes[:8].tolist() == [1, 12, 11, 2, 7, 2, 1, 3]
    fed = federate(dataset(labels), NAME, 5, 0.25, 0.0, 7, **options)
    assert numbers(fed.client(1).held_out) == [2, 7, 10]


def test_a_million_clients_cost_nothing_until_they_are_asked_for():
    toy = dataset(np.repeat(np.arange(10), 100))
    for sigma, limit in [(0.0, 1e6), (1.0, 60e6)]:
        tracemalloc.start()
        fed = federate(
            toy, NAME, 1_000_000, examples_per_client=50, size_sigma=sigma, proxy=0.0
        )
        for client in range(0, 1_000_000, 50_000):
            assert len(fed.client(client).train) == fed.sizes[client]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < limit


def test_who_takes_no_part_is_never_drawn():
    drawn = []

    def draw(client):
        drawn.append(client)
        return np.array([client % 7, 7 + client % 5])

    toy = dataset([0, 1] * 10)
    fed = FederatedData(toy, LazyParts(np.full(10**6, 2), draw, np.arange(20)))
    assert (fed.num_clients, fed.sizes.sum()) == (10**6, 2 * 10**6)
    for client in (5, 999_999, 5):
        fed.client(client)
    fed.labels(7)
    assert drawn == [5, 999_999, 5, 7]


def test_there_may_be_any_number_of_clients():
    labels = np.repeat(np.arange(10), 100)
    tracemalloc.start()
    parts = dirichlet_sampled(labels, 10**12, 0)
    fed = FederatedData(dataset(labels), parts, held_out=0.2)
    last = fed.client(10**12 - 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(last.train) == fed.sizes[-1] == 40
    few = dirichlet_sampled(labels, 100, 0)
    np.testing.assert_array_equal(parts[99], few[99])
    assert peak < 1e6


def test_sizes_that_differ_take_sixteen_bytes_a_client():
    toy = dataset(np.repeat(np.arange(10), 100))
    tracemalloc.start()
    fed = federate(toy, NAME, 10**6, size_sigma=1.0, proxy=0.0)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(fed.sizes) == 10**6
    assert kept == pytest.approx(16e6, rel=0.01)


def classes_that_count(table):
    """Return the mean of how many equally large classes a client's are worth."""
    shares = table / table.sum(axis=1, keepdims=True)
    return (1 / (shares**2).sum(axis=1)).mean()


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3, 1.0, 3.0])
def test_it_is_as_skewed_as_the_partition_of_the_same_alpha(alpha):
    labels = np.repeat(np.arange(10), 2000)
    sampled = dirichlet_sampled(labels, 200, 0, alpha=alpha, examples_per_client=500)
    divided = [
        part
        for seed in range(5)
        for part in dirichlet(
            labels, 40, np.random.default_rng(seed), alpha=alpha, min_size=1
        )
    ]
    found, expected = (
        classes_that_count(
            np.stack([np.bincount(labels[part], minlength=10) for part in parts])
        )
        for parts in (sampled, divided)
    )
    assert found == pytest.approx(expected, rel=0.1)


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr("fedweight.data.federated.LATELY", 3)
    fed = federate(dataset([0, 1] * 30), NAME, 50, examples_per_client=5)
    for client in range(50):
        fed.client(client)
        assert len(fed._lately) <= 3
    fed.labels(49)
    assert 49 not in fed._lately


def test_large_alpha_is_iid_and_small_alpha_is_one_class_by_its_share():
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    share = np.array([0.6, 0.3, 0.1])
    for alpha in (1e9, 1e307):
        parts = dirichlet_sampled(labels, 400, 0, alpha=alpha, examples_per_client=50)
        table = np.stack([np.bincount(labels[p], minlength=3) for p in parts])
        np.testing.assert_allclose(table.mean(axis=0) / 50, share, atol=0.02)
        # Var of a multinomial count.
        np.testing.assert_allclose(
            table.var(axis=0), 50 * share * (1 - share), rtol=0.25
        )
    for alpha in (1e-9, 1e-307):
        parts = dirichlet_sampled(labels, 400, 0, alpha=alpha, examples_per_client=50)
        table = np.stack([np.bincount(labels[p], minlength=3) for p in parts])
        assert ((table == 0) | (table == 50)).all()
        np.testing.assert_allclose((table > 0).mean(axis=0), share, atol=0.08)


def test_shares_have_the_mean_and_variance_of_the_distribution():
    labels = np.repeat(np.arange(4), 10_000)
    parts = dirichlet_sampled(labels, 1000, 0, alpha=0.5, examples_per_client=1000)
    table = np.stack([np.bincount(labels[p], minlength=4) for p in parts]) / 1000
    np.testing.assert_allclose(table.mean(axis=0), 0.25, atol=0.03)
    # Var = a (A - a) / (A^2 (A + 1)) with a = 0.5 and A = 2
    np.testing.assert_allclose(table.var(axis=0), 0.0625, atol=0.008)


def test_examples_of_a_class_are_drawn_alike():
    labels = np.repeat([0, 1], [30, 50])
    seen = np.zeros(80)
    pairs = np.zeros(2)
    clients = 4000
    for part in dirichlet_sampled(
        labels, clients, 3, alpha=1e9, examples_per_client=40
    ):
        seen[part] += 1
        pairs += [np.isin([0, 1], part).all(), np.isin([30, 79], part).all()]
    np.testing.assert_allclose(seen / clients, 0.5, atol=0.05)
    # Two of a class are hardly more often together than if they were independent.
    np.testing.assert_allclose(pairs / clients, 0.25, atol=0.03)


def test_a_class_that_runs_out_is_filled_up_from_the_others():
    labels = np.repeat([0, 1, 2], [50, 5, 1])
    for part in dirichlet_sampled(labels, 200, 0, alpha=0.1, examples_per_client=30):
        assert len(part) == 30
    everything = dirichlet_sampled(labels, 3, 0, alpha=1e-9, examples_per_client=56)
    assert everything[2].tolist() == list(range(56))


def test_sizes_are_log_normal_with_the_mean_that_was_asked_for():
    labels = np.zeros(100_000, np.int64)
    parts = dirichlet_sampled(
        labels, 200_000, 5, examples_per_client=1000, size_sigma=0.8
    )
    logs = np.log(parts.sizes)
    assert parts.sizes.mean() == pytest.approx(1000, rel=0.01)
    assert logs.std() == pytest.approx(0.8, rel=0.01)
    assert np.median(parts.sizes) == pytest.approx(1000 * np.exp(-0.32), rel=0.01)
    # Neighbours have nothing to do with each other.
    assert abs(np.corrcoef(logs[:-1], logs[1:])[0, 1]) < 0.01
    extreme = dirichlet_sampled(
        labels, 1000, 5, examples_per_client=1000, size_sigma=1e9
    )
    assert set(extreme.sizes.tolist()) == {1}


def test_seeds_and_clients_differ():
    labels = np.repeat(np.arange(5), 200)
    a, b, c = (dirichlet_sampled(labels, 3, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a[1], b[1])
    assert a[1].tolist() != c[1].tolist()
    assert a[0].tolist() != a[1].tolist()


def test_there_is_no_client_beyond_the_last():
    fed = federate(dataset([0, 1] * 30), NAME, 3, examples_per_client=5)
    for look in (fed.client, fed.labels):
        for i in (-1, 3):
            with pytest.raises(IndexError, match="clients 0 to 2"):
                look(i)


def test_it_is_a_sequence():
    parts = dirichlet_sampled(np.repeat([0, 1], 20), 4, 0, examples_per_client=5)
    assert len(parts) == 4
    np.testing.assert_array_equal(parts[-1], parts[3])
    assert [p.tolist() for p in parts[1:3]] == [parts[1].tolist(), parts[2].tolist()]
    assert len(list(parts)) == 4
    with pytest.raises(IndexError):
        parts[4]


def test_threads_and_pickles_make_no_difference():
    fed = federate(dataset([0, 1, 2] * 50), NAME, 1000, size_sigma=0.5)
    expected = [numbers(fed.client(k).train) for k in range(200)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda k: numbers(fed.client(k).train), range(200))) == (
            expected
        )
    copy = pickle.loads(pickle.dumps(fed))
    assert numbers(copy.client(7).train) == expected[7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, r"alpha must be in \(0, inf\), got 0"),
        ({"alpha": float("inf")}, "alpha must be in"),
        ({"size_sigma": -0.1}, r"size_sigma must be in \[0, inf\), got -0.1"),
        ({"examples_per_client": 0}, "must be from 1 to 40, .* got 0. Take another"),
        ({"examples_per_client": 41}, "must be from 1 to 40, .* got 41. Take another"),
        ({"examples_per_client": 2.5}, "must be a whole number, got 2.5"),
        ({"sigma": 1.0}, "no option 'sigma'. Did you mean 'size_sigma'"),
    ],
)
def test_errors_name_parameter_value_and_remedy(options, message):
    with pytest.raises(ConfigurationError, match=message):
        data.partition(dataset(np.repeat(np.arange(5), 8)), NAME, 3, 0, **options)


def test_it_needs_a_number_of_clients():
    with pytest.raises(ConfigurationError, match="needs num_clients"):
        data.partition(dataset([0, 1]), NAME, None, 0)


def test_a_lazy_partition_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_lazy_partition_for_test.py").write_text(
        "import numpy as np\n"
        "from functools import partial\n"
        "from fedweight.data.lazy import LazyParts\n"
        "def pair(seed, n, client):\n"
        "    return [(seed + client) % n, (client + seed + 2) % n]\n"
        "def pairs(dataset, num_clients, seed):\n"
        "    n = len(dataset.train)\n"
        "    draw = partial(pair, seed, n)\n"
        "    return LazyParts(np.full(num_clients, 2), draw, np.arange(n))\n"
        "def outside(dataset, num_clients, seed):\n"
        "    return LazyParts(np.full(num_clients, 2), None, np.arange(99))\n"
        "def five(dataset, num_clients, seed):\n"
        "    return LazyParts(np.full(5, 2), None, np.arange(9))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    toy = dataset([0, 1] * 5)
    parts = data.partition(
        toy, "own_lazy_partition_for_test:pairs", 10**6, 3, rows=np.arange(4, 10)
    )
    assert isinstance(parts, LazyParts)
    assert parts[999_999].tolist() == [4, 6]
    for name, message in [
        ("outside", "outside 0 to 9"),
        ("five", "returned 5 parts for 6 clients"),
    ]:
        with pytest.raises(DataError, match=message):
            data.partition(toy, f"own_lazy_partition_for_test:{name}", 6, 3)


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        ([0], "client 1 has 1 examples, but its size is 2"),
        ([0, 4], r"client 1 has example numbers from 0 to 4. Give 0 to 3"),
        ([-1, 3], "from -1 to 3"),
        ([2, 2], "client 1 has an example twice"),
    ],
)
def test_what_ones_own_draws_is_checked(drawn, message):
    parts = LazyParts(np.full(2, 2), lambda client: np.array(drawn), np.arange(4))
    with pytest.raises(DataError, match=message):
        parts[1]


def test_lazy_parts_must_fit_the_data_and_the_proxy():
    toy = dataset([0, 1] * 20)

    def parts(rows):
        return LazyParts(np.full(3, 1), lambda client: np.array([client]), rows)

    assert FederatedData(toy, parts(np.arange(40))).num_clients == 3
    with pytest.raises(DataError, match="names example 40"):
        FederatedData(toy, parts(np.arange(41)))
    with pytest.raises(DataError, match="draws from examples that the server keeps"):
        FederatedData(toy, parts(np.arange(40)), proxy=0.1)
