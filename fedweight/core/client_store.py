"""What simulated clients keep from round to round: rows, by the client's number.

It is read and written for many clients at once, as arrays ``[C, ...]``. Rows are only
ever appended; an index says which is a client's newest. The newest rows are in memory,
and once those are many, or a checkpoint wants them, they go to the end of a file. So a
checkpoint holds lengths, and costs what was written since the last one.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from .errors import ClientError, DataError, OutputError

Indices = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

# Rows in memory take no more than about so many bytes.
MEMORY = 64 << 20

# Files are read and copied so many bytes at a time.
BLOCK = 16 << 20

# What a row has besides arrays: whose it is, and which items belong to it.
CLIENT, START, LENGTH = "$client", "$start", "$length"


@dataclass(frozen=True)
class ClientRows:
    """What C clients keep for one purpose.

    Attributes
    ----------
    clients : ndarray
        ``[C]``, int64: their numbers, from 0; none twice.
    arrays : Mapping[str, ndarray]
        ``[C, ...]`` each, by name.
    items : Mapping[str, ndarray]
        ``[N]`` each, by name: of every client as many values as ``lengths`` says, one
        client's after the other's.
    lengths : ndarray
        ``[C]``, int64.
    """

    clients: Indices
    arrays: Mapping[str, Array] = field(default_factory=dict)
    items: Mapping[str, Array] = field(default_factory=dict)
    lengths: Indices = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        """Let clients without items have 0 of them."""
        if not self.items:
            none = np.zeros(len(self.clients), np.int64)
            object.__setattr__(self, "lengths", none)

    @property
    def ends(self) -> Indices:
        """``[C]``: where each client's items end."""
        return np.cumsum(self.lengths)


