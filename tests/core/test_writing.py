"""Files that are whole or not there."""

import os

import pytest

from fedweight.core import writing
from fedweight.core.errors import OutputError
from fedweight.core.writing import write_whole


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    write_whole(path, "before é\n")
    assert path.read_bytes() == "before é\n".encode()
    write_whole(path, b"bytes")
    assert path.read_bytes() == b"bytes"

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_whole(path, "half")
        with pytest.raises(OSError, match="No space"):
            write_whole(tmp_path / "new.csv", "half")
    assert path.read_bytes() == b"bytes"
    assert not (tmp_path / "new.csv").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]  # Nothing is left aside.
    write_whole(path, "after")
    assert path.read_text() == "after"


def test_an_interrupt_leaves_nothing_aside(tmp_path, monkeypatch):
    def stop(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing.os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.csv", "half")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_told_in_one_line(tmp_path):
    with pytest.raises(OutputError, match="No such file or directory") as caught:
        write_whole(tmp_path / "no" / "a.csv", "x")
    assert str(tmp_path / "no" / "a.csv") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whoever_reads_while_it_is_written_sees_a_whole_file(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    write_whole(path, "one\n")
    seen = []
    sync = os.fsync

    def look(descriptor):
        seen.append(path.read_text())
        sync(descriptor)

    monkeypatch.setattr(writing.os, "fsync", look)
    write_whole(path, "one\ntwo\n")
    assert seen == ["one\n"]
    assert path.read_text() == "one\ntwo\n"


def test_several_may_write_a_shared_file_at_a_time(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    sync, others = os.fsync, iter([2, 3])

    def meanwhile(descriptor):
        """Let another process write all of it before this one renames."""
        other = next(others, None)
        if other is not None:
            with monkeypatch.context() as patch:
                patch.setattr(writing.os, "getpid", lambda: -other)
                write_whole(path, f"{other}", shared=True)
        sync(descriptor)

    monkeypatch.setattr(writing.os, "fsync", meanwhile)
    write_whole(path, "1", shared=True)
    assert path.read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
