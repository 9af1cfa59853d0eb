"""What clients keep: against a dictionary, and after kills at any byte."""

from __future__ import annotations

import copy
import gc
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from fedweight.core.client_store import ClientRows, ClientStore, is_file_name
from fedweight.core.errors import ClientError, DataError, OutputError

TABLES = ("personal", "objective")
CLIENTS = st.lists(st.integers(0, 30), unique=True, min_size=1, max_size=8)


def rows_of(table: str, clients: list[int], value: int) -> ClientRows:
    """Return rows that say what was written; of one table with items."""
    numbers = np.array(clients, np.int64)
    base = (1000 * value + numbers).astype(np.float32)
    arrays = {"model": base[:, None] + np.arange(3, dtype=np.float32), "n": numbers}
    if table == "personal":
        return ClientRows(numbers, arrays)
    lengths = numbers % 4
    items = {
        "u": np.repeat(base, lengths),
        "v": np.repeat(numbers, lengths) + value,
    }
    return ClientRows(numbers, {"n": arrays["n"] + value}, items, lengths)


def by_client(rows: ClientRows) -> dict[int, dict[str, Any]]:
    """Return rows one by one, as plain values."""
    found = {}
    for k, client in enumerate(rows.clients.tolist()):
        own = slice(rows.ends[k] - rows.lengths[k], rows.ends[k])
        found[client] = {
            **{name: values[k].tolist() for name, values in rows.arrays.items()},
            **{name: values[own].tolist() for name, values in rows.items.items()},
        }
    return found


class AgainstADictionary(RuleBasedStateMachine):
    """Reads, writes, rounds, checkpoints, kills and new beginnings."""

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[str, dict[int, Any]] = {table: {} for table in TABLES}
        self.written = 0
        self.round: Any = None
        self.before: Any = None
        self.checkpoint: Any = None

    @initialize(memory=st.sampled_from([0, 300, 1 << 20]))
    def begin(self, memory: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.memory = memory
        self.store = ClientStore(memory)
        self.store.keep_in(self.folder)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    @rule(table=st.sampled_from(TABLES), clients=CLIENTS)
    def write(self, table: str, clients: list[int]) -> None:
        self.written += 1
        rows = rows_of(table, clients, self.written)
        self.store.write(table, rows)
        self.model[table] |= by_client(rows)

    @rule(table=st.sampled_from(TABLES), clients=CLIENTS)
    def read(self, table: str, clients: list[int]) -> None:
        found = self.store.read(table, np.array(clients))
        own = self.model[table]
        assert found.clients.tolist() == [c for c in clients if c in own]
        assert by_client(found) == {c: own[c] for c in clients if c in own}

    @rule()
    def relieve(self) -> None:
        self.store.relieve()

    @precondition(lambda self: self.round is None)
    @rule()
    def begin_round(self) -> None:
        self.before = copy.deepcopy(self.model)
        self.round = self.store.staged()
        self.keep = self.round.__enter__()

    @precondition(lambda self: self.round is not None)
    @rule(good=st.booleans())
    def end_round(self, good: bool) -> None:
        if good:
            self.keep()
        else:
            self.model = self.before
        self.round.__exit__(None, None, None)
        self.round = None

    @precondition(lambda self: self.round is None)
    @rule(killed=st.booleans())
    def secure(self, killed: bool) -> None:
        """Write a checkpoint, or be killed before the old one is replaced."""
        state = self.store.secure()
        if not killed:
            self.checkpoint = state, copy.deepcopy(self.model)
            self.store.release()
        else:
            self.kill()

    @rule(torn=st.binary(max_size=50))
    def kill_with_a_torn_tail(self, torn: bytes) -> None:
        for path in self.folder.iterdir():
            with path.open("ab") as file:
                file.write(torn)
        self.kill()

    @rule(cut=st.integers(0, 400))
    def kill_in_the_middle_of_a_row(self, cut: int) -> None:
        state = self.checkpoint[0] if self.checkpoint else {}
        sizes = {
            part.path(): own[0] * part.dtype.itemsize
            for name, table in self.store._tables.items()
            for part, own in zip(
                table.parts,
                (state[name]["rows"], state[name]["items"])
                if name in state and state[name]["slot"] == table.slot
                else ((0,), (0,)),
                strict=True,
            )
        }
        for path, size in sizes.items():
            if path.exists():
                os.truncate(path, max(size, path.stat().st_size - cut))
        self.kill()

    def kill(self) -> None:
        """Go on from the last checkpoint, or from nothing."""
        self.round = None
        self.store = ClientStore(self.memory)
        state, model = self.checkpoint or ({}, {table: {} for table in TABLES})
        self.store.restore(self.folder, state)
        self.model = copy.deepcopy(model)

    @invariant()
    def everything_is_there(self) -> None:
        if hasattr(self, "store"):
            for table in TABLES:
                self.read(table, list(range(40)))
            assert all(is_file_name(path.name) for path in self.folder.iterdir())


TestAgainstADictionary = AgainstADictionary.TestCase
TestAgainstADictionary.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)


def filled(folder: Path, rounds: int = 3) -> tuple[ClientStore, dict[str, Any]]:
    store = ClientStore()
    store.keep_in(folder)
    for number in range(rounds):
        for table in TABLES:
            store.write(table, rows_of(table, [*range(10 * number, 30)], number))
    state = store.secure()
    store.release()
    return store, state


