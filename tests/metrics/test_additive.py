"""Additive statistics, held against scikit-learn and NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from fedweight.core.errors import ConfigurationError, DataError
from fedweight.metrics import Statistics, Sums, task_named
from fedweight.metrics.sums import segment_sums


def classified(n, classes, seed=0, sharp=1.0):
    """Logits that know something of the labels, and the labels."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), y] += 1.0
    return torch.from_numpy(sharp * logits), torch.from_numpy(y)


def statistics(task="classification", classes=0, *names):
    return Statistics(task_named(task), classes, names or None)


def one(which, outputs, targets, name):
    return which.result(which.of(outputs, targets))[name][0]


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_classification_as_scikit_learn_has_it(classes):
    logits, y = classified(500, classes)
    which = statistics("classification", classes, "macro-f1", "auc", "confusion")
    found = {k: v[0] for k, v in which.result(which.of(logits, y)).items()}
    p, guess = logits.softmax(1).numpy(), logits.argmax(1).numpy()
    assert found["loss"] == pytest.approx(sk.log_loss(y, p), rel=1e-12)
    assert found["accuracy"] == sk.accuracy_score(y, guess)
    assert found["macro-f1"] == pytest.approx(sk.f1_score(y, guess, average="macro"))
    np.testing.assert_array_equal(found["confusion"], sk.confusion_matrix(y, guess))
    area = np.mean([sk.roc_auc_score(y == k, p[:, k]) for k in range(classes)])
    assert abs(found["auc"] - area) <= found["auc-error"] + 1e-12
    assert found["auc-error"] < 0.01


@pytest.mark.parametrize("sharp", [1e-3, 1.0, 30.0])
def test_the_error_of_the_area_holds_for_any_scores(sharp):
    logits, y = classified(2000, 4, seed=1, sharp=sharp)
    which = statistics("classification", 4, "auc")
    found = {k: v[0] for k, v in which.result(which.of(logits, y)).items()}
    area = np.mean(
        [sk.roc_auc_score(y == k, logits.softmax(1)[:, k]) for k in range(4)]
    )
    assert abs(found["auc"] - area) <= found["auc-error"] + 1e-12


def test_f1_leaves_out_classes_that_do_not_occur():
    logits = torch.eye(5)[torch.tensor([0, 0, 2])]
    which = statistics("classification", 5, "macro-f1")
    y = torch.tensor([0, 1, 2])
    wanted = sk.f1_score(y, [0, 0, 2], average="macro", zero_division=0)
    assert one(which, logits, y, "macro-f1") == pytest.approx(wanted)


def test_regression_as_scikit_learn_has_it():
    rng = np.random.default_rng(0)
    y, guess = rng.normal(3, 2, 300), rng.normal(3, 2, 300)
    which = statistics("regression")
    outputs, targets = torch.from_numpy(guess)[:, None], torch.from_numpy(y)
    found = {k: v[0] for k, v in which.result(which.of(outputs, targets)).items()}
    error = sk.mean_squared_error(y, guess)
    assert found["loss"] == pytest.approx(error, rel=1e-12)
    assert found["rmse"] == pytest.approx(math.sqrt(error), rel=1e-12)
    assert found["r2"] == pytest.approx(sk.r2_score(y, guess), rel=1e-9)
    assert "accuracy" not in found


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_r2_of_numbers_far_from_zero(offset):
    y = np.random.default_rng(0).normal(size=400) + offset
    guess = y + 0.1
    which = statistics("regression")
    found = one(which, torch.from_numpy(guess)[:, None], torch.from_numpy(y), "r2")
    assert found == pytest.approx(sk.r2_score(y, guess), abs=1e-15 * (1 + offset) ** 2)


