"""Paths that a user names, and memory that something would take."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedweight.core import memory
from fedweight.core.errors import ConfigurationError, DataError
from fedweight.core.paths import absolute, clean_path, readable_file, why_unreadable


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("a\0b", "must not hold NUL"),
        ("x" * 5000, "longer than a path can be"),
        ("/".join(["x" * 200] * 30), "longer than a path can be"),
        ("C:\new\table.csv", "write a Windows path in single quotes"),
        ("~nobody-of-this-name/x", "data.path"),
        ("\udcff", "must be Unicode text"),
    ],
    ids=range(6),
)
def test_a_path_that_none_can_be_is_told(path, reason):
    for call in (clean_path, lambda what, p: absolute(what, p, Path("/tmp"))):
        with pytest.raises(ConfigurationError) as caught:
            call("data.path", path)
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300


def test_usual_paths_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert clean_path("x", "~/a.csv") == tmp_path / "a.csv"
    assert clean_path("x", "a b/é.csv") == Path("a b/é.csv")
    assert absolute("x", "../a.csv", tmp_path / "b") == tmp_path / "a.csv"


def test_a_loop_of_links_is_told(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert why_unreadable(tmp_path / "a") is not None
    with pytest.raises((ConfigurationError, DataError)):
        readable_file(absolute("x", "a", tmp_path), "csv")


def test_only_plain_files_are_read(tmp_path):
    file = tmp_path / "a.csv"
    with pytest.raises(DataError, match="needs the option path"):
        readable_file(None, "csv")
    with pytest.raises(
        DataError, match=r"a.csv does not exist. Give the path of a .csv"
    ):
        readable_file(file, "csv")
    with pytest.raises(DataError, match="it is a folder"):
        readable_file(tmp_path, "csv")
    with pytest.raises(DataError, match="a pipe or a device"):
        readable_file("/dev/zero", "csv")
    os.mkfifo(tmp_path / "pipe")
    assert why_unreadable(tmp_path / "pipe") == "it is a pipe or a device, not a file"
    file.touch()
    assert readable_file(str(file), "csv") == file
    assert why_unreadable(file / "b") == "Not a directory"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_told(tmp_path):
    file = tmp_path / "a.csv"
    file.touch(mode=0)
    assert why_unreadable(file) == "permission to read it is missing"


def test_what_the_machine_cannot_hold_is_refused(monkeypatch):
    there_is = memory.physical_memory()
    assert there_is is None or there_is > 10**8
    monkeypatch.setattr(memory, "physical_memory", lambda: 10**9)
    memory.check_memory("a table", 10**9, "Leave some out.")
    with pytest.raises(DataError, match=r"a table would take 2 GB .* Leave some out"):
        memory.check_memory("a table", 2e9, "Leave some out.", DataError)
    monkeypatch.setattr(memory, "physical_memory", lambda: None)
    memory.check_memory("a table", 1e30, "Leave some out.")
