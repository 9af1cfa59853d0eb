"""What is added up by group, held against fairlearn and plain NumPy."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from fairlearn.metrics import (
    MetricFrame,
    false_positive_rate,
    selection_rate,
    true_positive_rate,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from fedweight.core.errors import ConfigurationError, DataError
from fedweight.metrics import Groups, Statistics, equity_scaled, task_named

SEX, RACE = ("f", "m"), ("a", "b", "c")


def people(n, classes=2, seed=0):
    """Logits, labels and two attributes of some examples."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), y] += 0.7
    attributes = {"sex": rng.integers(0, 2, n), "race": rng.integers(0, 3, n)}
    return torch.from_numpy(logits), torch.from_numpy(y), attributes


def parted(attributes, sizes):
    """Return the attributes of clients that have so many examples each."""
    ends = np.cumsum(sizes)
    return [
        {name: column[end - size : end] for name, column in attributes.items()}
        for end, size in zip(ends, sizes, strict=True)
    ]


def counting(classes=2, task="classification", **options):
    groups = Groups({"sex": SEX, "race": RACE}, **options)
    return Statistics(task_named(task), classes, groups=groups)


def one_by_one(which, sums, client=0):
    """Return a client's rows, by attribute and group."""
    rows = which.groups.rows(sums, absent=True)
    return {(r["attribute"], r["group"]): r for c, r in rows if c == client}


@pytest.mark.parametrize(("classes", "positive"), [(2, None), (2, 0), (4, 2)])
def test_rates_are_those_of_fairlearn(classes, positive):
    logits, y, attributes = people(400, classes)
    which = counting(classes, intersections=True, positive=positive)
    sizes = [150, 0, 250]
    sums = which.of(logits, y, sizes, parted(attributes, sizes))
    found = one_by_one(which, sums.total())
    good = 1 if positive is None else positive
    truth, guess = y.numpy(), logits.argmax(1).numpy()
    frame = {
        "sex": [SEX[k] for k in attributes["sex"]],
        "race": [RACE[k] for k in attributes["race"]],
    }
    for names in (["sex"], ["race"], ["sex", "race"]):
        rates = MetricFrame(
            metrics={
                "tpr": true_positive_rate,
                "fpr": false_positive_rate,
                "selection_rate": selection_rate,
            },
            y_true=truth == good,
            y_pred=guess == good,
            sensitive_features={name: frame[name] for name in names},
        ).by_group
        right = MetricFrame(
            metrics=accuracy_score,
            y_true=truth,
            y_pred=guess,
            sensitive_features={name: frame[name] for name in names},
        ).by_group
        for group, row in rates.iterrows():
            key = group if isinstance(group, str) else " & ".join(group)
            own = found[" & ".join(names), key]
            for name, value in row.items():
                assert own[name] == pytest.approx(value, abs=1e-12)
            assert own["accuracy"] == pytest.approx(right[group])
            if isinstance(group, str):
                members = np.array(frame[names[0]]) == group
                assert own["examples"] == members.sum()
                losses = torch.nn.functional.cross_entropy(logits, y, reduction="none")
                mean = losses.numpy()[members].mean()
                assert own["loss"] == pytest.approx(mean, rel=1e-12)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 99))
@settings(deadline=None)
def test_sums_of_parts_are_those_of_the_whole(sizes, seed):
    n = sum(sizes)
    logits, y, attributes = people(n, 3, seed)
    which = counting(3, intersections=True, positive=0)
    several = which.of(logits, y, sizes, parted(attributes, sizes)).total()
    whole = which.of(logits, y, [n], [attributes])
    for name in ("group-examples", "group-confusion"):
        np.testing.assert_array_equal(several[name], whole[name])
    np.testing.assert_allclose(several["group-loss"], whole["group-loss"], atol=1e-12)


