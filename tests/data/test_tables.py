"""CSV files that are written otherwise, or hold something else than is meant."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest

from fedweight import data
from fedweight.core.errors import ConfigurationError, DataError
from fedweight.data import tables

ROOT = Path(__file__).parents[2]

ROWS = [(i * 1.5 - 3, f"{i % 7}.25", "ab"[i % 2]) for i in range(154)]
PLAIN = "a,b,y\n" + "".join(f"{a},{b},{y}\n" for a, b, y in ROWS)


def csv(tmp_path, content, name="own.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path, **options):
    """Return why a file is refused: one line, that begins with its name."""
    with pytest.raises((DataError, ConfigurationError)) as caught:
        data.load("csv", path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def same(one, other):
    for part in ("train", "test"):
        a, b = getattr(one, part), getattr(other, part)
        np.testing.assert_array_equal(a.x, b.x)
        np.testing.assert_array_equal(a.y, b.y)
    assert one.class_names == other.class_names


@pytest.fixture
def plain(tmp_path):
    return data.load("csv", csv(tmp_path, PLAIN, "plain.csv"))


# ------------------------------------------------------------- files that were right


def digest(dataset):
    """Everything that a model, or a table of fairness, could see."""
    seen = hashlib.sha256()
    for part in (dataset.train, dataset.test):
        seen.update(part.x.tobytes())
        seen.update(part.y.tobytes())
        for name in sorted(part.attributes):
            column = np.asarray(part.attributes[name], np.float64)
            seen.update(name.encode() + column.tobytes())
    seen.update(repr((dataset.class_names, dict(dataset.attribute_names))).encode())
    if dataset.natural_clients is not None:
        seen.update(dataset.natural_clients.tobytes())
    return seen.hexdigest()[:16]


def test_files_that_were_right_keep_their_bits(tmp_path):
    """Recorded with the first version, whose reader guessed more."""
    own = ROOT / "simulations" / "own_data.csv"
    options = {"label": "diagnosis"}
    assert digest(data.load("csv", own, **options)) == "f82c2a0cffb4515e"
    options |= {"standardise": False, "test_fraction": 0.3}
    assert digest(data.load("csv", own, seed=5, **options)) == "ca6593dffc78df44"

    lines = ["size,colour,sex,site,flag,kind"]
    for i in range(60):
        colour, sex = ("red", "green", "None-ish")[i % 3], ("f", "m")[i % 2]
        kind = ("b", "a", "c")[i % 7 % 3]
        lines.append(
            f"{i * 1.7 - 3:.3f},{colour},{sex},clinic {9 - i % 5},{bool(i % 4)},{kind}"
        )
    mixed = csv(tmp_path, "\n".join(lines) + "\n", "m.csv")
    options = {"client": "site", "sensitive": ["sex", "flag"]}
    assert digest(data.load("csv", mixed, seed=3, **options)) == "0d9fc88bc28f57b0"
    options = {"label": "flag", "client": "sex", "sensitive": ["size"], "test": mixed}
    options["sensitive_features"] = False
    assert digest(data.load("csv", mixed, **options)) == "2700ef39ea78b3eb"


# ------------------------------------------------------------------------- the options


@pytest.mark.parametrize(
    ("content", "options", "hint"),
    [
        (PLAIN.replace(",", ";"), {"sep": ";"}, "set sep = ';'"),
        (PLAIN.replace(",", "\t"), {"sep": "\t"}, r'set sep = "\t"'),
        (PLAIN.replace(",", "\t"), {"sep": r"\t"}, r'set sep = "\t"'),
        (PLAIN.replace(",", "|"), {"sep": "|"}, "set sep = '|'"),
        (PLAIN.encode("utf-16"), {"encoding": "utf-16"}, "encoding = 'utf-16'"),
    ],
    ids=["semicolon", "tab", "tab as text", "bar", "utf-16"],
)
def test_a_file_written_otherwise_is_told_the_option_that_reads_it(
    tmp_path, plain, content, options, hint
):
    path = csv(tmp_path, content)
    message = refused(path)
    assert str(path) in message
    assert hint in message
    same(data.load("csv", path, **options), plain)


def test_decimals_after_a_comma(tmp_path, plain):
    content = PLAIN.replace(",", ";").replace(".", ",")
    path = csv(tmp_path, content)
    assert "set sep = ';'" in refused(path)
    assert "decimal = ','" in refused(path, sep=";")
    same(data.load("csv", path, sep=";", decimal=","), plain)
    quoted = "a,b,y\n" + "".join(
        f'"{a}","{b}",{y}\n'.replace(".", ",") for a, b, y in ROWS
    )
    path = csv(tmp_path, quoted)
    assert "decimal = ','" in refused(path)
    same(data.load("csv", path, decimal=","), plain)
    assert "decimal = '.'" in refused(csv(tmp_path, PLAIN), decimal=",")


@pytest.mark.parametrize(
    ("cells", "remedies"),
    [
        (["1,000", "2,000", "3"], ["set decimal = ','", "remove it from the file"]),
        (["1,000,500", "2.5"], ["Remove the marks between thousands"]),
        (["1,000.5", "999.5"], ["Remove the marks between thousands"]),
        (["1 000", "2\u00a0000"], ["Remove the marks between thousands"]),
        (["\u22121", "1", "2"], ["Write its minus sign as '-'"]),
        (["1\u00a0", "2"], ["no space of another kind"]),
    ],
)
def test_numbers_with_other_marks(tmp_path, cells, remedies):
    body = "".join(f'{i},"{cells[i % len(cells)]}",{i % 2}\n' for i in range(60))
    path = csv(tmp_path, "a,b,y\n" + body)
    message = refused(path)
    assert all(remedy in message for remedy in remedies)
    assert "'b' holds numbers such as" in message
    own = data.load("csv", path, dtype={"b": "category"})
    assert own.input_shape == (1 + len(cells),)
    rows = "".join(f'{i},"{i}.5",{i % 2}\n' for i in range(60))
    among = refused(csv(tmp_path, f'a,b,y\n0,"{cells[0]}",1\n' + rows))
    assert any(remedy in among for remedy in [*remedies, "no space"])


def test_cells_between_spaces(tmp_path, plain):
    path = csv(tmp_path, PLAIN.replace(",", " "))
    assert "set sep = ' '" in refused(path)
    same(data.load("csv", path, sep=" "), plain)
    assert "set sep = ';'" in refused(csv(tmp_path, "a b c;y\n1;2\n"))


@pytest.mark.parametrize("content", ["", "\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file(tmp_path, content):
    assert "it is empty" in refused(csv(tmp_path, content))


def test_a_long_name_is_shortened(tmp_path):
    path = csv(tmp_path, PLAIN.replace("a,b,y", "a" * 5000 + ",b,y"))
    assert "It has aaaaa" in refused(path, label="z")


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path, plain):
    path = csv(tmp_path, b"\xef\xbb\xbf" + PLAIN.encode())
    same(data.load("csv", path), plain)
    assert data.load("csv", path).feature_names == ("a", "b")
    assert "Leave encoding out" in refused(path, encoding="latin-1")


def test_latin_1(tmp_path):
    content = "name,y\n" + "".join(
        f"{('café', 'bar')[i % 2]},{i % 2}\n" for i in range(9)
    )
    path = csv(tmp_path, content.encode("latin-1"))
    message = refused(path)
    assert "not written in utf-8" in message
    assert "'latin-1'" in message
    own = data.load("csv", path, encoding="latin-1")
    assert own.feature_names == ("name=bar", "name=café")


def test_a_file_without_a_header(tmp_path, plain):
    path = csv(tmp_path, PLAIN.split("\n", 1)[1])
    assert "header = false" in refused(path)
    own = data.load("csv", path, header=False)
    same(own, plain)
    assert own.feature_names == ("0", "1")
    named = data.load("csv", path, header=True, standardise=False)
    assert len(named.train) + len(named.test) == len(ROWS) - 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("1,2,0\n" + "3,4,1\n5,6,0\n" * 9, "which are numbers"),
        ("39,State-gov,0\n" + "50,State-gov,1\n38,Private,0\n" * 9, "'State-gov'"),
        ("x,-0.5,a\n" + "y,1.5,b\n" * 9, "which are numbers"),
    ],
)
def test_a_first_line_of_data_is_no_header(tmp_path, content, reason):
    message = refused(csv(tmp_path, content))
    assert reason in message
    assert "header = false" in message


def test_a_header_is_no_data(tmp_path):
    body = "".join(f"{i % 5},{i % 2},{'ab'[i % 2]}\n" for i in range(60))
    path = csv(tmp_path, "age,sex,y\n" + body)
    message = refused(path, header=False)
    assert "begins with 'age', which stands above numbers in column '0'" in message
    assert "leave header out" in message
    assert data.load("csv", csv(tmp_path, body), header=False).input_shape == (2,)
    names = csv(tmp_path, "red,f,a\n" + body.replace("0,", "blue,"))
    dtype = {"0": "category", "1": "category"}
    assert data.load("csv", names, header=False, dtype=dtype).num_classes == 2


@pytest.mark.parametrize("first", ["0,1,2", "1,2,3", "1990,1991,y"])
def test_names_may_be_numbers_as_pandas_writes_them(tmp_path, first):
    body = "".join(f"{i * 0.5},{i % 3},{i % 2}\n" for i in range(20))
    own = data.load("csv", csv(tmp_path, f"{first}\n{body}"))
    assert len(own.train) + len(own.test) == 20


def test_columns_that_are_left_out(tmp_path, plain):
    rows = PLAIN.splitlines()
    content = "\n".join(
        [f"id,{rows[0]}", *(f"x{i},{r}" for i, r in enumerate(rows[1:]))]
    )
    path = csv(tmp_path, content)
    message = refused(path)
    assert "154 different texts in 154 rows, such as 'x0'" in message
    assert "drop = ['id']" in message
    for drop in ("id", ["id"]):
        same(data.load("csv", path, drop=drop), plain)
    assert "'ide'. Did you mean 'id'" in refused(path, drop=["ide"])
    assert "is left out by drop" in refused(path, drop=["id", "y"], label="y")
    assert "drop leaves no column" in refused(path, drop=["id", "a", "b", "y"])


def test_what_stands_for_a_missing_value(tmp_path, plain):
    path = csv(tmp_path, PLAIN.replace("a,b,y\n", "a,b,y\n?,1.25,a\n"))
    message = refused(path)
    assert "holds numbers, but '?' in data row 1 (1 such cells in 155 rows)" in message
    assert "na-values = ['?'] and drop-missing = true" in message
    message = refused(path, na_values=["?"])
    assert "column 'a' has no finite value in data row 1: '?'" in message
    assert "drop-missing" in message
    own = data.load("csv", path, na_values=["?"], drop_missing=True)
    same(own, plain)
    assert own.notes == (
        "own.csv: left out 1 of 155 rows, which miss a value (drop-missing)",
    )


def test_rows_that_are_left_out_change_no_whole_number(tmp_path):
    body = "".join(f"{i % 5},{i * 0.5},{i % 2},{i % 3 == 0}\n" for i in range(30))
    whole = data.load("csv", csv(tmp_path, "site,a,y,flag\n" + body), client="site")
    holes = csv(
        tmp_path, "site,a,y,flag\n,1,1,True\n1,1,,False\n1,1,1,\n" + body, "h.csv"
    )
    own = data.load("csv", holes, client="site", drop_missing=True)
    same(own, whole)
    assert own.natural_names == whole.natural_names == ("0", "1", "2", "3", "4")
    assert own.feature_names == ("a", "y")
    assert own.class_names == ("False", "True")
    assert "3 of 33 rows" in own.notes[0]
    everywhere = csv(tmp_path, "a,y\n,1\n2,\n", "e.csv")
    assert "leaves no row" in refused(everywhere, drop_missing=True)


LONG = (9007199254740992, 9007199254740993)  # alike as floats


@pytest.mark.parametrize("ids", [LONG, (2**64 - 2, 2**64 - 1), (10**30, 10**30 + 1)])
@pytest.mark.parametrize("column", ["site", "y"])
def test_rows_that_are_left_out_keep_long_ids_apart(tmp_path, ids, column):
    body = "".join(f"{i % 5},{ids[i % 2]},{i % 2}\n" for i in range(40))
    options = {"client": "site"}
    head = "a,site,y\n"
    if column == "y":
        options, head = {}, "a,b,y\n"
        body = "".join(f"{i % 5},{i % 2},{ids[i % 2]}\n" for i in range(40))
    hole = "1,,1\n" if column == "site" else "1,1,\n"
    whole = data.load("csv", csv(tmp_path, head + body), **options)
    path = csv(tmp_path, head + hole + body, "hole.csv")
    assert "data row 1: an empty cell" in refused(path, **options)
    own = data.load("csv", path, drop_missing=True, **options)
    same(own, whole)
    assert own.natural_names == whole.natural_names
    names = own.natural_names if column == "site" else own.class_names
    assert names == tuple(map(str, ids))


@pytest.mark.parametrize("column", ["site", "y"])
def test_long_ids_written_as_decimals_are_refused(tmp_path, column):
    body = "".join(f"{i % 5},{LONG[i % 2]}.0,{i % 2}\n" for i in range(40))
    head = "a,site,y\n" if column == "site" else "a,y,site\n"
    path = csv(tmp_path, head + body)
    options = {"client": "site"} if column == "site" else {"label": "y"}
    assert f"dtype = {{'{column}' = 'category'}}" in refused(path, **options)
    own = data.load("csv", path, dtype={column: "category"}, **options)
    names = own.natural_names if column == "site" else own.class_names
    assert names == tuple(f"{number}.0" for number in LONG)


def test_a_long_label_is_not_taken_for_its_neighbour(tmp_path):
    body = "".join(f"{i % 5},{LONG[1]}\n" for i in range(9))
    path = csv(tmp_path, "a,y\n" + body)
    assert f"holds {LONG[1]}, which is none" in refused(path, classes=[LONG[0], 1])


@pytest.mark.parametrize("option", ["client", "label", "sensitive", "drop"])
def test_an_empty_name_is_no_column(tmp_path, option):
    assert "has no column ''" in refused(csv(tmp_path, PLAIN), **{option: ""})


def test_none_is_a_name_and_na_is_missing(tmp_path):
    names = [("None", "Some")[i % 2] for i in range(40)]
    body = "".join(f"{i},{name}\n" for i, name in enumerate(names))
    own = data.load("csv", csv(tmp_path, "a,y\n" + body))
    assert own.class_names == ("None", "Some")
    path = csv(tmp_path, "a,y\n" + body.replace("None", "NA"))
    message = refused(path)
    assert "data row 1: 'NA' (20 such places in all)" in message
    assert "na-values = []" in message
    assert data.load("csv", path, na_values=[]).class_names == ("NA", "Some")
    numbers = csv(tmp_path, "a,y\n-9,a\n" + body.replace("None", "a"))
    assert "'-9'" in refused(numbers, na_values=[-9])


def test_columns_that_are_not_what_they_look_like(tmp_path):
    body = "".join(f"0{i % 3},{i},{i % 2}\n" for i in range(30))
    path = csv(tmp_path, "zip,a,y\n" + body)
    own = data.load("csv", path, dtype={"zip": "category"})
    assert own.feature_names == ("zip=00", "zip=01", "zip=02", "a")
    assert data.load("csv", path).feature_names == ("zip", "a")
    text = csv(
        tmp_path, "a,y\n" + "".join(f"{'12x'[i % 3]},{i % 2}\n" for i in range(9))
    )
    assert data.load("csv", text).feature_names == ("a=1", "a=2", "a=x")
    message = refused(text, dtype={"a": "number"})
    assert "holds numbers, but 'x' in data row 3" in message
    flags = csv(tmp_path, "a,y\n" + "".join(f"{i % 2 > 0},{i % 2}\n" for i in range(9)))
    assert set(data.load("csv", flags).train.x.ravel()) == {0.0, 1.0}
    number = data.load("csv", flags, dtype={"a": "number"})
    assert number.train.x.mean() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sep": ""}, "sep must be one character"),
        ({"sep": ",,"}, "sep must be one character"),
        ({"sep": "x"}, "sep must be one character"),
        ({"sep": '"'}, "sep must be one character"),
        ({"sep": "\n"}, "sep must be one character"),
        ({"sep": "é"}, "sep must be one character"),
        ({"sep": 3}, "sep must be a text, got 3"),
        ({"decimal": "'"}, "decimal must be one of '.', ','"),
        ({"encoding": "utf-9"}, "encoding must be one that Python knows"),
        ({"encoding": "base64"}, "encoding must be one that Python knows"),
        ({"header": "yes"}, "header must be true or false"),
        ({"drop": ["z"]}, "no column 'z'"),
        ({"drop": [3]}, "drop must be a text or a list, each a text"),
        ({"na_values": "?"}, "na_values must be a list"),
        ({"drop_missing": 1}, "drop_missing must be true or false"),
        ({"dtype": {"a": "float"}}, "'category', 'number'"),
        ({"dtype": {"z": "number"}}, "no column 'z'"),
        ({"dtype": "number"}, "dtype must be a table"),
        ({"seperator": ";"}, "no option 'seperator'"),
    ],
    ids=str,
)
def test_an_option_out_of_its_range(tmp_path, options, reason):
    assert reason in refused(csv(tmp_path, PLAIN), **options)


# ------------------------------------------------------------- what kind of file it is


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04" + bytes(90), "an Excel workbook"),
        (b"\xd0\xcf\x11\xe0" + bytes(90), "an old Excel workbook"),
        (gzip.compress(PLAIN.encode()), "packed with gzip"),
        (b"PAR1" + bytes(90), "a Parquet file"),
        (b"\x93NUMPY" + bytes(90), "a NumPy array"),
        (b"\n <!DOCTYPE html>\n<html>", "a web page"),
        (b'{"a": [1, 2]}', "JSON"),
        (b"a,b,y\n1,2,\x000\n3,4,1\n", "NUL"),
        (PLAIN.encode("utf-16-le"), "utf-16-le"),
        (b"a,b,y\n" + b"1,2,3\n" * 9 + b"\x00" * 5000, "NUL|own.csv"),
    ],
    ids=range(10),
)
def test_what_is_no_csv_file_is_named(tmp_path, content, reason):
    message = refused(csv(tmp_path, content))
    assert any(text in message for text in reason.split("|"))


def test_packed_files_are_read(tmp_path, plain):
    same(
        data.load("csv", csv(tmp_path, gzip.compress(PLAIN.encode()), "p.csv.gz")),
        plain,
    )


@pytest.mark.parametrize(
    "content",
    [
        "a,b,y\n" + "1,2,0,9\n3,4,1,9\n" * 20,  # every row: pandas would shift them all
        "a,b,y\n1,2,0,9\n" + "3,4,1\n5,6,0\n" * 20,
        PLAIN + "1,2,a,9\n",
        PLAIN.replace(",", ", ", 0).replace("a\n", "a,\n"),
    ],
)
def test_a_row_with_a_cell_too_many_is_told_by_its_line(tmp_path, content):
    message = refused(csv(tmp_path, content))
    assert "has 4 cells where 3 are named" in message
    assert "line " in message


def test_a_row_with_a_cell_too_few_has_no_value_there(tmp_path):
    message = refused(csv(tmp_path, PLAIN + "1,2\n"))
    assert "column 'y' has no finite value in data row 155: an empty cell" in message


def test_a_quote_that_never_closes(tmp_path):
    assert "a double quote is opened" in refused(
        csv(tmp_path, PLAIN + '1,"2,a\n3,4,b\n')
    )


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_plain_file_is_not_opened(tmp_path, kind):
    import os

    path = tmp_path / "own.csv"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path = Path("/dev/zero")
    message = refused(path)
    assert ("a folder" if kind == "folder" else "a pipe or a device") in message


# ---------------------------------------------------------------- numbers and texts


def test_columns_of_several_kinds_are_looked_at_as_a_whole(tmp_path):
    """pandas guesses a kind for each quarter of a million cells."""
    numbers = "".join(f"{i},{i % 7},{i % 2}\n" for i in range(200_000))
    message = refused(csv(tmp_path, "a,b,y\n" + numbers + "x,1,0\n" * 20_000))
    assert "holds numbers, but 'x' in data row 200001 (20,000 such cells" in message


def test_numbers_too_long_for_64_bits_are_numbers(tmp_path):
    own = data.load("csv", csv(tmp_path, PLAIN + "9" * 30 + ",1,a\n"))
    assert own.feature_names == ("a", "b")


def test_names_of_many_digits_are_names(tmp_path):
    body = "".join(f"{10**25 + i % 2},{i},{i % 2}\n" for i in range(20))
    own = data.load("csv", csv(tmp_path, "card,a,y\n" + body))
    assert own.feature_names == (f"card={10**25}", f"card={10**25 + 1}", "a")


def test_names_of_many_digits_in_every_row(tmp_path):
    body = "".join(f"{10**30 + i},{i % 4},{i % 2}\n" for i in range(60))
    path = csv(tmp_path, "card,a,y\n" + body)
    assert "drop = ['card']" in refused(path)
    assert "look like names of rows" in refused(path, label="card")


def test_a_few_texts_among_few_numbers_are_categories(tmp_path):
    body = "".join(f"{'012?'[i % 4]},{i},{i % 2}\n" for i in range(40))
    own = data.load("csv", csv(tmp_path, "grade,a,y\n" + body))
    assert own.feature_names == ("grade=0", "grade=1", "grade=2", "grade=?", "a")


def test_texts_that_differ_by_spaces_only(tmp_path):
    body = "".join(f"{('red', 'red ')[i % 2]},{i % 2}\n" for i in range(40))
    assert "differ by spaces only" in refused(csv(tmp_path, "a,y\n" + body))
    body = "".join(f"{i},{('dog', ' dog', 'cat')[i % 3]}\n" for i in range(40))
    assert "differ by spaces only" in refused(csv(tmp_path, "a,y\n" + body))
    plain = csv(tmp_path, "a,y\n" + body.replace(" dog", "dog"))
    test = csv(tmp_path, "a,y\n1,dog \n2,cat\n", "test.csv")
    assert "differ by spaces only" in refused(plain, test=test)


@pytest.mark.parametrize("column", ["site", "b"])
def test_one_number_written_in_two_ways_is_refused_beside_texts(tmp_path, column):
    body = "".join(f"{i},{('1', '1.0', 'A')[i % 3]},{i % 2}\n" for i in range(40))
    path = csv(tmp_path, f"a,{column},y\n" + body)
    options = {"client": "site"} if column == "site" else {}
    message = refused(path, **options)
    assert "holds '1' and '1.0', which are one number" in message
    own = data.load("csv", path, dtype={column: "category"}, **options)
    assert len(own.natural_names or own.feature_names[1:]) == 3


@pytest.mark.parametrize("column", ["y", "b"])
def test_texts_that_differ_by_capitals_only_are_noted(tmp_path, column):
    texts = ("Yes", "yes", "no")
    body = "".join(f"{i % 2},{texts[i % 3]}\n" for i in range(40))
    path = csv(tmp_path, ("a,y\n" if column == "y" else "y,b\n") + body)
    (note,) = data.load("csv", path, label="y").notes
    assert "holds 'Yes' and 'yes', which differ by capitals only" in note


def test_features_of_too_many_texts(tmp_path, monkeypatch):
    body = "".join(f"t{i % 30},{i},{i % 2}\n" for i in range(300))
    path = csv(tmp_path, "a,b,y\n" + body)
    assert data.load("csv", path).input_shape == (31,)
    monkeypatch.setattr(tables, "MOST_CATEGORIES", 29)
    assert "dtype = {'a' = 'category'}" in refused(path)
    assert data.load("csv", path, dtype={"a": "category"}).input_shape == (31,)


def test_20_000_texts_take_no_memory(tmp_path):
    body = "".join(f"id{i},{i % 9},{i % 2}\n" for i in range(20_000))
    assert "20,000 different texts" in refused(csv(tmp_path, "id,a,y\n" + body))


@pytest.mark.parametrize("standardise", [True, False])
def test_numbers_beyond_a_float_are_told_by_their_column(tmp_path, standardise):
    path = csv(tmp_path, PLAIN + "1,1e300,a\n")
    if standardise:
        assert data.load("csv", path).train.x.max() < 100
    else:
        assert "column 'b' has numbers beyond 3e38" in refused(path, standardise=False)
    assert "an infinite number" in refused(csv(tmp_path, PLAIN + "1,1e400,a\n"))


def test_a_column_that_is_there_twice(tmp_path):
    path = csv(tmp_path, PLAIN.replace("a,b,y", "a,a,y"))
    assert data.load("csv", path).feature_names == ("a", "a.1")
    for options in ({"label": "a"}, {"drop": ["a"]}, {"sensitive": ["a"]}):
        assert "more than one column 'a'" in refused(path, **options)


def test_whole_numbers_that_differ_in_every_row_are_noted(tmp_path):
    rows = PLAIN.splitlines()
    content = "\n".join([f",{rows[0]}", *(f"{i},{r}" for i, r in enumerate(rows[1:]))])
    own = data.load("csv", csv(tmp_path, content))
    assert own.feature_names == ("Unnamed: 0", "a", "b")
    assert "drop = ['Unnamed: 0']" in own.notes[0]


# ----------------------------------------------------------------------------- labels


def labelled(tmp_path, labels, name="own.csv"):
    body = "".join(f"{i % 13}.5,{label}\n" for i, label in enumerate(labels))
    return csv(tmp_path, "a,y\n" + body, name)


@pytest.mark.parametrize(
    ("train", "test", "names"),
    [
        (["0", "1"], ["0.0", "1.0"], ("0", "1")),
        (["0.0", "1.0"], ["0", "1"], ("0.0", "1.0")),
        (["0", "1"], ["1.0", "2.0"], ("0", "1", "2")),
        (["0.0", "1.0"], ["1", "2"], ("0.0", "1.0", "2.0")),
        (["0", "1"], ["1.0", "x"], ("0", "1", "x")),
        (["0.0", "1.0"], ["1", "x"], ("0", "1", "x")),
        (["a", "b"], ["b", "c"], ("a", "b", "c")),
        (["True", "False"], ["true", "false"], ("False", "True")),
    ],
)
def test_one_label_is_one_class_however_it_is_written(tmp_path, train, test, names):
    a = labelled(tmp_path, train * 15)
    b = labelled(tmp_path, test * 15, "test.csv")
    own = data.load("csv", a, test=b)
    assert own.class_names == names
    assert own.num_classes == len(names)
    canonical = [name.removesuffix(".0") for name in names]
    for part, given in ((own.train, train), (own.test, test)):
        expected = [
            canonical.index(
                g.removesuffix(".0").capitalize()
                if g in ("true", "false")
                else g.removesuffix(".0")
            )
            for g in given * 15
        ]
        assert part.y.tolist() == expected


def test_categories_and_groups_are_matched_likewise(tmp_path):
    a = csv(tmp_path, "g,s,y\n" + "1,1,a\n2,2,b\nx,x,a\n" * 9)
    b = csv(tmp_path, "g,s,y\n" + "1.0,1.0,a\n2.0,2.0,b\n" * 5, "test.csv")
    own = data.load("csv", a, test=b, sensitive=["s"])
    assert own.feature_names == ("g=1", "g=2", "g=x", "s=1", "s=2", "s=x")
    np.testing.assert_array_equal(own.test.x[:2, :3], [[1, 0, 0], [0, 1, 0]])
    assert own.test.attributes["s"][:2].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([f"{i * 0.731:.4f}" for i in range(200)], "200 different numbers in 200 rows"),
        ([f"{i % 25 + 0.5}" for i in range(2000)], "regression"),
        ([i // 5 for i in range(400)], "regression"),
        (list(range(12)), "regression"),
        ([f"p{i}" for i in range(200)], "200 different texts in 200 rows"),
        ([f"p{i}" for i in range(8)], "names of rows"),
        ([1] * 30, "one value only, 1"),
        (["a", "b", "?"] * 9, "the value '?'"),
        ([0, 1, "-"] * 9, "the value '-'"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path, labels, reason):
    path = labelled(tmp_path, labels)
    message = refused(path)
    assert reason in message
    if len(set(labels)) > 1:
        assert "dtype = {'y' = 'category'}" in message
        own = data.load("csv", path, dtype={"y": "category"})
        assert own.num_classes == len(set(labels))
        listed = sorted({str(label) for label in labels})
        assert data.load("csv", path, classes=listed).num_classes == len(listed)


@pytest.mark.parametrize(
    "labels",
    [
        [i % 2 for i in range(6)],
        [2 * (i % 6) for i in range(60)],  # as in chem97: 0, 2, 4, 6, 8, 10
        [0.5 * (i % 5) for i in range(60)],
        [i % 100 for i in range(1000)],
        [f"c{i % 50}" for i in range(200)],
        ["x", "y", "z"],
    ],
)
def test_labels_that_are_classes_pass(tmp_path, labels):
    own = data.load("csv", labelled(tmp_path, labels), test_fraction=0.0)
    assert own.num_classes == len(set(labels))
    assert own.notes == ()


def test_whole_numbers_that_may_be_a_quantity_are_noted(tmp_path):
    path = labelled(tmp_path, [17 + i % 60 for i in range(1000)])
    (note,) = data.load("csv", path).notes
    assert "60 different whole numbers from 17 to 76, each a class" in note
    assert data.load("csv", path, dtype={"y": "category"}).notes == ()


@pytest.mark.parametrize(
    "classes", [["a", "a", "b"], [], ["b", "a", "b", "c"], ["a", "b", 1, 1.0]]
)
def test_classes_are_different(tmp_path, classes):
    path = labelled(tmp_path, ["a", "b"] * 9)
    assert "classes must be the different values of 'y'" in refused(
        path, classes=classes
    )


def test_a_class_may_be_written_with_leading_zeros(tmp_path):
    path = labelled(tmp_path, ["01", "1"] * 20)
    assert "one value only" in refused(path)
    own = data.load("csv", path, dtype={"y": "category"})
    assert own.class_names == ("01", "1")
    again = data.load("csv", path, dtype={"y": "category"}, classes=["1", "01"])
    assert again.class_names == ("1", "01")
    assert (again.train.y == 1 - own.train.y).all()


def test_a_file_that_is_all_test_rows(tmp_path):
    message = refused(labelled(tmp_path, ["a", "b"]), test_fraction=0.9)
    assert "leaves none to train on" in message


# --------------------------------------------------------------------- a client's file


def test_a_clients_own_file_takes_the_same_options(tmp_path):
    content = "a;b;y\n" + "1,5;2;0\n?;3;1\n2,5;4;1\n"
    path = csv(tmp_path, content)
    options = {"sep": ";", "decimal": ",", "na_values": ["?"]}
    with pytest.raises(DataError, match="data row 2: '\\?'"):
        data.load_client(path, 0.0, **options)
    client = data.load_client(path, 0.0, drop_missing=True, drop=["other"], **options)
    np.testing.assert_array_equal(client.train.x, [[1.5, 2], [2.5, 4]])
    assert client.train.y.tolist() == [0, 1]
    with pytest.raises(DataError, match="separated by ';'"):
        data.load_client(path)


def test_a_clients_labels_may_be_whole_floats(tmp_path):
    client = data.load_client(labelled(tmp_path, ["0.0", "2.0", "1.0"]), 0.0)
    assert client.train.y.tolist() == [0, 2, 1]
    with pytest.raises(DataError, match=r"'y' is float64 .*regression"):
        data.load_client(labelled(tmp_path, ["0.5", "2.0"]), 0.0)
    with pytest.raises(DataError, match=r"'y' is .*'dog'.*Give integer classes"):
        data.load_client(labelled(tmp_path, ["dog", "cat"]), 0.0)


def test_a_mark_in_a_clients_numbers_is_told(tmp_path):
    path = csv(
        tmp_path, "a,y\n" + "".join(f"{i}.5,{i % 2}\n" for i in range(30)) + "?,1\n"
    )
    with pytest.raises(DataError, match=r"holds numbers, but '\?' in data row 31"):
        data.load_client(path)


# --------------------------------------------------------------------- real data


@pytest.fixture
def schools():
    import os

    folder = os.environ.get("FEDWEIGHT_DATA")
    if not folder or not (Path(folder) / "schools").is_dir():
        pytest.skip("FEDWEIGHT_DATA does not name a folder that has schools/ in it")
    return Path(folder) / "schools"


def test_real_schools(schools):
    own = data.load("csv", schools / "chem97.csv", label="score", client="school")
    assert own.class_names == ("0", "2", "4", "6", "8", "10")
    assert len(own.natural_names) == 2410
    message = refused(schools / "egsingle.csv", label="math")
    assert "regression" in message
    own = data.load(
        "csv", schools / "egsingle.csv", label="retained", client="schoolid"
    )
    assert (own.class_names, len(own.natural_names)) == (("0", "1"), 60)