@pytest.mark.parametrize("clients", [1, 1000])
def test_r2_of_many_numbers_far_from_zero(clients):
    rng = np.random.default_rng(0)
    y = rng.normal(2e4, 1, 1_000_000)
    guess = torch.from_numpy(y + rng.normal(0, 0.5, len(y)))[:, None]
    which = statistics("regression")
    sums = which.of(guess, torch.from_numpy(y), [len(y) // clients] * clients)
    found = which.result(sums.total())["r2"][0]
    wanted = 1 - ((guess[:, 0].numpy() - y) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("value", [0.1, 2e4 + 0.1, 1e9 / 3])
def test_r2_of_many_equal_targets_is_not_defined(value):
    which = statistics("regression")
    targets = torch.full((1_000_000,), value, dtype=torch.float64)
    for sizes in ([1_000_000], [1000] * 1000, [999_999, 1]):
        sums = which.of(torch.zeros(len(targets), 1), targets, sizes)
        assert math.isnan(which.result(sums.total())["r2"][0])


def test_r2_of_equal_targets_is_not_defined():
    which = statistics("regression")
    targets = torch.full((50,), 0.1, dtype=torch.float64)
    assert math.isnan(one(which, torch.zeros(50, 1), targets, "r2"))
    assert one(which, torch.zeros(50, 1), targets, "rmse") == pytest.approx(0.1)


def test_labels_as_scikit_learn_has_them():
    rng = np.random.default_rng(0)
    y = (rng.random((200, 4)) < 0.3).astype(np.float32)
    outputs = torch.from_numpy(rng.normal(size=(200, 4)) + y)
    which = statistics("multi-label", 4, "macro-f1", "auc")
    found = {
        k: v[0] for k, v in which.result(which.of(outputs, torch.from_numpy(y))).items()
    }
    guess = (outputs > 0).numpy()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        outputs, torch.from_numpy(y).double()
    )
    assert found["loss"] == pytest.approx(float(loss), rel=1e-12)
    assert found["accuracy"] == pytest.approx((guess == y).mean())
    assert found["macro-f1"] == pytest.approx(sk.f1_score(y, guess, average="macro"))
    area = sk.roc_auc_score(y, outputs, average="macro")
    assert abs(found["auc"] - area) <= found["auc-error"] + 1e-12


def test_segmentation_counts_pixels():
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.integers(0, 3, (6, 8, 8)))
    outputs = torch.from_numpy(rng.normal(size=(6, 3, 8, 8)))
    which = statistics("segmentation", 3)
    found = {k: v[0] for k, v in which.result(which.of(outputs, y)).items()}
    guess = outputs.argmax(1)
    loss = torch.nn.functional.cross_entropy(outputs, y)
    assert found["loss"] == pytest.approx(float(loss), rel=1e-12)
    assert found["accuracy"] == pytest.approx(float((guess == y).double().mean()))
    dice = [
        2
        * int(((guess == k) & (y == k)).sum())
        / int((guess == k).sum() + (y == k).sum())
        for k in (1, 2)
    ]
    assert found["dice"] == pytest.approx(np.mean(dice))


def test_perplexity():
    logits, y = classified(50, 7)
    which = statistics("next-token", 7, "perplexity")
    loss = float(torch.nn.functional.cross_entropy(logits, y))
    assert one(which, logits, y, "perplexity") == pytest.approx(math.exp(loss))


EVERY = [
    ("classification", 4, ("macro-f1", "auc", "confusion")),
    ("multi-label", 4, ("macro-f1", "auc")),
    ("regression", 0, None),
    ("segmentation", 4, ("dice", "macro-f1", "confusion")),
    ("next-token", 4, ("perplexity",)),
]


def drawn(task, n, seed=0):
    """Return outputs and targets of a task, with four classes."""
    rng = np.random.default_rng(seed)
    shape = {"regression": (n, 1), "segmentation": (n, 4, 3, 2)}.get(task, (n, 4))
    outputs = torch.from_numpy(rng.normal(size=shape))
    if task == "regression":
        return outputs, torch.from_numpy(rng.normal(size=n))
    if task == "multi-label":
        return outputs, torch.from_numpy((rng.random((n, 4)) < 0.5).astype(float))
    y = rng.integers(0, 4, (n, 3, 2) if task == "segmentation" else n)
    return outputs, torch.from_numpy(y)


@pytest.mark.parametrize(("task", "classes", "names"), EVERY)
@given(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6), data=st.data())
@settings(max_examples=20, deadline=None)
def test_parts_add_up_to_the_whole(task, classes, names, sizes, data):
    which = Statistics(task_named(task), classes, names)
    outputs, targets = drawn(task, sum(sizes))
    each = which.of(outputs, targets, sizes)
    whole = which.of(outputs, targets)
    order = data.draw(st.permutations(range(len(sizes))))
    mixed = Sums({name: part[order] for name, part in each.parts.items()}).total()
    for name, part in each.total().parts.items():
        assert part.tobytes() == mixed[name].tobytes()
        np.testing.assert_allclose(part, whole[name], rtol=1e-12, atol=1e-12)
    # In batches as they come.
    cut = data.draw(st.integers(0, len(targets)))
    adding = which.begin(sizes)
    adding.add(outputs[:cut], targets[:cut])
    adding.add(outputs[cut:], targets[cut:])
    for name, part in adding.sums().parts.items():
        same(part, each[name])
    # Each client's own, whoever else is there.
    for k, end in enumerate(np.cumsum(sizes)):
        own = slice(end - sizes[k], end)
        alone = which.of(outputs[own], targets[own])
        for name, part in each.parts.items():
            same(part[k], alone[name][0])


def same(one, other):
    """Counts to the bit; of other sums PyTorch rounds a row by the others beside it."""
    if one.dtype == np.int64:
        np.testing.assert_array_equal(one, other)
    else:
        np.testing.assert_allclose(one, other, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("task", "classes", "names"), EVERY)
