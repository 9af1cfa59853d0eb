"""The loaders, on small files written here; on real data where they are at hand."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from fedweight import data
from fedweight.core.errors import ConfigurationError, DataError
from fedweight.data import DataSet, Examples, adult, fashion_mnist, shakespeare


@pytest.fixture(autouse=True)
def nothing_at_home(request, tmp_path, monkeypatch):
    if "real_data" not in request.fixturenames:
        monkeypatch.setenv("FEDWEIGHT_DATA", str(tmp_path / "home"))
        monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDER", tmp_path / "system")


@pytest.fixture
def real_data():
    folder = os.environ.get("FEDWEIGHT_DATA")
    if not folder:
        pytest.skip("FEDWEIGHT_DATA does not name a folder with the real data sets")
    return Path(folder)


# ------------------------------------------------------------------------- digits


def test_digits():
    digits = data.load("digits")
    assert (len(digits.train), len(digits.test)) == (1438, 359)
    assert digits.input_shape == (1, 8, 8)
    assert digits.train.x.min() == 0
    assert digits.train.x.max() == 1
    assert set(np.bincount(digits.test.y)) <= {34, 35, 36, 37}


def test_the_test_set_of_digits_does_not_move_with_the_seed():
    a, b = data.load("digits", seed=0), data.load("digits", seed=1)
    np.testing.assert_array_equal(a.test.x, b.test.x)


# ------------------------------------------------------------------ fashion-mnist


def idx(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_fashion(folder, packed=True, side=28):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", 30), ("t10k", 10)):
        images = rng.integers(0, 256, (n, side, side))
        for name, array in (
            (f"{part}-images-idx3-ubyte", images),
            (f"{part}-labels-idx1-ubyte", np.arange(n) % 10),
        ):
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))
    return folder


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist(tmp_path, packed):
    fashion = data.load("fashion-mnist", write_fashion(tmp_path / "f", packed))
    assert fashion.train.x.shape == (30, 1, 28, 28)
    assert fashion.train.x.dtype == np.float32
    assert fashion.test.y.tolist() == list(range(10))
    pixels = np.random.default_rng(0).integers(0, 256, (30, 28, 28))
    expected = (pixels / 255 - 0.2860) / 0.3530
    np.testing.assert_allclose(fashion.train.x[:, 0], expected, atol=1e-5)


def test_the_first_images_of_fashion_mnist(tmp_path):
    folder = write_fashion(tmp_path / "f")
    every = data.load("fashion-mnist", folder)
    some = data.load("fashion-mnist", folder, examples=7)
    np.testing.assert_array_equal(some.train.x, every.train.x[:7])
    np.testing.assert_array_equal(some.train.y, every.train.y[:7])
    assert len(some.test) == len(every.test)
    with pytest.raises(DataError, match=r"examples must be in \[1, "):
        data.load("fashion-mnist", folder, examples=0)


def test_fashion_mnist_is_found_at_home_and_in_the_system(tmp_path):
    with pytest.raises(DataError, match="'fedweight data fashion-mnist' fetches it"):
        data.load("fashion-mnist")
    write_fashion(tmp_path / "system")
    assert len(data.load("fashion-mnist").train) == 30
    (tmp_path / "home" / "fashion-mnist").mkdir(parents=True)
    with pytest.raises(DataError, match="home/fashion-mnist has no 'train-images"):
        data.load("fashion-mnist")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "cannot be read"),
        (gzip.compress(idx(np.zeros((3, 28, 28))), mtime=0)[:-9], "cannot be read"),
        (
            gzip.compress(b"\0\0\x0d\3" + bytes(99), mtime=0),
            "not an IDX file of bytes with 3",
        ),
        (gzip.compress(idx(np.zeros((3, 28, 28)))[:-1], mtime=0), "holds 2351 values"),
        (gzip.compress(b"\0\0\x08\3", mtime=0), "cannot be read|holds"),
        (
            gzip.compress(idx(np.zeros((30, 14, 14))), mtime=0),
            r"are \(14, 14\), expected",
        ),
        (
            gzip.compress(idx(np.zeros((3, 28, 28))), mtime=0),
            "'x' has 3 rows.* 30 labels",
        ),
    ],
)
def test_a_broken_idx_file_is_named(tmp_path, content, message):
    folder = write_fashion(tmp_path / "f")
    (folder / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        data.load("fashion-mnist", folder)


# -------------------------------------------------------------------------- adult

ADULT_TRAIN = """\
39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, \
White, Male, 2174, 0, 40, United-States, <=50K
50, ?, 83311, Bachelors, 13, Married-civ-spouse, ?, Husband, Black, Male, 0, 0, 13, \
United-States, >50K
28, Private, 338409, Masters, 14, Married-civ-spouse, Sales, Wife, White, Female, 0, \
0, 40, ?, <=50K

