"""A data set over clients: nothing lost, nothing twice, nothing copied."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedweight import data
from fedweight.core.errors import ConfigurationError, DataError
from fedweight.data import DataSet, Examples, FederatedData, federate


def dataset(n=200, num_classes=4, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, num_classes, n)
    x = np.arange(n, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    return DataSet(
        "toy",
        Examples(x, y, {"group": np.arange(n) % 3}),
        Examples(x[:5], y[:5]),
        num_classes,
        natural_clients=np.sort(rng.integers(0, 7, n)),
    )


def numbers(examples):
    return examples.x[:, 0].astype(int).tolist()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["iid", "dirichlet", "quantity", "shards"]),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.2, 0.9]),
    st.sampled_from([0.0, 0.02, 0.3]),
)
def test_every_training_example_is_in_exactly_one_place(name, k, held_out, proxy):
    toy = dataset()
    fed = federate(toy, name, k, held_out, proxy, seed=1)
    places = numbers(fed.proxy)
    for i in range(k):
        client = fed.client(i)
        places += numbers(client.train) + numbers(client.held_out)
        for part in (client.train, client.held_out):
            np.testing.assert_array_equal(part.y, toy.train.y[numbers(part)])
            np.testing.assert_array_equal(
                part.attributes["group"], np.array(numbers(part), int) % 3
            )
        total = len(client.train) + len(client.held_out)
        assert len(client.held_out) == min(round(held_out * total), max(total - 1, 0))
        assert fed.sizes[i] == len(client.train)
        np.testing.assert_array_equal(
            fed.label_counts[i], np.bincount(client.train.y, minlength=4)
        )
    assert sorted(places) == list(range(200))
    assert fed.label_counts.dtype == fed.sizes.dtype == np.int64


def test_what_a_client_has_is_a_view():
    fed = federate(dataset(), "iid", 4, proxy=0.0)
    a, b = fed.client(1), fed.client(1)
    assert np.shares_memory(a.train.x, b.train.x)
    assert not a.train.x.flags.owndata
    assert np.shares_memory(a.train.attributes["group"], b.train.attributes["group"])


def test_the_seed_decides_and_nothing_else_draws():
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    a, b, c = (federate(dataset(), num_clients=5, seed=s) for s in (0, 0, 1))
    assert numbers(a.client(2).train) == numbers(b.client(2).train)
    assert numbers(a.client(2).train) != numbers(c.client(2).train)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_tiny_clients():
    fed = FederatedData(
        dataset(), [np.array([], int), np.array([7]), np.array([3, 4])], held_out=0.9
    )
    assert fed.sizes.tolist() == [0, 1, 1]
    assert fed.client(0).train.x.shape == (0, 3)
    assert numbers(fed.client(1).train) == [7]
    assert len(fed.client(2).held_out) == 1


def test_a_proxy_is_taken_out_of_the_clients_parts():
    toy = dataset()
    fed = FederatedData(toy, [np.arange(100), np.arange(100, 200)], proxy=0.1, seed=3)
    kept = set(numbers(fed.proxy))
    assert len(kept) == 20
    for i in range(2):
        mine = fed.client(i)
        assert not kept & {*numbers(mine.train), *numbers(mine.held_out)}


def test_the_proxy_is_balanced_and_leaves_rare_classes():
    labels = np.repeat([0, 1, 2], [500, 480, 20])
    rows = data.take_proxy(labels, 0.06, np.random.default_rng(0))
    assert np.bincount(labels[rows]).tolist() == [20, 20, 10]
    assert (np.diff(rows) > 0).all()
    assert len(data.take_proxy(labels, 0.0, np.random.default_rng(0))) == 0
    tiny = data.take_proxy(labels, 1e-9, np.random.default_rng(0))
    assert np.bincount(labels[tiny]).tolist() == [1, 1, 1]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
)
def test_a_proxy_never_takes_more_than_half_of_a_class(sizes, fraction):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rows = data.take_proxy(labels, fraction, np.random.default_rng(0))
    each = max(1, round(fraction * len(labels) / len(sizes)))
    taken = np.bincount(labels[rows], minlength=len(sizes))
    assert taken.tolist() == [min(each, n // 2) for n in sizes]
    assert len(rows) <= max(fraction * len(labels), len(sizes)) + len(sizes) / 2


def test_natural_clients_keep_their_examples():
    toy = dataset()
    fed = federate(toy, "natural", None, proxy=0.05)
    assert fed.num_clients == 7
    for i in range(7):
        assert set(toy.natural_clients[numbers(fed.client(i).train)]) == {i}
    assert federate(toy, "natural", 3).num_clients == 3


def test_pickles_without_copying_the_arrays_and_works_read_only():
    fed = federate(dataset(5000), num_clients=6)
    buffers = []
    header = pickle.dumps(fed, protocol=5, buffer_callback=buffers.append)
    assert len(header) < 5000
    frozen = [bytes(buffer.raw()) for buffer in buffers]
    back = pickle.loads(header, buffers=frozen)
    assert not back.client(0).train.x.flags.writeable
    for i in range(6):
        assert numbers(back.client(i).train) == numbers(fed.client(i).train)


def test_read_only_data_sets_can_be_federated():
    toy = dataset()
    for array in (toy.train.x, toy.train.y, toy.natural_clients):
        array.setflags(write=False)
    assert federate(toy, num_clients=3).sizes.sum() > 0


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "no client"),
        ([np.array([0, 200])], "example 200, but the training examples are 0 to 199"),
        ([np.array([-1])], "example -1"),
        ([np.array([0, 1]), np.array([1])], "an example twice"),
    ],
)
def test_a_wrong_partition_is_refused(parts, message):
    with pytest.raises(DataError, match=message):
        FederatedData(dataset(), parts)


@pytest.mark.parametrize("option", ["held_out", "proxy"])
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_shares_must_lie_in_range(option, value):
    with pytest.raises(ConfigurationError, match=rf"{option} must be in \[0, 1\)"):
        federate(dataset(), num_clients=2, **{option: value})


def test_there_is_no_client_beyond_the_last():
    fed = federate(dataset(), num_clients=3)
    for i in (-1, 3):
        with pytest.raises(IndexError, match="clients 0 to 2"):
            fed.client(i)


def test_an_edge_device_reads_its_own_files(tmp_path):
    csv = tmp_path / "mine.csv"
    csv.write_text("a,b,site,y\n" + "".join(f"{i},0.5,s,{i % 3}\n" for i in range(10)))
    client = data.load_client(csv, held_out=0.3, seed=1, client="site")
    assert (len(client.train), len(client.held_out)) == (7, 3)
    assert client.train.x.dtype == np.float32
    np.testing.assert_array_equal(client.train.x[:, 0] % 3, client.train.y)

    npz = tmp_path / "mine.npz"
    np.savez(npz, x=np.ones((4, 1, 8, 8)), y=np.array([9, 9, 2, 2]))
    client = data.load_client(str(npz), held_out=0.0)
    assert client.train.y.tolist() == [9, 9, 2, 2]
    assert len(client.held_out) == 0


def test_an_edge_devices_labels_may_be_names(tmp_path):
    csv = tmp_path / "mine.csv"
    csv.write_text("a,y\n1,dog\n2,cat\n3,dog\n")
    client = data.load_client(csv, 0.0, classes=["ant", "cat", "dog"])
    assert client.train.y.tolist() == [2, 1, 2]
    with pytest.raises(DataError, match="Give integer classes"):
        data.load_client(csv, 0.0)
    with pytest.raises(DataError, match="holds 'cat', which is none of 'dog'"):
        data.load_client(csv, 0.0, classes=["dog"])


def test_an_edge_devices_errors(tmp_path):
    csv = tmp_path / "mine.csv"
    csv.write_text("a,y\nred,1\n")
    with pytest.raises(DataError, match="'a' is not numeric"):
        data.load_client(csv)
    with pytest.raises(DataError, match="does not exist"):
        data.load_client(tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"must end in \.csv or \.npz"):
        data.load_client(tmp_path / "mine.txt")
    with pytest.raises(DataError, match=r"no option 'labl'.*'label'"):
        data.load_client(csv, labl="y")


def test_it_says_what_it_holds():
    made = federate(dataset(), "iid", num_clients=3, proxy=0)
    assert repr(made) == (
        f"FederatedData('toy': 3 clients, {made.sizes.sum()} examples to train on, "
        "5 to test, inputs [3], 4 classes, attributes group)"
    )
    x = np.zeros((20, 2), np.float32)
    numbers = Examples(x, x[:, 0])
    own = federate(DataSet("own", numbers, numbers, task="regression"), "iid", 2)
    assert repr(own).endswith("20 to test, inputs [2])")
