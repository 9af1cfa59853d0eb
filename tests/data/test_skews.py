"""Partitions by groups of a sensitive attribute: sizes, shares, and that they end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedweight.core.errors import ConfigurationError
from fedweight.data import DataSet, Examples
from fedweight.data.partitions import partition
from fedweight.data.skews import attribute_skew


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