class _Records:
    """Records of one kind that only grow: in a file, and the newest ones in memory.

    Parameters
    ----------
    dtype : dtype
        Of a record.
    path : Callable[[], Path]
        Names the file, when there has to be one.

    Attributes
    ----------
    count, filed : int
        How many there are, and how many of them are in the file.
    """

    def __init__(self, dtype: np.dtype[Any], path: Callable[[], Path]) -> None:
        self.dtype = dtype
        self.path = path
        self.count = self.filed = 0
        self._memory = np.empty(0, dtype)
        self._mapped: Array | None = None
        self._looked = 0  # Bytes that were read from where the file is mapped.
        self._unsynced = False
        self._digest = _new_digest()

    @property
    def bytes_held(self) -> int:
        """How many bytes those in memory have."""
        return (self.count - self.filed) * self.dtype.itemsize

    def append(self, records: Array) -> None:
        """Add some at the end."""
        held = self.count - self.filed
        size = held + len(records)
        if size > len(self._memory):
            grown = np.zeros(max(2 * held, size), self.dtype)  # Gaps, too.
            grown[:held] = self._memory[:held]
            self._memory = grown
        self._memory[held:size] = records
        self.count += len(records)

    def take(self, places: Indices, name: str) -> Array:
        """Return a copy of what some records have under a name."""
        held = self._memory[: self.count - self.filed][name]
        in_file = places < self.filed
        if not in_file.any():
            return held[places - self.filed]
        read = self._in_file()[name][places[in_file]]
        self._looked += read.nbytes
        if self._looked > BLOCK:  # Pages that were read count as memory in use.
            self._mapped, self._looked = None, 0
        if len(read) == len(places):
            return read
        found = np.empty((len(places), *held.shape[1:]), held.dtype)
        found[in_file] = read
        found[~in_file] = held[places[~in_file] - self.filed]
        return found

    def _in_file(self) -> Array:
        if self._mapped is None:
            with self.path().open("rb") as file:
                size = self.filed * self.dtype.itemsize
                pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            self._mapped = np.frombuffer(pages, self.dtype)
        return self._mapped

    def spill(self) -> None:
        """Move what is in memory to the end of the file."""
        if self.count == self.filed:
            return
        data = self._memory[: self.count - self.filed].view(np.uint8)
        path = self.path()
        try:
            with path.open("r+b" if self.filed else "w+b") as file:
                # What lies beyond was never counted.
                file.seek(self.filed * self.dtype.itemsize)
                file.write(data.data)
        except OSError as error:
            raise _cannot_write(path, error) from error
        self._digest.update(data)
        self._memory, self._mapped = np.empty(0, self.dtype), None
        self.filed, self._unsynced = self.count, True

    def sync(self) -> None:
        """Have all of the file on the disk."""
        if self._unsynced:
            path = self.path()
            try:
                with path.open("r+b") as file:
                    os.fsync(file.fileno())
            except OSError as error:
                raise _cannot_write(path, error) from error
            self._unsynced = False

    def mark(self) -> tuple[int, int, Any]:
        """Return what :meth:`cut` goes back to."""
        return self.count, self.filed, self._digest.copy()

    def cut(self, mark: tuple[int, int, Any]) -> None:
        """Let go of what came after a mark."""
        count, filed, digest = mark
        if self.filed > count:  # It has gone to the file meanwhile.
            digest.update(self._in_file()[filed:count].view(np.uint8))
            self._memory, self._mapped = np.empty(0, self.dtype), None
            self.filed, self._digest = count, digest
        self.count = count

    @property
    def state(self) -> list[Any]:
        """How many records are in the file, and their digest."""
        return [self.filed, self._digest.hexdigest()]

    def restore(self, state: Sequence[Any]) -> Iterator[Array]:
        """Go on with a file as it was then; yield its records, some at a time.

        Raises
        ------
        DataError
            If the file is missing, shorter, or altered.
        """
        self.count = self.filed = int(state[0])
        left, most = self.filed, max(1, BLOCK // max(1, self.dtype.itemsize))
        path = self.path()
        if left:
            try:
                with path.open("rb") as file:
                    while left:
                        wanted = min(left, most) * self.dtype.itemsize
                        data = file.read(wanted)
                        if len(data) < wanted:
                            raise DataError(
                                f"{path} is shorter than when the checkpoint was "
                                "written. It has been changed since."
                            )
                        self._digest.update(data)
                        records = np.frombuffer(data, self.dtype)
                        left -= len(records)
                        yield records
            except OSError as error:
                raise DataError(
                    f"{path} cannot be read, which holds what clients kept when the "
                    f"checkpoint was written: {error.strerror or error}."
                ) from error
        if self._digest.hexdigest() != state[1]:
            raise DataError(f"{path} has been altered since it was written.")


Kinds = Sequence[tuple[str, str, Sequence[int]]]


class _Table:
    """The rows of one purpose.

    Parameters
    ----------
    arrays, items : sequence of tuple
        Name, dtype and shape of what a row has, and of what an item has.
    path : Callable[[int, str], Path]
        Names the file of a slot and an ending.
    slot : int
        0 or 1: which of two files it is; the other one is what it was made of.
    """

    def __init__(
        self,
        arrays: Kinds,
        items: Kinds,
        path: Callable[[int, str], Path],
        slot: int = 0,
    ) -> None:
        self.arrays, self.item_arrays = _as_kinds(arrays), _as_kinds(items)
        self.path = path
        self.slot = slot
        head = [(name, "<i8", ()) for name in (CLIENT, START, LENGTH)]
        kind = np.dtype([*head, *self.arrays], align=True)
        self.rows = _Records(kind, lambda: path(slot, "rows"))
        kind = np.dtype(self.item_arrays, align=True)
        self.items = _Records(kind, lambda: path(slot, "items"))
        self.index = np.empty(0, np.int64)  # By client: the number of its row, or -1.
        self.live = 0  # How many clients have a row.

    @property
    def parts(self) -> tuple[_Records, _Records]:
        """Rows and items."""
        return self.rows, self.items

    def read(self, clients: Indices, beginning: tuple[str, ...]) -> ClientRows:
        """Return the newest rows of those of some clients who have one."""
        numbers = np.full(len(clients), -1)
        known = clients < len(self.index)
        numbers[known] = self.index[clients[known]]
        has = numbers >= 0
        numbers = numbers[has]
        names = [n for n, *_ in self.arrays if n.startswith(beginning)]
        found = {name: self.rows.take(numbers, name) for name in names}
        names = [n for n, *_ in self.item_arrays if n.startswith(beginning)]
        if not names:
            return ClientRows(clients[has], found)
        lengths = self.rows.take(numbers, LENGTH)
        before = np.cumsum(lengths) - lengths
        starts = self.rows.take(numbers, START)
        places = np.repeat(starts - before, lengths) + np.arange(lengths.sum())
        items = {name: self.items.take(places, name) for name in names}
        return ClientRows(clients[has], found, items, lengths)

    def write(self, rows: ClientRows) -> Indices:
        """Append rows; return the numbers of those that they replace."""
        records = np.zeros(len(rows.clients), self.rows.dtype)
        records[CLIENT] = rows.clients
        records[LENGTH] = rows.lengths
        records[START] = self.items.count + rows.ends - rows.lengths
        for name, values in rows.arrays.items():
            records[name] = values
        items = np.zeros(int(rows.lengths.sum()), self.items.dtype)
        for name, values in rows.items.items():
            items[name] = values
        numbers = np.arange(self.rows.count, self.rows.count + len(records))
        self.items.append(items)
        self.rows.append(records)
        return self._point(rows.clients, numbers)

    def _point(self, clients: Indices, numbers: Indices) -> Indices:
        """Let rows be the newest of some clients; return those that were."""
        size = int(clients.max(initial=-1)) + 1
        if size > len(self.index):
            index = np.full(max(size, 2 * len(self.index)), -1)
            index[: len(self.index)] = self.index
            self.index = index
        before = self.index[clients]
        self.index[clients] = numbers
        self.live += int((numbers >= 0).sum()) - int((before >= 0).sum())
        return before

    def undo(self, clients: Indices, before: Indices) -> None:
        """Let clients have the rows again that a write has replaced."""
        self._point(clients, before)

    def compacted(self) -> _Table:
        """Return a table of the newest rows alone; in the other file if one is."""
        slot = 1 - self.slot if self.rows.filed else self.slot
        fresh = _Table(self.arrays, self.item_arrays, self.path, slot)
        step = max(1, BLOCK // self.rows.dtype.itemsize)
        for first in range(0, self.rows.count, step):
            numbers = np.arange(first, min(first + step, self.rows.count))
            clients = self.rows.take(numbers, CLIENT)
            newest = clients[self.index[clients] == numbers]
            fresh.write(self.read(newest, ("",)))
            if self.rows.filed:
                fresh.spill()
        return fresh

    def spill(self) -> None:
        """Move what is in memory to the files."""
        for part in self.parts:
            part.spill()

    @property
    def state(self) -> dict[str, Any]:
        """What :meth:`restored` needs."""
        return {
            "slot": self.slot,
            "arrays": [[name, kind, [*shape]] for name, kind, shape in self.arrays],
            "item-arrays": [[n, kind, [*s]] for n, kind, s in self.item_arrays],
            "rows": self.rows.state,
            "items": self.items.state,
        }

    @classmethod
    def restored(
        cls, state: Mapping[str, Any], path: Callable[[int, str], Path]
    ) -> Self:
        """Return the table as it was then."""
        table = cls(state["arrays"], state["item-arrays"], path, state["slot"])
        first = 0
        for records in table.rows.restore(state["rows"]):
            # Of several rows of one client the last one counts.
            clients, place = np.unique(records[CLIENT][::-1], return_index=True)
            table._point(clients, first + len(records) - 1 - place)
            first += len(records)
        for _ in table.items.restore(state["items"]):
            pass
        return table


class ClientStore:
    """The rows of all simulated clients, in tables by purpose.

    Several threads may use it.

    Parameters
    ----------
    memory : int
        About how many bytes of rows may be in memory after :meth:`relieve`, 0 or more.

    Examples
    --------
    >>> store = ClientStore()
    >>> models = np.ones((2, 3), np.float32)
    >>> store.write("personal", ClientRows(np.array([7, 4]), {"model": models}))
    >>> found = store.read("personal", np.array([4, 5]))
    >>> found.clients.tolist(), found.arrays["model"].tolist()
    ([4], [[1.0, 1.0, 1.0]])
    """

    def __init__(self, memory: int = MEMORY) -> None:
        self.memory = memory
        self._lock = threading.RLock()
        self._folder: Path | None = None
        self._tables: dict[str, _Table] = {}
        self._is_kept = False  # Whether a checkpoint goes on with the files.
        # What was written since a round began, and how long tables were then.
        self._staged: list[tuple[str, Indices, Indices]] | None = None
        self._marks: dict[str, list[tuple[int, int, Any]]] = {}

    @classmethod
    def of(cls, rows: Mapping[str, ClientRows]) -> Self:
        """Return a store of some clients away from theirs; see :meth:`written`.

        Where many write at once, as worker processes do, each has the rows of its
        clients in one, and theirs takes over what they have written.
        """
        store = cls()
        for table, some in rows.items():
            store.write(table, some)
        store._staged = []
        return store

    # Rows.

    def read(
        self, table: str, clients: Indices, beginning: tuple[str, ...] = ("",)
    ) -> ClientRows:
        """Return what some clients keep.

        Parameters
        ----------
        table : str
            For which purpose.
        clients : ndarray
            ``[C]``, int64; none twice.
        beginning : tuple of str
            Only what has names that begin so.

        Returns
        -------
        ClientRows
            Of those who keep something, in the order of ``clients``; copies.
        """
        with self._lock:
            if table not in self._tables:
                return ClientRows(clients[:0])
            return self._tables[table].read(clients, beginning)

    def write(self, table: str, rows: ClientRows) -> None:
        """Let clients keep something, in place of what they have kept before.

        Raises
        ------
        ClientError
            If it is not what others keep for the purpose: other names, shapes or
            dtypes.
        """
        if not len(rows.clients):
            return
        arrays, items = _kinds(rows.arrays), _kinds(rows.items)
        with self._lock:
            own = self._tables.get(table)
            if own is None:
                own = self._tables[table] = _Table(arrays, items, self._path_of(table))
            if (arrays, items) != (own.arrays, own.item_arrays):
                raise ClientError(
                    f"{table}: what a client keeps must have the names, shapes and "
                    f"dtypes that others' has. It has {[*arrays, *items]}, and others "
                    f"have {[*own.arrays, *own.item_arrays]}."
                )
            if self._staged is not None:
                marks = [part.mark() for part in own.parts]
                self._marks.setdefault(table, marks)
            before = own.write(rows)
            if self._staged is None:
                self._tidy(table)
            else:
                self._staged.append((table, rows.clients, before))

    @contextmanager
    def staged(self) -> Iterator[Callable[[], None]]:
        """Take back at the end of a ``with`` block what is written in it.

        Unless the function that it yields is called, which lets all of it stay.
        """
        with self._lock:
            self._staged, self._marks = [], {}
        try:
            yield self._commit
        finally:
            self._drop()

    def _commit(self) -> None:
        with self._lock:
            self._staged, self._marks = None, {}
            for table in self._tables:
                self._tidy(table)

    def _drop(self) -> None:
        with self._lock:
            for table, clients, before in reversed(self._staged or []):
                self._tables[table].undo(clients, before)
            for table, marks in self._marks.items():
                for part, mark in zip(self._tables[table].parts, marks, strict=True):
                    part.cut(mark)
            self._staged, self._marks = None, {}

    def written(self) -> dict[str, ClientRows]:
        """Return what clients of :meth:`of` have written since."""
        of_tables: dict[str, list[Indices]] = {}
        for table, clients, _ in self._staged or []:
            of_tables.setdefault(table, []).append(clients)
        return {
            table: self.read(table, np.unique(np.concatenate(clients)))
            for table, clients in of_tables.items()
        }

    # Files.

    def relieve(self) -> None:
        """Move rows to files if there are more in memory than there may be.

        Raises
        ------
        OutputError
            If they cannot be written.
        """
        with self._lock:
            tables = self._tables.values()
            held = sum(part.bytes_held for t in tables for part in t.parts)
            if held > self.memory:
                for table in tables:
                    table.spill()

    def _tidy(self, table: str, *, checkpoint: bool = False) -> None:
        """Leave out old rows where they are more than the newest.

        What a checkpoint goes on with stays as it is until the next one.
        """
        own = self._tables[table]
        if own.rows.count > 2 * own.live and (
            checkpoint or not (own.rows.filed and self._is_kept)
        ):
            self._tables[table] = own.compacted()
            if not self._is_kept:
                self._sweep()

    def _sweep(self) -> None:
        """Remove files that are no table's."""
        if self._folder is None:
            return
        own = {p.path() for t in self._tables.values() for p in t.parts if p.filed}
        for path in self._folder.iterdir():
            if is_file_name(path.name) and path not in own:
                path.unlink(missing_ok=True)

    def _path_of(self, table: str) -> Callable[[int, str], Path]:
        return lambda slot, ending: (
            self._place() / f"client-store-{table}-{slot}.{ending}"
        )

    def _place(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="fedweight-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    def keep_in(self, folder: Path) -> None:
        """Say where files go, before there are any; else to a temporary folder."""
        assert self._folder in (None, folder)
        self._folder = folder

    def secure(self) -> dict[str, Any]:
        """Bring all rows to files that are on the disk, between two rounds.

        Returns
        -------
        dict
            What :meth:`restore` goes on with. Once it is written down, say so with
            :meth:`release`.

        Raises
        ------
        OutputError
            If they cannot be written.
        """
        with self._lock:
            for name in self._tables:
                self._tidy(name, checkpoint=True)
            for table in self._tables.values():
                table.spill()
                for part in table.parts:
                    part.sync()
            return {name: t.state for name, t in self._tables.items() if t.live}

    def release(self) -> None:
        """Remove files of before the last :meth:`secure`: nobody goes on with them."""
        with self._lock:
            self._is_kept = True
            self._sweep()

    def restore(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Go on with the files of a folder as they were then.

        What was written later is ignored.

        Raises
        ------
        DataError
            If a file is missing, shorter or altered; the message names it.
        """
        self.keep_in(folder)
        self._tables = {
            name: _Table.restored(of_table, self._path_of(name))
            for name, of_table in state.items()
        }
        self.release()

    def clear(self) -> None:
        """Let go of all rows, and remove their files."""
        with self._lock:
            self._tables, self._is_kept = {}, False
            self._sweep()


def is_file_name(name: str) -> bool:
    """Tell whether a file is called as those of a store are.

    Examples
    --------
    >>> is_file_name("client-store-personal-0.rows")
    True
    """
    return re.fullmatch(r"client-store-[a-z]+-[01]\.(rows|items)", name) is not None


def _new_digest() -> Any:
    return hashlib.blake2b(digest_size=32)


def _kinds(arrays: Mapping[str, Array]) -> list[tuple[str, str, tuple[int, ...]]]:
    return sorted((name, a.dtype.str, a.shape[1:]) for name, a in arrays.items())


def _as_kinds(kinds: Kinds) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, kind, tuple(shape)) for name, kind, shape in kinds]


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path} cannot be written: {error.strerror or error}. What was written before "
        "is whole. Make room, or name another folder."
    )