def test_a_checkpoint_costs_what_was_written_since(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, rounds=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    store.write("personal", rows_of("personal", [3], 9))
    size = store.secure()["personal"]["rows"][0]
    whole = (tmp_path / "client-store-personal-0.rows").read_bytes()
    old = before["client-store-personal-0.rows"]
    assert whole.startswith(old)
    assert (len(whole) - len(old)) * (size - 1) == len(old)
    same = "client-store-objective-0.rows"
    assert (tmp_path / same).read_bytes() == before[same]


def test_old_rows_go_at_a_checkpoint_once_they_are_more(tmp_path: Path) -> None:
    store, state = filled(tmp_path, rounds=1)
    path, other = (tmp_path / f"client-store-personal-{slot}.rows" for slot in (0, 1))
    size = path.stat().st_size
    for number in range(2):
        store.write("personal", rows_of("personal", [*range(30)], number))
    # What the last checkpoint goes on with is there until the next one is.
    later = store.secure()
    assert path.exists()
    again = ClientStore()
    again.restore(_copy(tmp_path), state)
    assert len(again.read("personal", np.arange(30)).clients) == 30
    store.release()
    assert not path.exists()
    assert other.stat().st_size == size
    assert later["personal"]["slot"] == 1


@pytest.mark.parametrize("table", TABLES)
def test_between_checkpoints_old_rows_go_too(tmp_path: Path, table: str) -> None:
    """The checkpoint's stay, and take their room once."""
    store = ClientStore(memory=0)
    store.keep_in(tmp_path)
    clients = [*range(30)]
    store.write(table, rows_of(table, clients, 0))
    state = store.secure()
    store.release()
    sizes: list[int] = []

    def size() -> int:
        return sum(path.stat().st_size for path in tmp_path.iterdir())

    one = size()
    for number in range(1, 50):
        with store.staged() as keep:
            store.write(table, rows_of(table, clients, number))
            store.relieve()
            keep()
        sizes.append(size())
    assert max(sizes) <= 6 * one
    again = ClientStore()
    again.restore(_copy(tmp_path), state)
    for found, number in ((again, 0), (store, 49)):
        assert by_client(found.read(table, np.arange(30))) == by_client(
            rows_of(table, clients, number)
        )
    store.secure()
    store.release()
    assert size() <= 3 * one


def _copy(folder: Path) -> Path:
    return Path(shutil.copytree(folder, folder.with_name(f"{folder.name}-copy")))


def test_files_that_were_altered_are_refused_by_name(tmp_path: Path) -> None:
    _, state = filled(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            altered = bytearray(whole)
            altered[place] ^= 1
            path.write_bytes(altered)
            with pytest.raises(DataError, match=f"{path.name} has been altered"):
                ClientStore().restore(tmp_path, state)
        path.write_bytes(whole[:-1])
        with pytest.raises(DataError, match=f"{path.name} is shorter"):
            ClientStore().restore(tmp_path, state)
        path.unlink()
        with pytest.raises(DataError, match=f"{path.name} cannot be read"):
            ClientStore().restore(tmp_path, state)
        path.write_bytes(whole)
    ClientStore().restore(tmp_path, state)


def test_what_others_do_not_keep_is_refused() -> None:
    store = ClientStore()
    store.write("personal", rows_of("personal", [1], 1))
    with pytest.raises(ClientError, match="personal: what a client keeps must have"):
        store.write("personal", rows_of("objective", [2], 1))
    wide = ClientRows(np.array([2]), {"model": np.zeros((1, 4), np.float32)})
    with pytest.raises(ClientError, match=r"\(4,\)"):
        store.write("personal", wide)
    assert store.read("personal", np.array([1, 2])).clients.tolist() == [1]


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_a_dropped_round_leaves_no_kinds_behind(tmp_path: Path, memory: int) -> None:
    store = ClientStore(memory)
    store.keep_in(tmp_path)

    def write(width: int) -> None:
        rows = {"model": np.ones((1, width), np.float32)}
        store.write("personal", ClientRows(np.array([2]), rows))
        store.relieve()

    with store.staged():
        write(2)
        write(2)
    assert list(tmp_path.iterdir()) == []
    assert store.read("personal", np.array([2])).clients.tolist() == []
    with store.staged() as keep:
        write(3)
        keep()
    assert store.read("personal", np.array([2])).arrays["model"].shape == (1, 3)
    with store.staged():
        write(3)
    with pytest.raises(ClientError, match=r"\(3,\)"):
        write(2)


def test_many_rounds_of_the_same_clients_take_no_more_memory() -> None:
    store = ClientStore()
    for number in range(50):
        with store.staged() as keep:
            store.write("objective", rows_of("objective", [*range(30)], number))
            keep()
    (table,) = store._tables.values()
    assert table.rows.count <= 3 * 30
    assert by_client(store.read("objective", np.arange(30))) == by_client(
        rows_of("objective", [*range(30)], 49)
    )


def test_rows_away_from_their_store() -> None:
    store = ClientStore.of({"personal": rows_of("personal", [4, 2], 1)})
    assert store.written() == {}
    for value in (2, 3):
        store.write("personal", rows_of("personal", [2], value))
    store.write("objective", rows_of("objective", [5, 4], 4))
    written = {table: by_client(rows) for table, rows in store.written().items()}
    assert written == {
        "personal": by_client(rows_of("personal", [2], 3)),
        "objective": by_client(rows_of("objective", [4, 5], 4)),
    }


def test_without_a_folder_files_are_temporary() -> None:
    store = ClientStore(memory=0)
    store.write("personal", rows_of("personal", [1], 1))
    store.relieve()
    folder = store._place()
    assert [p.name for p in folder.iterdir()] == ["client-store-personal-0.rows"]
    del store
    gc.collect()
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    store = ClientStore(memory=0)
    store.keep_in(tmp_path / "gone")
    store.write("personal", rows_of("personal", [1], 1))
    with pytest.raises(OutputError, match=r"client-store-personal-0\.rows"):
        store.relieve()
    # Nothing is lost.
    assert store.read("personal", np.array([1])).clients.tolist() == [1]
