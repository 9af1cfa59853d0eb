"""Partitions by groups of a sensitive attribute: sizes, shares, and that they end."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedweight.core.errors import ConfigurationError
from fedweight.data import DataSet, Examples, federate
from fedweight.data.partitions import partition
from fedweight.data.skews import attribute_skew, flipped_labels


def people(groups, labels, number=None):
    groups, labels = np.asarray(groups, np.int64), np.asarray(labels, np.int64)
    number = number or int(groups.max(initial=0)) + 1
    side = {"sex": groups, "age": np.linspace(20, 80, len(groups))}
    some = Examples(np.zeros((len(groups), 1), np.float32), labels, side)
    names = {"sex": tuple(f"group {k}" for k in range(number))}
    return DataSet("people", some, some, 3, attribute_names=names)


def drawn(n=900, groups=2, seed=0):
    rng = np.random.default_rng(seed)
    return people(rng.integers(0, groups, n), rng.integers(0, 3, n))


def split(data, k, **options):
    rng = np.random.default_rng(5)
    return attribute_skew(data, k, rng, attribute="sex", **options)


def shares(data, parts):
    """Return the share of group 0 at each client."""
    groups = data.train.attributes["sex"]
    return np.array([(groups[part] == 0).mean() for part in parts])


@settings(max_examples=80, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=60),
    k=st.integers(1, 20),
    strength=st.floats(0, 1),
    skewed=st.sampled_from(["groups", "labels-by-group"]),
)
def test_every_example_is_with_one_client_and_sizes_are_equal(
    pairs, k, strength, skewed
):
    groups, labels = zip(*pairs, strict=True) if pairs else ((), ())
    data = people(groups, labels, number=4)
    parts = split(data, k, strength=strength, skewed=skewed)
    assert len(parts) == k
    everything = np.concatenate(parts)
    assert sorted(everything.tolist()) == list(range(len(pairs)))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all((np.diff(part) > 0).all() for part in parts)


def test_the_strength_turns_the_knob():
    data = drawn()
    spread = [
        shares(data, split(data, 10, strength=strength)).std()
        for strength in (0.0, 0.3, 0.6, 1.0)
    ]
    assert spread[0] < 0.09  # As drawn by lot: the root of 0.25 / 90 is 0.053.
    assert spread == sorted(spread)
    assert spread[3] > 0.45
    # Half of a client is from one piece; of the rest half is of group 0.
    halves = shares(data, split(data, 10, strength=0.5))
    assert (np.abs(np.abs(halves - 0.5) - 0.25) < 0.12).sum() >= 9


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_at_full_strength_all_but_few_clients_have_one_group(groups):
    data = drawn(groups=groups)
    held = data.train.attributes["sex"]
    parts = split(data, 20, strength=1.0)
    several = sum(len(np.unique(held[part])) > 1 for part in parts)
    assert several <= groups - 1


def test_labels_by_group_leave_groups_alike_and_let_them_tell_the_label():
    data = drawn(3000)
    parts = split(data, 6, strength=1.0, skewed="labels-by-group")
    assert shares(data, parts).std() < 0.15
    groups, labels = data.train.attributes["sex"], data.train.y
    told = 0
    for part in parts:
        pairs = np.unique(np.stack([groups[part], labels[part]]), axis=1)
        told += pairs.shape[1] == len(np.unique(groups[part]))
    assert told >= 4  # But for those where two differences meet.
    differences = {int((labels - groups)[part[0]] % 3) for part in parts}
    assert differences == {0, 1, 2}


def test_it_is_a_partition_of_the_rows_that_are_asked_for():
    data, rows = drawn(), np.arange(100, 400)
    options = {"attribute": "sex", "strength": 1.0}
    parts = partition(data, "attribute", 5, 0, rows=rows, **options)
    again = partition(data, "attribute", 5, 0, rows=rows, **options)
    other = partition(data, "attribute", 5, 1, rows=rows, **options)
    assert sorted(np.concatenate(parts).tolist()) == rows.tolist()
    assert all(map(np.array_equal, parts, again))
    assert not all(map(np.array_equal, parts, other))


@pytest.mark.parametrize("name", ["sx", "age", ""])
def test_what_is_no_group_is_refused(name):
    with pytest.raises(ConfigurationError, match=r"have no groups.*They have sex"):
        partition(drawn(), "attribute", 5, 0, attribute=name)
    with pytest.raises(ConfigurationError, match=r"strength must be in \[0, 1\]"):
        split(drawn(), 5, strength=1.5)


# --------------------------------------------------------------- labels that are wrong


def flip(data, parts, rates=(0.3, 0.0), seed=0, **options):
    return flipped_labels(
        data, parts, seed, attribute="sex", rates=list(rates), **options
    )


def test_labels_are_flipped_as_often_as_their_group_says():
    data = drawn(6000)
    groups, y = data.train.attributes["sex"], data.train.y
    rates = (0.35, 0.1)
    found = flip(data, [np.arange(6000)], rates)
    wrong = found != y
    for group, rate in enumerate(rates):
        members = groups == group
        assert wrong[members].mean() == pytest.approx(rate, abs=0.03)
    # Each of the two other classes is as likely.
    steps = np.bincount((found - y)[wrong] % 3, minlength=3)
    assert steps[0] == 0
    assert steps[1] / steps.sum() == pytest.approx(0.5, abs=0.04)
    assert data.train.y is y
    np.testing.assert_array_equal(data.test.y, y)


def test_higher_rates_flip_the_same_and_more():
    data = drawn()
    parts = np.array_split(np.arange(900), 5)
    y = data.train.y
    low, high = (flip(data, parts, (rate, rate)) for rate in (0.2, 0.5))
    assert set(np.flatnonzero(low != y)) < set(np.flatnonzero(high != y))
    np.testing.assert_array_equal(high[low != y], low[low != y])
    np.testing.assert_array_equal(flip(data, parts, (0.0, 0.0)), y)
    assert (flip(data, parts, (1.0, 1.0)) != y).all()
    assert (flip(data, parts, seed=1) != flip(data, parts, seed=2)).any()


def test_what_a_client_flips_does_not_depend_on_who_else_there_is():
    data = drawn()
    few = flip(data, [np.arange(300)])
    many = flip(data, np.array_split(np.arange(900), 3))
    np.testing.assert_array_equal(few[:300], many[:300])
    np.testing.assert_array_equal(few[300:], data.train.y[300:])


def test_with_a_strength_clients_differ_and_the_mean_stays():
    data = drawn(12000)
    parts = np.array_split(np.arange(12000), 6)
    wrong = flip(data, parts, (0.3, 0.3), strength=1.0) != data.train.y
    shares = sorted(wrong[part].mean() for part in parts)
    np.testing.assert_allclose(shares, np.linspace(0, 0.6, 6), atol=0.04)
    assert shares[0] == 0
    alone = flip(data, [np.arange(12000)], (0.3, 0.3), strength=1.0)
    assert (alone != data.train.y).mean() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rates": (0.3,)}, "rates must be 2, one for each group of 'sex'"),
        ({"rates": (0.6, 0.0), "strength": 0.8}, r"at most 1, got 0\.6 \* \(1 \+ 0\.8"),
        ({"rates": (1.2, 0.0)}, "rates"),
        ({"rates": (0.1, 0.0), "strength": 1.5}, "strength"),
    ],
)
def test_rates_that_cannot_be_are_refused(options, text):
    with pytest.raises(ConfigurationError, match=text):
        flip(drawn(), [np.arange(900)], **options)


def test_flips_reach_clients_and_nobody_else():
    rng = np.random.default_rng(0)
    x = np.arange(1000, dtype=np.float32)[:, None]  # Tells which example it is.
    own = {"sex": rng.choice(["f", "m"], 1000)}
    every = Examples(x, rng.integers(0, 2, 1000), own)
    data = DataSet("people", every, every, 2)
    flips = {"attribute": "sex", "rates": [1.0, 0.0]}
    found = federate(data, "iid", num_clients=4, proxy=0.1, flips=flips)
    plain = federate(data, "iid", num_clients=4, proxy=0.1)
    for k in range(4):
        for one, other in zip(
            (found.client(k).train, found.client(k).held_out),
            (plain.client(k).train, plain.client(k).held_out),
            strict=True,
        ):
            np.testing.assert_array_equal(one.x, other.x)
            np.testing.assert_array_equal(one.y != other.y, one.attributes["sex"] == 0)
    np.testing.assert_array_equal(found.proxy.y, plain.proxy.y)
    np.testing.assert_array_equal(found.test.y, every.y)
    assert not np.array_equal(found.label_counts, plain.label_counts)


def test_flips_of_clients_that_share_examples():
    data = drawn()
    flips = {"attribute": "sex", "rates": [1.0, 1.0]}
    found = federate(data, "dirichlet-sampled", num_clients=3, proxy=0, flips=flips)
    plain = federate(data, "dirichlet-sampled", num_clients=3, proxy=0)
    assert (found.client(0).train.y != plain.client(0).train.y).all()
    with pytest.raises(ConfigurationError, match="share examples"):
        federate(
            data,
            "dirichlet-sampled",
            num_clients=3,
            flips={"attribute": "sex", "rates": [0.2, 0.1], "strength": 0.5},
        )


def test_flips_need_groups_and_classes():
    data = drawn()
    with pytest.raises(ConfigurationError, match="Did you mean 'sex'"):
        flipped_labels(data, [np.arange(900)], 0, attribute="sx", rates=[0.1, 0.1])
    numbers = replace(
        data,
        task="regression",
        num_classes=0,
        train=replace(data.train, y=np.ones(900)),
    )
    with pytest.raises(ConfigurationError, match="rates flip"):
        flip(numbers, [np.arange(900)])


def test_groups_of_two_attributes_are_those_that_they_make_together():
    rng = np.random.default_rng(0)
    side = {"sex": rng.integers(0, 2, 1200), "old": rng.integers(0, 3, 1200)}
    some = Examples(np.zeros((1200, 1), np.float32), side["sex"], side)
    names = {"sex": ("f", "m"), "old": ("a", "b", "c")}
    data = DataSet("people", some, some, 2, attribute_names=names)
    crossed = replace(
        data,
        train=replace(some, attributes={"both": side["sex"] * 3 + side["old"]}),
        attribute_names={"both": tuple("abcdef")},
    )
    both = attribute_skew(
        data, 6, np.random.default_rng(1), attribute=["sex", "old"], strength=0.7
    )
    one = attribute_skew(
        crossed, 6, np.random.default_rng(1), attribute="both", strength=0.7
    )
    for mine, other in zip(both, one, strict=True):
        np.testing.assert_array_equal(mine, other)
    for nothing in ("", [], ["sex", ""]):
        with pytest.raises(ConfigurationError, match="have no groups ''"):
            attribute_skew(data, 6, rng, attribute=nothing)


def test_labels_of_all_are_flipped_by_one_rate_and_clients_differ():
    data = drawn(9000)
    parts = np.array_split(np.arange(9000), 3)
    flipped = flipped_labels(data, parts, 0, rates=[0.4], strength=1.0)
    shares = sorted((flipped[p] != data.train.y[p]).mean() for p in parts)
    np.testing.assert_allclose(shares, [0.0, 0.4, 0.8], atol=0.03)
    assert shares[0] == 0
    alike = flipped_labels(data, parts, 0, rates=[0.4])
    by_group = flip(data, parts, rates=(0.4, 0.4))
    np.testing.assert_array_equal(alike, by_group)
    with pytest.raises(ConfigurationError, match="must be 1, one for all examples"):
        flipped_labels(data, parts, 0, rates=[0.4, 0.1])