def test_they_travel_as_a_list_of_numbers(task, classes, names):
    which = Statistics(task_named(task), classes, names)
    sums = which.of(*drawn(task, 10), [3, 0, 7])
    rows = which.rows(sums).tolist()
    assert {len(row) for row in rows} == {which.num_numbers}
    again, odd = which.read(rows)
    assert not odd
    for name, part in sums.parts.items():
        np.testing.assert_array_equal(again[name], part)
        assert again[name].dtype == part.dtype


@pytest.mark.parametrize(("task", "classes", "names"), EVERY)
def test_zero_adds_nothing_and_measures_nothing(task, classes, names):
    which = Statistics(task_named(task), classes, names)
    sums = which.of(*drawn(task, 10), [3, 7])
    for name, part in (sums + which.zero(2)).parts.items():
        np.testing.assert_array_equal(part, sums[name])
    nothing = which.result(which.zero())
    assert all(math.isnan(v[0]) for name, v in nothing.items() if name != "confusion")


@pytest.mark.parametrize(("task", "classes", "names"), EVERY)
def test_of_no_client_there_is_nothing(task, classes, names):
    which = Statistics(task_named(task), classes, names)
    sums, odd = which.read([])
    assert (len(sums), odd) == (0, {})
    assert which.rows(sums).shape == (0, which.num_numbers)
    assert sums.total()["examples"].tolist() == [0]


def changed(row, place, value):
    return [value if k == place else number for k, number in enumerate(row)]


def test_what_cannot_be_is_named_and_counts_for_nothing():
    which = statistics("classification", 3, "macro-f1")
    sums = which.of(*classified(10, 3), [4, 6])
    good, other = which.rows(sums).tolist()
    names = list(which.parts)
    assert names == ["examples", "loss", "hits", "labels"]
    wrong = {
        "examples": changed(good, 0, -1.0),
        "hits": changed(good, 2, 4.5),
        "labels": changed(good, 3, good[3] + 1),  # More true ones than examples.
    }
    for name, row in wrong.items():
        kept, odd = which.read([row, other])
        assert odd == {0: f"its statistics have impossible '{name}'"}
        assert not any(part[0].any() for part in kept.parts.values())
        np.testing.assert_array_equal(kept["labels"][1], sums["labels"][1])
    for row in (None, good[:-1], [*good, 1.0], 3.0, changed(good, 1, math.nan)):
        assert "must be" in which.read([row])[1][0]
    for row in (
        changed(good, 1, "a"),
        changed(good, 1, [1]),
        changed(good, 0, 2.0**60),
    ):
        assert 0 in which.read([row])[1]
    half = changed(good, 3, good[3] + 0.5)
    assert "'labels'" in which.read([half])[1][0]


def test_impossible_squares_and_scores():
    which = statistics("regression")
    row = which.rows(which.of(*drawn("regression", 5))).tolist()[0]
    names = list(which.parts)
    less = changed(row, names.index("squared-targets"), 0.0)
    assert "squared-targets" in which.read([less])[1][0]
    less = changed(row, names.index("squared-error"), -1.0)
    assert "squared-error" in which.read([less])[1][0]
    which = statistics("classification", 3, "auc", "confusion")
    row = which.rows(which.of(*classified(5, 3))).tolist()[0]
    assert list(which.parts)[3:] == ["scores", "confusion"]
    assert "'scores'" in which.read([changed(row, 3, row[3] + 1)])[1][0]
    last = len(row) - 1
    assert "'confusion'" in which.read([changed(row, last, row[last] + 1)])[1][0]


def test_counts_that_wrap_around_are_impossible():
    """2,048 cells of 2**53 add up to 0 modulo 2**64."""
    which = statistics("classification", 50, "confusion")
    row = which.rows(which.of(*classified(5, 50))).tolist()[0]
    first = list(which.parts).index("confusion")
    row[first:] = [2.0**53] * 2048 + [5.0] + [0.0] * (2500 - 2049)
    assert "'confusion'" in which.read([row])[1][0]
    which = statistics("classification", 3000, "macro-f1")
    row = which.rows(which.of(*classified(5, 3000))).tolist()[0]
    own = [2.0**53] * 2048 + [5.0] + [0.0] * (3000 - 2049)
    row[-9000:] = own * 3
    assert "'labels'" in which.read([row])[1][0]
    which = statistics("segmentation", 50, "confusion")
    targets = torch.zeros(5, 1, 1, dtype=torch.long)
    row = which.rows(which.of(torch.zeros(5, 50, 1, 1), targets)).tolist()
    row[0][-2500:] = [2.0**53] * 2500
    assert "'confusion'" in which.read(row)[1][0]


