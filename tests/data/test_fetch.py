"""Fetching, from a server of our own on this machine."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import threading

import pytest

from fedweight import data
from fedweight.core.errors import DataError
from fedweight.data.fetch import SOURCES, Source

PLAIN, PACKED = b"a,b\n1,2\n", b"some images"


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        self.server.asked.append(self.path)


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "plain.data").write_bytes(PLAIN)
    (folder / "packed.gz").write_bytes(gzip.compress(PACKED, mtime=123))
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked = []
        server.folder = folder
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def toy(server, monkeypatch):
    sums = {
        "plain.data": hashlib.sha256(PLAIN).hexdigest(),
        "packed.gz": hashlib.sha256(PACKED).hexdigest(),
    }
    monkeypatch.setitem(SOURCES, "toy", Source(server.url, sums))


def test_files_come_whole_and_once(server, tmp_path):
    folder = data.fetch("toy", tmp_path / "here" / "toy")
    assert sorted(p.name for p in folder.iterdir()) == ["packed.gz", "plain.data"]
    assert (folder / "plain.data").read_bytes() == PLAIN
    server.asked.clear()
    assert data.fetch("toy", folder) == folder
    assert server.asked == []


def test_a_damaged_file_is_fetched_again(server, tmp_path):
    folder = data.fetch("toy", tmp_path)
    (folder / "packed.gz").write_bytes(b"damaged")
    server.asked.clear()
    data.fetch("toy", folder)
    assert len(server.asked) == 1
    assert gzip.decompress((folder / "packed.gz").read_bytes()) == PACKED


@pytest.mark.parametrize("file", ["plain.data", "packed.gz"])
def test_a_wrong_file_is_removed(server, tmp_path, file):
    (server.folder / file).write_bytes(b"something else")
    with pytest.raises(DataError, match=f"{file} is not the file that was expected"):
        data.fetch("toy", tmp_path / "to")
    left = {path.name for path in (tmp_path / "to").iterdir()}
    assert left <= {"plain.data"} - {file}


def test_a_wrong_file_does_not_replace_what_was_there(server, tmp_path):
    (server.folder / "plain.data").write_bytes(b"something else")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "plain.data").write_bytes(b"mine")
    with pytest.raises(DataError):
        data.fetch("toy", tmp_path / "to")
    assert (tmp_path / "to" / "plain.data").read_bytes() == b"mine"


def test_a_missing_file_and_a_missing_server(server, tmp_path):
    (server.folder / "plain.data").unlink()
    with pytest.raises(DataError, match=r"could not be fetched.*404"):
        data.fetch("toy", tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []
    with pytest.raises(DataError, match="Check the connection"):
        data.fetch("toy", tmp_path / "to", base_url="http://127.0.0.1:9")


def test_a_mirror_and_the_default_folder(server, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDWEIGHT_DATA", str(tmp_path / "base"))
    monkeypatch.setitem(
        SOURCES, "toy", Source("http://127.0.0.1:9", SOURCES["toy"].files)
    )
    folder = data.fetch("toy", base_url=server.url + "/")
    assert folder == tmp_path / "base" / "toy" == data.default_folder("toy")


def test_the_default_folder_is_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("FEDWEIGHT_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.default_folder("adult") == tmp_path / ".cache" / "fedweight" / "adult"


@pytest.mark.parametrize(
    ("name", "url", "message"),
    [
        ("shakespeare", None, "cannot be fetched: the plays have no fixed public"),
        ("digits", None, "comes with scikit-learn"),
        ("adlt", None, "Did you mean 'adult'"),
        ("toy", "file:///etc", "must start with http"),
    ],
)
def test_what_cannot_be_fetched(tmp_path, name, url, message):
    with pytest.raises(DataError, match=message):
        data.fetch(name, tmp_path, base_url=url)


def test_every_checksum_is_a_sha256():
    sums = [sha for source in SOURCES.values() for sha in source.files.values()]
    assert all(len(bytes.fromhex(sha)) == 32 for sha in sums)