"""
ADULT_TEST = """\
|1x3 Cross validator
66, Private, 226802, 11th, 7, Never-married, Sales, Own-child, White, Female, 0, 0, \
40, Cuba, >50K.

"""


def write_adult(folder, train=ADULT_TRAIN, test=ADULT_TEST):
    folder.mkdir()
    (folder / "adult.data").write_text(train)
    (folder / "adult.test").write_text(test)
    return folder


def test_adult(tmp_path):
    census = data.load("adult", write_adult(tmp_path / "a"))
    assert census.train.y.tolist() == [0, 1, 0]
    assert census.test.y.tolist() == [1]
    assert census.attribute_names["sex"] == ("Female", "Male")
    assert census.train.attributes["sex"].tolist() == [1, 1, 0]
    assert census.train.attributes["race"].tolist() == [1, 0, 1]
    assert census.train.attributes["age"].tolist() == [39, 50, 28]
    groups = census.attribute_names["age-group"]
    assert [groups[g] for g in census.train.attributes["age-group"]] == [
        *("35-44", "45-54", "25-34")
    ]
    assert groups[census.test.attributes["age-group"][0]] == "65 and over"
    ages = census.train.x[:, 0]
    assert ages.mean() == pytest.approx(0, abs=1e-6)
    assert ages.std() == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(census.train.x[:, 1:4], [[0, 0, 1], *np.eye(3)[:2]])
    assert census.train.x.shape[1] == 6 + 3 + 2 + 2 + 3 + 3 + 2 + 2 + 2
    assert (census.test.x[0, -2:] == 0).all()


def test_clients_of_adult_by_a_column(tmp_path):
    folder = write_adult(tmp_path / "a")
    plain = data.load("adult", folder)
    census = data.load("adult", folder, client="occupation")
    assert plain.natural_clients is None
    column = [line.split(", ")[6] for line in ADULT_TRAIN.strip().splitlines()]
    names = census.natural_names
    assert names == tuple(sorted(set(column)))
    assert [names[k] for k in census.natural_clients] == column
    np.testing.assert_array_equal(census.train.x, plain.train.x)
    with pytest.raises(DataError, match="occupation"):
        data.load("adult", folder, client="ocupation")


def test_adult_without_sensitive_features_keeps_the_attributes(tmp_path):
    folder = write_adult(tmp_path / "a")
    full = data.load("adult", folder)
    blind = data.load("adult", folder, sensitive_features=False)
    assert blind.input_shape[0] == full.input_shape[0] - 1 - 2 - 2
    assert set(blind.train.attributes) == {"age", "age-group", "race", "sex"}


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (ADULT_TRAIN.replace("<=50K", "poor"), "'<=50K' or '>50K', but there is 'poor"),
        (ADULT_TRAIN.replace("39,", "old,"), "not a table of 15 columns"),
        (ADULT_TRAIN.replace("39,", "1, 39,"), "not a table of 15 columns"),
        (ADULT_TRAIN.replace("39,", "1e400,"), "a number is infinite"),
        ("39, x\n", "not a table of 15 columns"),
    ],
)
def test_a_broken_adult_file_is_named(tmp_path, train, message):
    with pytest.raises(DataError, match=rf"adult\.data.*{message}"):
        data.load("adult", write_adult(tmp_path / "a", train))


def test_a_missing_adult_file_is_named(tmp_path):
    folder = write_adult(tmp_path / "a")
    (folder / "adult.test").unlink()
    with pytest.raises(DataError, match=r"adult\.test does not exist.*fetches"):
        data.load("adult", folder)


def test_adult_columns_are_those_of_the_file():
    assert len(adult.COLUMNS) == 15
    assert set(adult.NUMERIC) | set(adult.SENSITIVE) < set(adult.COLUMNS)


# -------------------------------------------------------------------- shakespeare

PLAY = """\
A PLAY

PERSONS.

ACT I.
Not a speech.

Ber.
Who's there?

Fran.
Nay, answer me: stand, and unfold yourself.

[Enter a ghost.]

Ber.
Long live the king!

Once.
I speak but once.

Fran.
Bernardo?