@given(st.integers(1, 20), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_the_batches_do_not_matter_to_the_last_bit(batch, seed):
    sizes = [7, 0, 11, 1]
    logits, y, attributes = people(sum(sizes), 2, seed)
    which = counting(intersections=True, min_size=2)
    parts = parted(attributes, sizes)
    at_once = which.of(logits.float(), y, sizes, parts)
    adding = which.begin(sizes, parts)
    for k in range(0, len(y), batch):
        adding.add(logits.float()[k : k + batch], y[k : k + batch])
    alone = [
        which.of(logits.float()[e - s : e], y[e - s : e], [s], [p])
        for e, s, p in zip(np.cumsum(sizes), sizes, parts, strict=True)
    ]
    for name in which.parts:
        np.testing.assert_array_equal(adding.sums()[name], at_once[name])
        one = np.concatenate([sums[name] for sums in alone])
        np.testing.assert_array_equal(one, at_once[name])


@pytest.mark.parametrize("task", ["regression", "multi-label", "segmentation"])
def test_tasks_without_classes_have_what_there_is(task):
    torch.manual_seed(0)
    outputs, targets = {
        "regression": (torch.randn(20, 1), torch.randn(20)),
        "multi-label": (torch.randn(20, 3), (torch.rand(20, 3) < 0.5).float()),
        "segmentation": (torch.randn(20, 3, 2, 2), torch.randint(0, 3, (20, 2, 2))),
    }[task]
    _, _, attributes = people(20)
    which = counting(0 if task == "regression" else 3, task)
    rows = one_by_one(which, which.of(outputs, targets, [20], [attributes]))
    women = attributes["sex"] == 0
    row = rows["sex", "f"]
    losses = task_named(task).example_losses(outputs, targets).double().numpy()
    assert row["loss"] == pytest.approx(losses[women].mean())
    assert ("accuracy" in row) == (task != "regression")
    if "accuracy" in row:
        hits = task_named(task).example_hits(outputs, targets).double().numpy()
        assert row["accuracy"] == pytest.approx(hits[women].mean())
    assert "tpr" not in row


def test_what_is_of_no_examples_is_not_defined():
    which = counting()
    y, logits = torch.zeros(3, dtype=torch.long), torch.eye(2)[[0, 1, 0]]
    sums = which.of(logits, y, [3], [{"sex": np.zeros(3), "race": np.array([0, 0, 2])}])
    rows = one_by_one(which, sums)
    women, men = rows["sex", "f"], rows["sex", "m"]
    assert women["positives"] == 0
    assert np.isnan(women["tpr"])
    assert women["fpr"] == pytest.approx(1 / 3)
    assert men["examples"] == 0
    assert all(np.isnan(men[name]) for name in ("accuracy", "loss", "fpr", "tpr"))
    there = {row["group"] for _, row in which.groups.rows(sums)}
    assert there == {"f", "a", "c"}


# ------------------------------------------------------------- groups that are small


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), max_size=40),
    st.integers(1, 8),
    st.booleans(),
)
@settings(deadline=None)
def test_nothing_told_is_of_fewer_examples_than_allowed(rows, least, crossed):
    n = len(rows)
    own = {
        "sex": np.array([a for a, _ in rows]),
        "race": np.array([b for _, b in rows]),
    }
    groups = Groups({"sex": SEX, "race": RACE}, intersections=crossed, min_size=least)
    codes = groups.codes([own], [n])
    families = [list(range(codes.shape[1]))] if crossed else [[0], [1]]
    for tables in families:
        told = codes[:, tables] >= 0
        assert (told.all(1) | ~told.any(1)).all()  # Of all tables or of none.
        # What any sums and differences are made of: the cells, and the rest.
        cells = Counter(map(tuple, codes[told.all(1)][:, tables].tolist()))
        assert all(size >= least for size in cells.values())
        rest = n - sum(cells.values())
        assert rest == 0 or rest >= min(least, n)
    # No more is left out than has to be.
    if least == 1:
        assert (codes >= 0).all()


def test_a_group_that_is_too_small_takes_the_next_one_with_it():
    race = np.repeat([0, 1, 2], [3, 12, 30])
    groups = Groups({"race": RACE}, min_size=10)
    codes = groups.codes([{"race": race}, {"race": race[3:]}], [45, 42])[:, 0]
    # Otherwise 3 = 45 - 12 - 30 could be told.
    assert Counter(codes[:45].tolist()) == {-1: 15, 2: 30}
    assert Counter(codes[45:].tolist()) == {1: 12, 2: 30}


def test_what_stays_with_the_server_is_not_left_out():
    groups = Groups({"sex": SEX}, intersections=True, min_size=10, positive=1)
    assert groups.untold == dataclasses.replace(groups, min_size=1)


# ------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("own", "texts"),
    [
        ({"race": [0, 1]}, ["no attribute 'sex'", "race"]),
        ({"sex": [0, 2], "race": [0, 0]}, ["'sex'", "0 to 1", "f and m", "to 2"]),
        ({"sex": [0, -1], "race": [0, 0]}, ["'sex'", "-1"]),
        ({"sex": [0, 0.5], "race": [0, 0]}, ["'sex'", "codes", "0.5"]),
    ],
)
def test_attributes_that_are_no_codes_are_refused(own, texts):
    which = counting()
    own = {name: np.array(column) for name, column in own.items()}
    with pytest.raises(DataError) as caught:
        which.begin([2], [own])
    assert all(text in str(caught.value) for text in texts), caught.value


def test_groups_that_take_too_much_are_refused():
    with pytest.raises(ConfigurationError, match=r"groups: 5 groups of 1,000 classes"):
        counting(1000)
    with pytest.raises(ConfigurationError, match=r"positive must be in \[0, 1\]"):
        counting(2, positive=2)
    with pytest.raises(ConfigurationError, match="regression has none"):
        counting(0, "regression", positive=1)
    with pytest.raises(ConfigurationError, match=r"min_size must be in \[1, inf"):
        counting(min_size=0)


def test_an_attribute_that_reads_as_two_crossed_is_refused():
    """Its gaps would be taken for those of a crossing, and left out of summaries."""
    with pytest.raises(ConfigurationError, match="'race & sex' must not hold ' & '"):
        Groups({"race & sex": RACE})
    assert Groups({"race&sex": ("a & b", "c")}).labels[0] == ("race&sex", "a & b")


def sent():
    logits, y, attributes = people(30)
    which = counting()
    return which, which.of(logits, y, [30], [attributes])


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("group-examples", lambda x: x + 30),
        ("group-examples", lambda x: -x),
        ("group-confusion", lambda x: x + 1),
        ("group-loss", lambda x: x - 1e3),
        ("group-loss", lambda x: x + 1e18),
    ],
)
def test_sums_that_cannot_be_are_not_believed(part, change):
    which, sums = sent()
    assert not which.read(which.rows(sums).tolist())[1]
    changed = type(sums)({**sums.parts, part: change(sums[part])})
    _, odd = which.read(which.rows(changed).tolist())
    assert set(odd) == {0}
    assert "impossible 'group-" in odd[0]


def test_sums_travel_as_rows():
    which, sums = sent()
    back, _ = which.read(which.rows(sums).tolist())
    for name in which.parts:
        np.testing.assert_array_equal(back[name], sums[name])


def test_equity_scaled():
    assert equity_scaled(0.8, [0.9, 0.7]) == pytest.approx(0.66666667, abs=1e-8)
    assert equity_scaled(0.8, [0.8, 0.8, float("nan")]) == 0.8
    assert equity_scaled(0.0, [0.5]) == 0.0