def test_counts_of_many_clients_do_not_wrap_around():
    which = statistics("classification", 2, "confusion")
    row = which.rows(which.zero()).tolist()[0]
    row[0] = row[-1] = row[2] = 2.0**53
    sums, odd = which.read([row] * 2048)
    assert not odd
    assert sums.total()["examples"][0] == 2.0**64
    assert which.result(sums.total())["accuracy"][0] == 1.0


@pytest.mark.parametrize(("task", "classes", "names"), EVERY)
def test_without_examples_there_is_nothing_to_add_up(task, classes, names):
    which = Statistics(task_named(task), classes, names)
    row = which.rows(which.zero()).tolist()[0]
    assert not which.read([row])[1]
    for place in range(1, len(row)):
        found = which.read([changed(row, place, 1.0)])[1]
        assert found == {0: "its statistics are of no examples, but not all 0"}


@pytest.mark.parametrize(
    ("task", "name", "value"),
    [
        ("next-token", "loss", -1e200),
        ("next-token", "loss", -1.0),
        ("next-token", "loss", 1e200),
        ("next-token", "loss", 5.1e15),
        ("regression", "loss", 1e299),
        ("regression", "squared-error", 1e299),
        ("regression", "targets", -5.1e15),
        ("regression", "squared-targets", 5.1e30),
    ],
)
def test_sums_have_limits(task, name, value):
    which = statistics(task, 4, *(["perplexity"] if task == "next-token" else []))
    row = which.rows(which.of(*drawn(task, 5))).tolist()[0]
    odd = changed(row, list(which.parts).index(name), value)
    assert which.read([odd])[1] == {0: f"its statistics have impossible '{name}'"}


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e12])
def test_numbers_of_any_size_are_believed(scale):
    which = statistics("regression")
    outputs, targets = drawn("regression", 50)
    assert not which.read(
        which.rows(which.of(outputs * scale, targets * scale)).tolist()
    )[1]


def test_a_loss_that_rounding_makes_negative_is_believed():
    which = statistics("multi-label", 1)
    row = which.rows(which.of(torch.full((9, 1), 20.0), torch.ones(9, 1))).tolist()[0]
    assert not which.read([changed(row, 1, 9 * -1e-6)])[1]
    assert which.read([changed(row, 1, 9 * -1e-3)])[1]


@pytest.mark.parametrize("name", ["labels", "confusion"])
def test_there_are_no_more_pixels_than_images_have(name):
    task, metric = task_named("segmentation"), {"labels": "dice"}.get(name, name)
    which = Statistics(task, 4, [metric], pixels=6)
    row = which.rows(which.of(*drawn("segmentation", 10))).tolist()[0]
    assert not which.read([row])[1]
    first = list(which.parts).index(name)
    more = [1e13 * value if k >= first else value for k, value in enumerate(row)]
    assert f"'{name}'" in which.read([more])[1][0]
    assert not Statistics(task, 4, [metric]).read([more])[1]
    with pytest.raises(ConfigurationError, match="pixels"):
        Statistics(task, 4, pixels=0)


def test_targets_out_of_range_are_refused():
    which = statistics("classification", 3, "macro-f1")
    with pytest.raises(DataError, match=r"from 0 to 3, but classification has 0 to 2"):
        which.of(torch.zeros(2, 4), torch.tensor([0, 3]))
    which = statistics("multi-label", 2)
    with pytest.raises(DataError, match="0 to 1"):
        which.of(torch.zeros(2, 2), torch.tensor([[0.0, 2.0], [0.0, 0.0]]))


def test_what_a_task_does_not_offer_is_refused():
    with pytest.raises(ConfigurationError, match="regression has no 'macro-f1'"):
        statistics("regression", 0, "macro-f1")
    with pytest.raises(ConfigurationError, match="Did you mean 'macro-f1'"):
        statistics("classification", 3, "macro-f11")
    with pytest.raises(ConfigurationError, match="at most 1,000,000"):
        statistics("classification", 2000, "confusion")
    with pytest.raises(ConfigurationError, match="Did you mean 'regression'"):
        task_named("regresion")


@given(st.lists(st.integers(0, 300), min_size=1, max_size=30), st.integers(0, 99))
@settings(deadline=None)
def test_sums_of_segments_are_numpys_to_the_bit(sizes, seed):
    values = np.random.default_rng(seed).normal(size=(2, sum(sizes)))
    found = segment_sums(values, np.array(sizes))
    for own, sums in zip(values, found, strict=True):
        parts = np.split(own, np.cumsum(sizes)[:-1])
        assert sums.tolist() == [part.sum() for part in parts]


def test_an_announced_number_of_examples_must_come():
    adding = statistics("regression").begin([3])
    adding.add(*drawn("regression", 2))
    with pytest.raises(ConfigurationError, match="3 examples were announced, and 2"):
        adding.sums()