Ber.
He.
Indeed.
"""


def write_plays(folder):
    folder.mkdir()
    (folder / "a.txt").write_text(PLAY)
    (folder / "b.txt").write_bytes(
        PLAY.replace("king", "qu\u00e9en").replace("\n", "\r\n").encode("latin-1")
    )
    (folder / "poem.txt").write_text("Beauty, truth, and rarity.\n\nGrace.\n")
    return folder


def text_of(tokens):
    return "".join("\0" if t == 0 else shakespeare.VOCABULARY[t - 1] for t in tokens)


def test_shakespeare(tmp_path):
    plays = data.load("shakespeare", write_plays(tmp_path / "s"), sequence_length=5)
    assert plays.num_classes == 1 + len(shakespeare.VOCABULARY)
    assert plays.train.x.shape[1:] == (5,)
    assert plays.train.x.dtype == np.int64
    assert set(plays.natural_clients) == {0, 1, 2, 3}
    mine = plays.train.take(plays.natural_clients == 0)
    read = "".join(text_of(x) for x in mine.x)
    assert read.strip("\0") in "Who's there?\nLong live the king!"
    assert plays.class_names[mine.y[0]] == "W"


def test_shakespeare_tests_on_what_is_said_later(tmp_path):
    plays = data.load(
        "shakespeare", write_plays(tmp_path / "s"), sequence_length=4, stride=1
    )
    mine = plays.train.take(plays.natural_clients == 0)
    assert text_of(mine.y) == "Who's there?\nLong live the king!"
    assert text_of(plays.test.y).startswith("He.\nIndeed.Bernardo?He.")
    ghost = plays.train.take(plays.natural_clients == 2)
    assert text_of(ghost.y) == "Who's there?\nLong live the qu\0en!"


def test_shakespeares_windows_follow_each_other(tmp_path):
    plays = data.load(
        "shakespeare", write_plays(tmp_path / "s"), sequence_length=3, stride=1
    )
    mine = plays.train.take(plays.natural_clients == 1)
    for before, after, label in zip(mine.x, mine.x[1:], mine.y, strict=False):
        assert [*before[1:], label] == after.tolist()


def test_shakespeare_without_plays_or_with_wrong_lengths(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="a role of two speeches or more"):
        data.load("shakespeare", tmp_path / "empty")
    with pytest.raises(DataError, match="one text file"):
        data.load("shakespeare")
    with pytest.raises(DataError, match="sequence_length must be in"):
        data.load("shakespeare", tmp_path / "empty", sequence_length=0)


# ---------------------------------------------------------------------------- csv


def write_csv(path, rows=20):
    lines = ["size,colour,sex,site,kind"]
    for i in range(rows):
        colour = ("red", "green")[i % 2]
        sex = ("f", "m")[i % 2]
        lines.append(f"{i},{colour},{sex},clinic {9 - i % 3},{('b', 'a', 'c')[i % 3]}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_csv(tmp_path):
    own = data.load(
        "csv",
        write_csv(tmp_path / "own.csv"),
        client="site",
        sensitive=["sex"],
        test_fraction=0.25,
        seed=3,
    )
    assert own.name == "own"
    assert own.class_names == ("a", "b", "c")
    assert (len(own.train), len(own.test)) == (15, 5)
    assert own.input_shape == (1 + 2 + 2,)
    assert own.attribute_names == {"sex": ("f", "m")}
    np.testing.assert_array_equal(own.train.attributes["sex"], own.train.x[:, 4])
    assert own.train.x[:, 0].mean() == pytest.approx(0, abs=1e-6)
    kinds = {0: 1, 1: 0, 2: 2}  # clinic 9 has kind b only, and so on
    assert [kinds[2 - c] for c in own.natural_clients] == own.train.y.tolist()


def test_the_seed_draws_the_test_rows_of_a_csv(tmp_path):
    path = write_csv(tmp_path / "own.csv")
    a, b, c = (data.load("csv", path, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a.test.y, b.test.y)
    assert a.test.x.tolist() != c.test.x.tolist()


def test_csv_with_a_test_file_and_other_choices(tmp_path):
    path = write_csv(tmp_path / "own.csv")
    test = write_csv(tmp_path / "test.csv", rows=7)
    test.write_text(test.read_text().replace("green", "blue"))
    own = data.load(
        "csv",
        path,
        label="colour",
        classes=["red", "green", "blue"],
        test=str(test),
        sensitive="size",
        sensitive_features=False,
        standardise=False,
    )
    assert own.num_classes == 3
    assert len(own.train) == 20
    assert own.test.y.tolist() == [0, 2, 0, 2, 0, 2, 0]
    assert own.train.attributes["size"].tolist() == list(range(20))
    assert own.input_shape == (2 + 3 + 3,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "knd"}, "no column 'knd'. Did you mean 'kind'"),
        ({"client": "sit"}, "no column 'sit'. Did you mean 'site'"),
        ({"sensitive": ["age"]}, "no column 'age'.*It has size, colour"),
        ({"test": "gone.csv"}, "gone.csv does not exist"),
        ({"classes": ["a", "b"]}, "'kind' holds 'c', which is none of"),
        ({"clients": "site"}, "no option 'clients'. Did you mean 'client'"),
        ({"test_fraction": "much"}, "test_fraction must be a number, got 'much'"),
    ],
)
def test_csv_errors(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        data.load("csv", write_csv(tmp_path / "own.csv"), **options)


def test_csv_test_fraction_out_of_range(tmp_path):
    with pytest.raises(DataError, match=r"test_fraction must be in \[0, 1\)"):
        data.load("csv", write_csv(tmp_path / "own.csv"), test_fraction=1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as CSV"),
        ("a,y\n", "no rows below its header"),
        ("a,y\n1,0\n,1\n", "column 'a' has no finite value in data row 2"),
        ("a,y\n1,0\n2\n", "column 'y' has no finite value in data row 2"),
        ("a,y\n1,0\ninf,1\n", "column 'a' has no finite value"),
        ("y\n1\n", "no feature column besides 'y'"),
    ],
)
def test_a_broken_csv_is_named(tmp_path, text, message):
    path = tmp_path / "own.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        data.load("csv", path, test_fraction=0.0)


def test_csv_needs_a_path(tmp_path):
    with pytest.raises(DataError, match="needs the option path"):
        data.load("csv")


def test_a_numeric_column_must_be_numeric_in_the_test_file_too(tmp_path):
    (tmp_path / "a.csv").write_text("a,y\n1,0\n2,1\n")
    (tmp_path / "b.csv").write_text("a,y\nx,0\n")
    with pytest.raises(DataError, match="column 'a' is numeric, but not in the test"):
        data.load("csv", tmp_path / "a.csv", test=tmp_path / "b.csv")


# ---------------------------------------------------------------------------- npz


def test_npz(tmp_path):
    path = tmp_path / "own.npz"
    x = np.random.default_rng(0).normal(size=(10, 1, 4, 4))
    y = np.arange(10) % 3
    np.savez(path, x=x, y=y, client=np.array(list("bbbbbaaaaa")))
    own = data.load("npz", path, test_fraction=0.2)
    assert own.train.x.shape == (8, 1, 4, 4)
    assert own.train.x.dtype == np.float32
    assert own.num_classes == 3
    assert set(own.natural_clients) == {0, 1}
    assert len(own.natural_clients) == 8
    np.savez(path, x=x, y=y, x_test=x[:2], y_test=y[:2])
    own = data.load("npz", path, num_classes=5)
    assert (len(own.train), len(own.test), own.num_classes) == (10, 2, 5)


def test_npz_of_tokens_stays_whole_numbers(tmp_path):
    np.savez(tmp_path / "t.npz", x=np.ones((6, 4), np.int32), y=np.arange(6) % 2)
    assert data.load("npz", tmp_path / "t.npz").train.x.dtype == np.int64


X, Y = np.zeros((4, 2)), np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"x": X}, {}, "no array 'y'"),
        ({"x": X, "y": Y, "x_test": X}, {}, "no array 'y_test'"),
        ({"x": X, "y": Y, "clients": Y}, {}, "'clients'. Did you mean 'client'"),
        ({"x": X, "y": Y[:3]}, {}, "'x' has 4 rows and 'y' has 3"),
        ({"x": X, "y": Y, "client": Y[:3]}, {}, "'client' has 3 rows"),
        ({"x": X, "y": Y, "client": X}, {}, r"'client': clients have shape \[4, 2\]"),
        ({"x": X, "y": Y, "client": np.array([b"\xff", b"\xfe"] * 2)}, {}, "not UTF-8"),
        ({"x": X, "y": Y / 2}, {}, "'y' is float64"),
        ({"x": X, "y": Y - 1}, {}, "labels reach from -1"),
        ({"x": X, "y": Y}, {"num_classes": 1}, "1 classes allow 0 to 0"),
        ({"x": X, "y": 0 * Y}, {}, "'y' has one value only, 0"),
        ({"x": X, "y": 0 * Y + 3}, {}, "'y' has one value only, 3"),
        ({"x": X, "y": 0 * Y}, {"num_classes": 1}, "'y' has one value only, 0"),
        ({"x": X[:, 0], "y": Y}, {}, "'x' has shape"),
        ({"x": X[:, :0], "y": Y}, {}, r"shape \(0,\), which holds no number"),
        ({"x": X.astype(str), "y": Y}, {}, "'x' is <U"),
        ({"x": X * np.nan, "y": Y}, {}, "example 0 holds NaN"),
        ({"x": X, "y": Y, "x_test": X[:, :1], "y_test": Y}, {}, "Make them equal"),
        ({"x": np.array([{}] * 4), "y": Y}, {}, "plain arrays"),
    ],
)
def test_npz_errors(tmp_path, arrays, options, message):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=message):
        data.load("npz", path, **{"test_fraction": 0.0, **options})


def test_npz_that_is_none(tmp_path):
    path = tmp_path / "own.npz"
    path.write_bytes(b"a,b,y\n1,2,0\n")
    with pytest.raises(DataError, match=r"cannot be read as an NPZ file.*name = 'csv'"):
        data.load("npz", path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match="cannot be read as an NPZ file"):
        data.load("npz", path)


# ------------------------------------------------------------------- by any name


def test_a_data_set_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_data_for_test.py").write_text(
        "import numpy as np\n"
        "from fedweight.data import DataSet, Examples\n"
        "def make(path, seed, n=4):\n"
        "    part = Examples(np.full((n, 2), seed, np.float32), np.arange(n) % 2)\n"
        "    return DataSet(str(path), part, part, 2)\n"
        "def bare():\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = data.load("own_data_for_test:make", "here", seed=7, n=6)
    assert (own.name, len(own.train), own.train.x[0, 0]) == ("here", 6, 7)
    with pytest.raises(DataError, match="needs the option 'path'"):
        data.load("own_data_for_test:make")
    with pytest.raises(DataError, match="returned int"):
        data.load("own_data_for_test:bare")
    with pytest.raises(DataError, match="takes no path"):
        data.load("own_data_for_test:bare", "here")


def test_unknown_names_and_options():
    with pytest.raises(ConfigurationError, match="Did you mean 'digits'"):
        data.load("digit")
    with pytest.raises(DataError, match="'digits' has no option 'scale'"):
        data.load("digits", scale=2)


def test_catalogue_describes_every_data_set():
    lines = data.catalogue()
    assert set(lines) == {
        *("adult", "csv", "digits", "fashion-mnist", "npz", "shakespeare", "shapes")
    }
    assert all(20 < len(line) < 90 for line in lines.values())


def test_take_gives_views_for_slices_and_checks_lengths():
    examples = Examples(np.zeros((6, 2), np.float32), np.arange(6), {"a": np.arange(6)})
    part = examples.take(slice(2, 5))
    for a, b in ((part.x, examples.x), (part.y, examples.y)):
        assert np.shares_memory(a, b)
    assert part.attributes["a"].tolist() == [2, 3, 4]
    with pytest.raises(DataError, match="'a' has 2 rows"):
        Examples(np.zeros((3, 1)), np.zeros(3), {"a": np.zeros(2)})


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((0, 2), np.float32), np.zeros(0, np.int64), "no training examples"),
        (np.zeros((2, 2), complex), np.zeros(2, np.int64), "inputs are complex128"),
        (np.zeros((2, 2), np.float32), np.zeros((2, 2)), "labels are float64"),
    ],
)
def test_check(x, y, message):
    part = Examples(x, y)
    with pytest.raises(DataError, match=message):
        data.check(DataSet("own", part, part, 2))


def test_check_lets_large_finite_values_pass():
    part = Examples(np.full((4, 2), 3e38, np.float32), np.zeros(4, np.int64))
    assert data.check(DataSet("own", part, part, 2)).num_classes == 2


# ---------------------------------------------------------------------- real data


def folder_of(real_data, name):
    folder = real_data / name
    if not folder.is_dir():
        pytest.skip(f"{real_data} has no folder '{name}'")
    return folder


def test_real_fashion_mnist(real_data):
    fashion = data.load("fashion-mnist", folder_of(real_data, "fashion-mnist"))
    assert (len(fashion.train), len(fashion.test)) == (60_000, 10_000)
    assert set(np.bincount(fashion.train.y)) == {6000}
    assert abs(fashion.train.x.mean(dtype=np.float64)) < 1e-3
    assert abs(fashion.train.x.std(dtype=np.float64) - 1) < 1e-3


def test_real_adult(real_data):
    census = data.load("adult", folder_of(real_data, "adult"))
    assert (len(census.train), len(census.test)) == (32_561, 16_281)
    assert census.train.y.mean() == pytest.approx(0.2408, abs=1e-4)


def test_real_shakespeare(real_data):
    plays = data.load("shakespeare", folder_of(real_data, "shakespeare"))
    assert 1_050 < plays.natural_clients.max() + 1 < 1_110
    assert (plays.test.y == 0).mean() < 1e-3
