"""Attributes that become groups, and those that cannot."""

import numpy as np
import pytest

from fedweight.core.errors import DataError
from fedweight.data import DataSet, Examples, federate, load, load_client
from fedweight.data.groups import MOST_NUMBERS, check_groups, groups_of, name_groups
from fedweight.data.schema import Schema


def people(train, test=None, **more):
    """A data set of examples that have one attribute."""

    def part(column):
        n = len(column)
        return Examples(np.zeros((n, 1), np.float32), np.arange(n) % 2, {"who": column})

    return DataSet(
        "people", part(train), part(train if test is None else test), 2, **more
    )


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["m", "f", "m"], ("f", "m")),
        ([True, False], ("False", "True")),
        ([2, 0, 2], ("0", "2")),
        ([1.0, -1.0], ("-1", "1")),
        (range(MOST_NUMBERS), tuple(map(str, range(MOST_NUMBERS)))),
        (range(MOST_NUMBERS + 1), None),
        ([0.5, 1.0], None),
        ([1.0, float("nan")], None),
        (["f", ""], None),
        (["f", None], None),
        (["f", 1], None),
        ([f"name {k}" for k in range(101)], None),
        ([[0, 1], [1, 0]], None),
        ([], None),
    ],
)
def test_what_names_groups(values, names):
    array = np.array(list(values), object if None in values or "f" in values else None)
    assert groups_of(array) == names


def test_texts_and_numbers_become_codes_of_both_parts():
    data = name_groups(people(np.array(["m", "f"]), np.array(["x", "m", "f"])))
    assert data.attribute_names == {"who": ("f", "m", "x")}
    assert data.train.attributes["who"].tolist() == [1, 0]
    assert data.test.attributes["who"].tolist() == [2, 1, 0]
    assert data.test.attributes["who"].dtype == np.int64


def test_what_has_names_or_is_no_group_stays_as_it_is():
    named = people(np.array([1, 0]), attribute_names={"who": ("f", "m")})
    assert name_groups(named) is named
    ages = people(np.arange(50))
    assert name_groups(ages) is ages
    mixed = people(np.array(["m", "f"]), np.array([0, 1]))
    assert name_groups(mixed) is mixed


def test_groups_reach_the_clients():
    data = federate(
        people(np.array(["f", "m"] * 20)),
        "attribute",
        num_clients=4,
        attribute="who",
        strength=1.0,
        proxy=0,
    )
    own = [data.client(k) for k in range(4)]
    alike = [np.unique(c.train.attributes["who"]) for c in own]
    assert sorted(int(a) for (a,) in alike) == [0, 0, 1, 1]
    assert all(len(c.held_out.attributes["who"]) == len(c.held_out) for c in own)
    assert data.attribute_names == {"who": ("f", "m")}


def refusal(dataset, name="who"):
    data = federate(dataset, "iid", num_clients=2, proxy=0)
    with pytest.raises(DataError) as caught:
        check_groups("groups.attributes", data, name)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("groups.attributes: ")
    return message


@pytest.mark.parametrize(
    ("train", "texts"),
    [
        (np.linspace(20, 60, 50), ["50 different numbers", "numpy.digitize(who"]),
        (np.array([1.0, np.nan] * 5), ["missing for 5 of 10", "unknown"]),
        (np.array(["f", None] * 5, object), ["missing for 5 of 10"]),
        (np.array(["f", ""] * 5), ["missing for 5 of 10"]),
        (np.array([f"name {k}" for k in range(200)]), ["200 different values", "100"]),
        (np.zeros((10, 2), np.int64), ["shape (10, 2)"]),
    ],
)
def test_what_cannot_be_grouped_is_one_line(train, texts):
    message = refusal(people(train))
    assert all(text in message for text in texts), message


def test_an_attribute_that_there_is_not():
    data = people(np.array(["f", "m"] * 5))
    assert "Did you mean 'who'?" in refusal(data, "wo")
    assert "data.sensitive" in refusal(data, "wo")
    without = DataSet("people", data.train, Examples(data.test.x, data.test.y), 2)
    assert "the test examples of data 'people' have no attribute 'who'" in refusal(
        without
    )


def test_codes_beyond_their_names():
    data = people(np.array([0, 1, 2]), attribute_names={"who": ("f", "m")})
    assert "codes from 0 to 1" in refusal(data)
    texts = people(np.array(["f", "m"]), attribute_names={"who": ("f", "m")})
    assert "codes from 0 to 1" in refusal(texts)


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    lines = ["dose,age,member,sex,site,label"]
    for k in range(90):
        sex = "f" if k % 3 else "m"
        lines.append(
            f"{rng.normal():.3f},{20 + k * 0.5},{k % 2},{sex},s{k % 4},"
            f"{'no' if k % 5 else 'yes'}"
        )
    path = tmp_path / "own.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_csv_files_sensitive_columns(table):
    sensitive = ["sex", "age", "member"]
    dataset = load("csv", table, client="site", sensitive=sensitive)
    data = federate(dataset, "natural", num_clients=None)
    assert data.attribute_names == {"sex": ("f", "m"), "member": ("0", "1")}
    for name in ("sex", "member"):
        check_groups("data.sensitive", data, name)
    assert "measures something" in refusal(dataset, "age")
    [note] = [line for line in data.notes if "sensitive" in line]
    assert "'age'" in note
    assert "make no groups" in note


