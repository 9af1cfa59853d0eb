import csv
import math
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedweight.errors import ConfigurationError
from fedweight.studies import folder as folder_module
from fedweight.studies.folder import Table, new_folder, write_whole


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_a_new_folder_has_a_free_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [new_folder(None, "a").as_posix() for _ in range(3)]
    assert made == ["runs/a", "runs/a-2", "runs/a-3"]
    assert all((tmp_path / name).is_dir() for name in made)


@pytest.mark.parametrize("name", ["/etc/x", "../../x", "a/b", "a\\b"])
def test_a_runs_name_never_leads_out_of_runs(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    made = new_folder(None, name)
    assert made.resolve().parent == tmp_path / "runs"


def test_a_folder_of_ones_own_must_be_empty(tmp_path):
    assert new_folder(tmp_path / "x" / "y", "a") == tmp_path / "x" / "y"
    assert new_folder(tmp_path / "x" / "y", "a").is_dir()
    (tmp_path / "x" / "y" / ".hidden").touch()
    with pytest.raises(ConfigurationError, match="not an empty folder"):
        new_folder(tmp_path / "x" / "y", "a")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="not an empty folder"):
        new_folder(tmp_path / "file", "a")


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot be made") as caught:
        new_folder(tmp_path / "file" / "run", "a")
    assert str(tmp_path / "file") in str(caught.value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()
    with pytest.raises(ConfigurationError, match="cannot be made"):
        new_folder(None, "a")
    for out in ("a\0b", "x" * 5000):
        with pytest.raises(ConfigurationError, match="--out"):
            new_folder(out, "a")


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    write_whole(path, "before é\n")
    assert path.read_bytes() == "before é\n".encode()
    write_whole(path, b"bytes")
    assert path.read_bytes() == b"bytes"

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folder_module.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_whole(path, "half")
        with pytest.raises(OSError, match="No space"):
            write_whole(tmp_path / "new.csv", "half")
    assert path.read_bytes() == b"bytes"
    assert not (tmp_path / "new.csv").exists()
    write_whole(path, "after")
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == [
        "a.csv"
    ]
    assert path.read_text() == "after"


def test_whoever_reads_while_it_is_written_sees_a_whole_file(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    write_whole(path, "one\n")
    seen = []
    sync = os.fsync

    def look(descriptor):
        seen.append(path.read_text())
        sync(descriptor)

    monkeypatch.setattr(folder_module.os, "fsync", look)
    write_whole(path, "one\ntwo\n")
    assert seen == ["one\n"]
    assert path.read_text() == "one\ntwo\n"


def test_a_table_grows_by_rows_and_columns(tmp_path):
    table = Table(tmp_path / "t.csv", ["round", "reason"])
    table.append([{"round": 1, "reason": 'said "no, never"'}])
    table.append([{"round": 2, "cosine": 0.5}])
    table.append([{"reason": "two\nlines", "extra": "x,y", "round": 3}])
    table.write()
    assert read(tmp_path / "t.csv") == [
        ["round", "reason", "cosine", "extra"],
        ["1", 'said "no, never"', "", ""],
        ["2", "", "0.5", ""],
        ["3", "two\nlines", "", "x,y"],
    ]


def test_floats_are_written_in_full_and_nothing_as_nothing(tmp_path):
    table = Table(tmp_path / "t.csv", ["a", "b", "c", "d"])
    table.append([{"a": 0.1 + 0.2, "b": math.nan, "c": None, "d": math.inf}])
    table.write()
    assert read(tmp_path / "t.csv")[1] == ["0.30000000000000004", "", "", "inf"]


def test_the_first_rows_are_there_at_once(tmp_path):
    table = Table(tmp_path / "t.csv", ["a"])
    table.append([{"a": 1}])
    assert read(tmp_path / "t.csv") == [["a"], ["1"]]


def test_a_table_rests_after_it_was_written_and_then_has_everything(
    tmp_path, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr(folder_module.time, "monotonic", lambda: now[0])
    sync = os.fsync

    def slow(descriptor):
        now[0] += 1.0
        sync(descriptor)

    monkeypatch.setattr(folder_module.os, "fsync", slow)
    table = Table(tmp_path / "t.csv", ["a"])
    table.append([{"a": 1}])  # takes a second
    now[0] += folder_module.REST - 1
    table.append([{"a": 2}])
    assert len(read(tmp_path / "t.csv")) == 2
    now[0] += 2
    table.append([{"a": 3}])
    assert read(tmp_path / "t.csv") == [["a"], ["1"], ["2"], ["3"]]


values = st.one_of(
    st.none(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(alphabet=st.sampled_from("ab,\"'\n ;é="), max_size=6),
)
table_rows = st.lists(
    st.dictionaries(st.sampled_from(["a", "b", "c,d", 'e"']), values), max_size=6
)


@given(rows=table_rows)
def test_any_table_can_be_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("t") / "t.csv"
    table = Table(path, ["first", "a"])
    for row in rows:
        table.append([row])
    table.write()
    header, *lines = read(path)
    assert header == table.columns
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        expected = ["" if row.get(c) is None else str(row[c]) for c in header]
        assert line == expected


def test_thousands_of_columns_are_written_in_seconds(tmp_path):
    """A class is a column of partition.csv; each used to be looked for in a list."""
    columns = ["client", *(f"label_{c}" for c in range(20_000))]
    table = Table(tmp_path / "t.csv", columns)
    began = time.perf_counter()
    table.append(dict.fromkeys(columns, k) for k in range(20))
    table.append([dict.fromkeys([*columns, "more"], 1)])
    table.write()
    assert time.perf_counter() - began < 10
    header, *lines = read(tmp_path / "t.csv")
    assert header == [*columns, "more"]
    assert lines[3] == ["3"] * len(columns) + [""]
    assert lines[-1] == ["1"] * len(header)
