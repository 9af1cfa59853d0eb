"""What comes from Python: cast where it is certain, refused with a call where not."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from fedweight import data
from fedweight.core.errors import DataError
from fedweight.core.layout import as_tensor
from fedweight.data import ClientData, DataSet, Examples
from fedweight.data.examples import channels_last, name_clients
from fedweight.data.targets import as_labels

X = np.arange(12, dtype=np.float32).reshape(6, 2)
Y = np.array([0, 1, 0, 1, 2, 2])


def dataset(x=X, y=Y, num_classes=3, **more):
    part = Examples(x, y)
    return DataSet("own", part, part, num_classes, **more)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (X.astype(np.float64), Y),
        (X.astype(np.float16), Y),
        (X.astype(">f4"), Y.astype(">i8")),
        (X.tolist(), Y.tolist()),
        (pd.DataFrame(X), pd.Series(Y)),
        (pd.DataFrame(X.astype(int)).astype(float), pd.Series(Y, dtype="int8")),
        (torch.from_numpy(X), torch.from_numpy(Y)),
        (np.asfortranarray(X), Y),
        (X[::-1][::-1], Y[::-1][::-1]),
        (X, Y.astype(np.int32)),
        (X, Y.astype(np.uint8)),
        (X, Y.astype(float)),
        (X, Y[:, None]),
        (np.repeat(X, 2, axis=0)[::2], np.repeat(Y, 2)[::2]),
        (np.ma.masked_array(X), Y),
        (X.view(np.matrix), Y),
    ],
    ids=range(16),
)
def test_what_is_certain_is_cast(x, y):
    own = data.check(dataset(x, y))
    for part in (own.train, own.test):
        assert (part.x.dtype, part.y.dtype) == (np.float32, np.int64)
        assert type(part.x) is np.ndarray
        np.testing.assert_array_equal(part.x, X)
        np.testing.assert_array_equal(part.y, Y)
        as_tensor(part.x)  # refuses negative strides and foreign byte orders


def test_what_fits_is_not_copied():
    own = dataset()
    assert data.check(own) is own
    tokens = dataset(np.ones((6, 4), np.int64))
    assert data.check(tokens) is tokens


def test_mirrored_arrays_become_ones_that_torch_takes():
    own = data.check(dataset(X[:, ::-1], Y[::-1]))
    np.testing.assert_array_equal(own.train.x, X[:, ::-1])
    assert min(own.train.x.strides) > 0
    assert min(own.train.y.strides) > 0


def test_flags_are_numbers_and_whole_numbers_tokens():
    assert data.check(dataset(X > 3)).train.x.dtype == np.float32
    for dtype in (np.int32, np.uint16, np.uint8, np.int8):
        assert data.check(dataset(X.astype(dtype))).train.x.dtype == np.int64


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((6, 8, 8), np.uint8), Y, r"x.astype\(numpy.float32\) / 255"),
        (X.astype(str), Y, "train: inputs are <U.*pandas.get_dummies"),
        (pd.DataFrame({"a": list("abcdef")}), Y, "inputs are .*'a'.*get_dummies"),
        (X.astype(complex), Y, "inputs are complex128"),
        (X.astype("datetime64[s]"), Y, "inputs are datetime64"),
        (X.astype(np.float64) * 1e300, Y, "beyond what float32 holds. Divide"),
        (X + np.nan, Y, "example 0 holds NaN"),
        (X, Y + 0.5, "set task = 'regression'"),
        (X, Y * np.nan, "set task = 'regression'"),
        (X, np.eye(3)[Y], r"y.argmax\(axis=1\)"),
        (X, np.zeros((6, 2)), "of shape .6, 2.. Give class numbers"),
        (X, list("abcabc"), r"such as 'a'.*numpy.unique\(y, return_inverse=True\)"),
        (X, Y.astype(np.uint64) + np.uint64(2**63), "uint64 up to"),
        (X, Y * 1e300, "float64 up to"),
        (X, Y - 1, "labels reach from -1 to 1, but 3 classes allow 0 to 2"),
        (X, Y.astype(complex), "labels are complex128"),
    ],
    ids=range(16),
)
def test_what_is_not_certain_is_refused_with_the_call_that_mends_it(x, y, message):
    with pytest.raises(DataError, match=message) as caught:
        data.check(dataset(x, y))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([[1, 2], [3]], "'x' cannot be made an array"),
        (np.ma.masked_array(X, X > 3), "'x' has masked values"),
        (3, "'x' is 3. Give an array"),
        (X[:3], "'x' has 3 rows, but there are 6 labels"),
        (torch.ones(6, 2, requires_grad=True), "'x' cannot be made an array"),
    ],
)
def test_what_is_no_array_of_rows(x, message):
    with pytest.raises(DataError, match=message):
        Examples(x, Y)


def test_side_data_may_be_lists():
    own = Examples(X, Y, {"age": [1, 2, 3, 4, 5, 6], "sex": pd.Series(list("abcabc"))})
    assert own.take(np.array([0, 2])).attributes["age"].tolist() == [1, 3]
    with pytest.raises(DataError, match="'age' has 2 rows"):
        Examples(X, Y, {"age": [1, 2]})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_classes": 0}, "num_classes must be a whole number from 1, got 0"),
        ({"num_classes": 3.0}, "num_classes must be a whole number"),
        ({"num_classes": "3"}, "num_classes must be a whole number"),
        ({"num_classes": 10**6}, r"1,000,000 classes; at most 100,000.*numpy.unique"),
        ({"class_names": ("a", "b")}, "class_names are 2 for 3 classes"),
        ({"natural_clients": Y[:3]}, "natural_clients has 3 entries for 6"),
        ({"natural_clients": Y + np.nan}, "a client is NaN"),
        ({"natural_names": ("a",)}, "natural_names but no natural_clients"),
        ({"natural_clients": Y, "natural_names": ("a", "b")}, "reach from 0 to 2, but"),
        ({"natural_clients": Y, "natural_names": ("a", "a", "b")}, "a name twice"),
        ({"natural_clients": Y, "natural_sizes": np.ones(2)}, "natural_sizes has 2"),
    ],
)
def test_what_a_data_set_says_of_itself_is_checked(more, message):
    with pytest.raises(DataError, match=message):
        data.check(dataset(**more))


def test_an_empty_test_set_may_be_empty_of_anything():
    own = DataSet("own", Examples(X, Y), Examples([], []), 3)
    assert data.check(own).test.x.shape == (0, 2)


def test_natural_clients_are_numbered_by_their_names():
    own = data.check(dataset(natural_clients=np.array([40, 7, 40, 7, 9, 9])))
    assert own.natural_clients.tolist() == [2, 0, 2, 0, 1, 1]
    assert own.natural_names == ("7", "9", "40")
    own = data.check(dataset(natural_clients=np.array([*"zazabb"])))
    assert own.natural_names == ("a", "b", "z")
    own = data.check(dataset(natural_clients=Y))
    assert own.natural_names == ()
    assert own.natural_clients.tolist() == Y.tolist()


def test_clients_may_be_called_anything():
    names, numbers = name_clients(np.array([b"b", b"\xff"]))
    assert names == ("b", "\ufffd")
    assert numbers.tolist() == [0, 1]
    assert name_clients(np.array([1.5, 1.0]))[0] == ("1.0", "1.5")
    with pytest.raises(DataError, match="clients are complex128"):
        name_clients(np.array([1j]))


def test_casting_for_a_model_of_doubles():
    client = ClientData(Examples(X.tolist(), Y), Examples([], [])).cast(np.float64)
    assert client.train.x.dtype == np.float64
    assert Examples(X, Y).cast(np.float64).x.dtype == np.float64
    assert len(client.held_out) == 0


def test_labels_are_not_rounded():
    with pytest.raises(DataError, match="regression"):
        as_labels("labels are", np.array([0.0, 1e-9]))


@pytest.mark.parametrize(
    ("shape", "last"),
    [
        ((28, 28, 1), True),
        ((32, 48, 3), True),
        ((64, 64, 4), True),
        ((3, 32, 32), False),
        ((1, 28, 28), False),
        ((16, 4, 4), False),
        ((30,), False),
        ((3, 32, 3), False),
    ],
)
def test_images_whose_channels_come_last(shape, last):
    assert channels_last(shape) is last


# -------------------------------------------------------------------------------- npz


def npz(tmp_path, **arrays):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays)
    return path


def test_arrays_of_a_file_are_cast_likewise(tmp_path):
    for x, y in ((X.astype(np.float64), Y.astype(float)), (X > 3, Y[:, None])):
        own = data.load("npz", npz(tmp_path, x=x, y=y), test_fraction=0.0)
        assert own.train.x.dtype == np.float32
        assert own.train.y.tolist() == Y.tolist()
    client = data.load_client(npz(tmp_path, x=X.astype(np.float64), y=Y * 1.0), 0.0)
    assert (client.train.x.dtype, client.train.y.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": list("abcabc")}, r"'y' is <U1.*numpy.unique"),
        ({"y": np.eye(3)[Y]}, r"'y' is float64.*y.argmax"),
        ({"x": np.zeros((6, 8, 8), np.uint8)}, "'x' is uint8.*/ 255"),
        (
            {"y": np.array([0, 5, 10**6] * 2)},
            "'y' reaches 1000000, but 3 classes occur",
        ),
        ({"client": np.float64(3)}, "'client' has 1 rows"),
        ({"client": np.array([1, np.nan] * 3)}, "a client is NaN"),
        ({"y": np.int64(3)}, "'x' has 6 rows and 'y' has 1"),
    ],
)
def test_arrays_of_a_file_are_refused_likewise(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        data.load("npz", npz(tmp_path, **{"x": X, "y": Y, **arrays}))


def test_classes_that_do_not_occur_may_be_said_to_be_there(tmp_path):
    path = npz(tmp_path, x=X, y=np.array([0, 5, 20_000] * 2))
    with pytest.raises(DataError, match="set num-classes = 20001"):
        data.load("npz", path)
    assert data.load("npz", path, num_classes=20_001).num_classes == 20_001
    few = npz(tmp_path, x=X, y=np.array([0, 2, 10] * 2))
    assert data.load("npz", few).num_classes == 11


@pytest.mark.parametrize("cut", [30, 200, -4])
def test_a_file_of_arrays_that_is_cut_is_told(tmp_path, cut):
    path = npz(tmp_path, x=X, y=Y)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match="cannot be read as an NPZ file"):
        data.load("npz", path)


def test_a_file_of_arrays_that_claims_too_much_is_told(tmp_path):
    import io
    import zipfile

    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "<f8", "fortran_order": False, "shape": (10**13, 4)}
    )
    path = tmp_path / "own.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.npy", head.getvalue())
    with pytest.raises(DataError, match="cannot be read as an NPZ file"):
        data.load("npz", path)