def test_a_missing_cell_of_a_sensitive_column_is_refused(table):
    text = table.read_text().splitlines()
    cells = text[5].split(",")
    cells[3] = ""
    table.write_text("\n".join([*text[:5], ",".join(cells), *text[6:]]) + "\n")
    with pytest.raises(DataError, match=r"'sex'.*drop-missing"):
        load("csv", table, sensitive="sex")


# ----------------------------------------------------------------- files of arrays


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(60, 2)),
        "y": np.arange(60) % 2,
        "client": np.arange(60) % 3,
        "sex": np.array(["f", "m", "m"] * 20),
        "old": np.arange(60) % 5 > 2,
    }


def saved(folder, arrays):
    np.savez(folder / "own.npz", **arrays)
    return folder / "own.npz"


def test_a_file_of_arrays_has_sensitive_ones(arrays, tmp_path):
    path = saved(tmp_path, arrays)
    dataset = load("npz", path, sensitive=["sex", "old"])
    data = federate(dataset, "natural", num_clients=None)
    assert data.attribute_names == {"sex": ("f", "m"), "old": ("False", "True")}
    assert data.notes == ()
    parts = [data.test, *(data.client(k).train for k in range(3))]
    assert all(len(p.attributes["sex"]) == len(p) for p in parts)
    # Each row keeps its own: sex goes by the place in the file, as the client does.
    rows = {
        tuple(row): sex for row, sex in zip(arrays["x"], arrays["sex"], strict=True)
    }
    for example, code in zip(
        dataset.train.x, dataset.train.attributes["sex"], strict=True
    ):
        [close] = [s for row, s in rows.items() if np.allclose(row, example)]
        assert close == code
    for name in ("sex", "old"):
        check_groups("data.sensitive", data, name)


def test_test_arrays_have_their_own_attributes(arrays, tmp_path):
    tested = {
        f"{k}_test": v[:9] for k, v in arrays.items() if k not in ("client", "old")
    }
    few = {k: v for k, v in arrays.items() if k != "old"}
    dataset = load("npz", saved(tmp_path, few | tested), sensitive="sex")
    assert dataset.test.attributes["sex"].tolist() == arrays["sex"][:9].tolist()
    tested.pop("sex_test")
    with pytest.raises(DataError, match="holds no array 'sex_test'"):
        load("npz", saved(tmp_path, few | tested), sensitive="sex")


@pytest.mark.parametrize(
    ("sensitive", "change", "text"),
    [
        ("sex", {}, r"array 'old'.* Allowed are .*sex, and what data\.sensitive names"),
        (["sex", "old", "sx"], {}, "holds no array 'sx'"),
        (["sex", "old", "y"], {}, "sensitive names 'y'"),
        (["sex", "old"], {"sex": np.array(["f", ""] * 30)}, "missing for 30 of 60"),
        (["sex", "old"], {"old": np.full(60, np.nan)}, "missing for 60 of 60"),
        (["sex", "old"], {"sex": np.array(["f", "m"])}, "'sex' has 2 rows and 'y'"),
    ],
)
def test_sensitive_arrays_that_cannot_be_are_one_line(
    arrays, tmp_path, sensitive, change, text
):
    with pytest.raises(DataError, match=text) as caught:
        load("npz", saved(tmp_path, arrays | change), sensitive=sensitive)
    assert "\n" not in str(caught.value)


def test_an_array_that_measures_something_is_noted(arrays, tmp_path):
    arrays["old"] = np.linspace(20, 60, 60)
    dataset = load("npz", saved(tmp_path, arrays), sensitive=["sex", "old"])
    [note] = dataset.notes
    assert "'old' has 60 different values, which make no groups" in note


def test_a_nodes_own_arrays_become_codes_of_the_servers_groups(arrays, tmp_path):
    women = arrays["sex"] == "m"
    arrays = {k: v[women] for k, v in arrays.items() if k not in ("client", "old")}
    schema = Schema("server.npz", "", (), {}, (2,), {"sex": ("f", "m")})
    client = load_client(saved(tmp_path, arrays), 0.0, schema=schema, sensitive="sex")
    assert set(client.train.attributes["sex"].tolist()) == {1}
    arrays["sex"] = np.array(["x"] * 40)
    with pytest.raises(
        DataError, match="'sex' holds 'x', which is none of 'f' and 'm'"
    ):
        load_client(saved(tmp_path, arrays), 0.0, schema=schema, sensitive="sex")
