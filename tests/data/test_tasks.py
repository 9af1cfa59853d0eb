"""What examples of each task have: cast, checked, counted; and the drawn shapes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedweight.core.errors import ConfigurationError, DataError
from fedweight.data import DataSet, Examples, check, federate, load, notes
from fedweight.data.shapes import _inside
from fedweight.data.tasks import TASKS, task_named
from fedweight.metrics.measures import MEASURES

IMAGES = np.zeros((6, 1, 4, 4), np.float32)


def masked(y, classes=3, x=IMAGES):
    examples = Examples(x, y)
    return check(DataSet("own", examples, examples, classes, task="segmentation"))


def labelled(y, labels=3, x=None):
    x = np.zeros((len(y), 2), np.float32) if x is None else x
    examples = Examples(x, y)
    return check(DataSet("own", examples, examples, labels, task="multi-label"))


@pytest.mark.parametrize("name", TASKS)
def test_a_task_offers_what_there_is(name):
    task = task_named(name)
    assert set(task.metrics) <= set(task.offered) <= set(MEASURES)
    assert task.score in ("", "accuracy", *task.offered)
    assert bool(task.least_classes) or not task.has_classes


@given(
    y=arrays.arrays(
        st.sampled_from([np.uint8, np.int32, np.float64, np.int64]),
        (6, 4, 4),
        elements=st.integers(0, 2),
    ),
    channel=st.booleans(),
)
def test_masks_become_int64(y, channel):
    given_ = y[:, None] if channel else y
    found = masked(given_).train.y
    assert found.dtype == np.int64
    assert (found == y).all()


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.zeros((6, 4, 5), int), r"images of shape \[1, 4, 4\] have masks of shape"),
        (np.full((6, 4, 4), 255), "labels reach from 255 to 255, but 3 classes"),
        (np.full((6, 4, 4), -1), "labels reach from -1 to -1, but 3 classes"),
        (np.full((6, 4, 4), 0.5), r"no whole numbers. Give integer .* \(y > 0.5\)"),
        (np.zeros((6, 3, 4, 4)), "y.argmax"),
        (np.zeros(6, int), r"the class of each pixel from 0, of shape \[n, h, w\]"),
        (np.full((6, 4, 4), "a"), "Give integer classes from 0"),
    ],
)
def test_masks_that_are_none(y, message):
    with pytest.raises(DataError, match=message):
        masked(y)


def test_masks_need_images_and_two_classes():
    y = np.zeros((6, 4, 4), int)
    with pytest.raises(DataError, match="num_classes must be a whole number from 2"):
        masked(y, 1)
    with pytest.raises(DataError, match=r"Give images \[n, c, h, w\]"):
        masked(y, x=np.zeros((6, 4, 4), np.float32))


def test_training_and_test_have_targets_of_one_shape():
    x, y = np.zeros((2, 3), np.float32), np.zeros((2, 3))
    with pytest.raises(DataError, match=r"labels have shape \(3,\) in the training"):
        check(
            DataSet("own", Examples(x, y), Examples(x, y[:, :2]), 3, task="multi-label")
        )


@given(arrays.arrays(bool, (5, 3)), st.sampled_from([bool, int, np.float64, np.uint8]))
def test_labels_become_numbers_of_the_models_type(y, kind):
    found = labelled(y.astype(kind)).train
    assert found.y.dtype == np.float32
    assert (found.y == y).all()
    assert found.cast(np.float64, task="multi-label").y.dtype == np.float64


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.array([[0.0, 1.0, 2.0]]), "and hold 2. Give 1 where a label holds, else 0"),
        (np.array([[0.0, 1.0, np.nan]]), "and hold nan"),
        (np.array([0, 1]), r"of shape \[n, L\]: y\[:, None\] of one label"),
        (np.array([["a", "b", "c"]]), "Give 0 or 1 for each example and label"),
        (np.array([[0, 1]]), "num_classes is 3. Give a column for each label"),
    ],
)
def test_labels_that_are_none(y, message):
    with pytest.raises(DataError, match=message):
        labelled(y)


def test_one_label_is_enough():
    assert labelled(np.array([[1], [0]]), 1).train.y.shape == (2, 1)


@given(arrays.arrays(np.int64, (6, 4, 4), elements=st.integers(0, 2)))
def test_images_with_a_class_are_counted(y):
    data = federate(masked(y), "iid", 2, proxy=0.0, held_out=0.0)
    counts = data.label_counts
    assert counts.sum(0).tolist() == [int((y == c).any((1, 2)).sum()) for c in range(3)]
    train, held_out, own = data.described(0)
    assert (train, held_out) == (3, 0)
    assert own.tolist() == counts[0].tolist()
    assert TASKS["segmentation"].guessed(y) == np.bincount(y.ravel()).max() / y.size


def test_examples_with_a_label_are_counted():
    y = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 1, 0]])
    data = federate(labelled(y), "iid", 1, proxy=0.0, held_out=0.0)
    assert data.label_counts.tolist() == [[3, 3, 0]]
    assert data.described(0)[0] == 4
    assert TASKS["multi-label"].guessed(y) == pytest.approx((0.75 + 0.75 + 1) / 3)
    assert notes(data) == ["1 of 3 classes have no training example: 2"]


SKEWED = ("classes", "dirichlet", "dirichlet-sampled", "niid2", "shards")


@pytest.mark.parametrize("name", SKEWED)
@pytest.mark.parametrize(
    ("dataset", "why"),
    [
        (labelled(np.eye(3)), "have any number of labels each"),
        (masked(np.zeros((6, 4, 4), int)), "have one for each pixel"),
    ],
)
def test_partitions_by_class_are_refused(name, dataset, why):
    with pytest.raises(ConfigurationError, match=f"{why}.*Take one of attribute, iid"):
        federate(dataset, name, 2)


@pytest.mark.parametrize("name", ["iid", "quantity"])
def test_other_partitions_give_each_example_to_one_client(name):
    dataset = labelled(np.eye(3)[np.arange(30) % 3])
    data = federate(dataset, name, 4, proxy=0.1)
    assert sum(data.sizes) + sum(len(data.client(k).held_out) for k in range(4)) == 27
    assert len(data.proxy) == 3


def test_groups_skew_labels_and_do_not_count_them():
    y = np.eye(3)[np.arange(30) % 3]
    examples = Examples(np.zeros((30, 2)), y, {"sex": np.arange(30) % 2})
    names = {"sex": ("f", "m")}
    dataset = check(
        DataSet("own", examples, examples, 3, attribute_names=names, task="multi-label")
    )
    data = federate(dataset, "attribute", 2, attribute="sex", strength=1.0, proxy=0.0)
    groups = [set(data.client(k).train.attributes["sex"].tolist()) for k in range(2)]
    assert groups in ([{0}, {1}], [{1}, {0}])
    with pytest.raises(ConfigurationError, match="have any number of labels each"):
        federate(dataset, "attribute", 2, attribute="sex", skewed="labels-by-group")


# ------------------------------------------------------------------------- the shapes


def test_shapes_are_the_same_whatever_the_run():
    one, other = load("shapes", seed=0), load("shapes", seed=7)
    assert one.train.x.tobytes() == other.train.x.tobytes()
    assert one.train.y.sum() == 237251  # Golden: PCG64's streams are NumPy's promise.
    assert one.train.x.sum(dtype=np.float64) == pytest.approx(102117.8732, abs=0.5)
    assert one.train.x.std() > 0.3
    drawn = load("shapes", draw=1)
    assert (drawn.train.y != one.train.y).any()


def test_sites_have_sizes_and_names():
    data = load("shapes", images=100, test_images=13, size=16, sites=4, size_ratio=8.0)
    sizes = np.bincount(data.natural_clients)
    assert sizes.sum() == 100
    assert 6 <= sizes[0] / sizes[-1] <= 10
    assert (np.diff(sizes) <= 0).all()
    assert data.natural_names == ("site-0", "site-1", "site-2", "site-3")
    assert data.test.x.shape == (13, 1, 16, 16)
    assert data.attribute_names["scanner"] == ("new", "old")
    federated = federate(data, "natural", None)
    assert federated.names == data.natural_names
    assert load("shapes", images=5, test_images=0, sites=2).test.y.shape[0] == 0


def test_a_site_is_what_it_is_among_few_and_many():
    few = load("shapes", images=20, sites=2, size_ratio=1.0)
    many = load("shapes", images=50, sites=5, size_ratio=1.0)
    assert few.train.x.tobytes() == many.train.x[:20].tobytes()


def test_alike_sites_differ_in_nothing():
    even = load("shapes", heterogeneity=0.0, images=1200, sites=3)
    owners = even.natural_clients
    means = [even.train.x[owners == k].mean() for k in range(3)]
    assert np.ptp(means) < 0.02
    odd = load("shapes", heterogeneity=1.0, images=1200, sites=3)
    assert np.ptp([odd.train.x[owners == k].mean() for k in range(3)]) > 0.1


def test_old_scanners_are_noisier():
    data = load("shapes", heterogeneity=0.0)
    background = np.where(data.train.y == 0, data.train.x[:, 0], np.nan)
    old = data.train.attributes["scanner"] == 1
    noise = [np.nanstd(background[rows]) for rows in (~old, old)]
    assert noise == pytest.approx([0.1, 0.2], rel=0.02)


@pytest.mark.parametrize("code", [1, 2, 3])
def test_shapes_of_one_reach_have_one_area(code):
    rng = np.random.default_rng(0)
    inside = _inside(rng, np.full(40, code), 40, 200)
    # Reaches are drawn the same for each class; corners may be cut off at the edge.
    rng = np.random.default_rng(0)
    area = np.pi * rng.uniform(0.12, 0.25, 40) ** 2
    found = inside.mean((1, 2))
    whole = ~(inside[:, 0].any(1) | inside[:, -1].any(1))
    whole &= ~(inside[:, :, 0].any(1) | inside[:, :, -1].any(1))
    assert whole.sum() > 20
    assert found[whole] == pytest.approx(area[whole], rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 4}, "size must be in"),
        ({"heterogeneity": 2.0}, r"heterogeneity must be in \[0, 1\]"),
        ({"images": 10**6, "size": 1024}, "images of 1024 by 1024 pixels"),
        ({"side": 4}, "side"),
    ],
)
def test_shapes_that_cannot_be_drawn(options, message):
    with pytest.raises((DataError, ConfigurationError), match=message):
        load("shapes", **options)
