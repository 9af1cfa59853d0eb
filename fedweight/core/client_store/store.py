"""The store of what simulated clients keep."""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..errors import ClientError
from .records import Indices
from .table import ClientRows, Kinds, Table, kinds_of

# Rows in memory take no more than about so many bytes.
MEMORY = 32 << 20


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
        self._tables: dict[str, Table] = {}
        # Of what the last checkpoint goes on with the slot and the number of rows, and
        # of what the one does that is being written.
        self._kept: dict[str, tuple[int, int]] = {}
        self._secured: dict[str, tuple[int, int]] = {}
        # What was written since a round began, and how long tables were then.
        self._staged: list[tuple[str, Indices, Indices]] | None = None
        # None of a table that there was not.
        self._marks: dict[str, list[tuple[int, int, Any]] | None] = {}

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

    def clients(self, table: str) -> Indices:
        """Return the numbers of all clients that keep something, ascending."""
        with self._lock:
            if table not in self._tables:
                return np.empty(0, np.int64)
            return np.flatnonzero(self._tables[table].index >= 0)

    def write(self, table: str, rows: ClientRows) -> None:
        """Let clients keep something, in place of what they have kept before.

        Raises
        ------
        ClientError
            If it is not what others keep for the purpose: other names, shapes or
            dtypes.
        """
        self.write_all({table: rows})

    def write_all(self, rows: Mapping[str, ClientRows]) -> None:
        """Let clients keep something in several tables: in all of them, or in none.

        Raises
        ------
        ClientError
            As :meth:`write` does; nothing is written then.
        """
        with self._lock:
            some = {table: own for table, own in rows.items() if len(own.clients)}
            for table, own in some.items():
                self._check(table, own)
            for table, own in some.items():
                self._write(table, own)

    def _check(self, table: str, rows: ClientRows) -> None:
        """Refuse rows that are not of a table's kinds."""
        if table not in self._tables:
            return
        arrays, items, own = *_kinds(rows), self._tables[table]
        if (arrays, items) != (own.arrays, own.item_arrays):
            raise ClientError(
                f"{table}: what a client keeps must have the names, shapes and dtypes "
                f"that others' has. It has {[*arrays, *items]}, and others have "
                f"{[*own.arrays, *own.item_arrays]}."
            )

    def _write(self, table: str, rows: ClientRows) -> None:
        is_new = table not in self._tables
        if is_new:
            self._tables[table] = Table(*_kinds(rows), self._path_of(table))
        own = self._tables[table]
        if self._staged is not None:
            marks = None if is_new else [part.mark() for part in own.parts]
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
                if marks is None:  # What clients will keep in it may be of other kinds.
                    self._tables.pop(table).remove()
                    continue
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

        What a checkpoint goes on with stays as it is until the next one, and counts
        as old only then.
        """
        own = self._tables[table]
        slot, count = self._kept.get(table, (own.slot, 0))
        staying = count if slot == own.slot and not checkpoint else 0
        if own.rows.count - staying > 2 * own.live:
            free = {0, 1, 2} - {slot, own.slot}
            self._tables[table] = own.compacted(min(free))
            self._sweep()

    def _sweep(self) -> None:
        """Remove files that are no table's, and no checkpoint's."""
        if self._folder is None:
            return
        own = {p.path() for t in self._tables.values() for p in t.parts if p.filed}
        for table, (slot, _) in self._kept.items():
            own |= {self._path_of(table)(slot, end) for end in ("rows", "items")}
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
            state = {name: t.state for name, t in self._tables.items() if t.live}
            self._secured = _kept_of(state)
            return state

    def release(self) -> None:
        """Remove files of before the last :meth:`secure`: nobody goes on with them."""
        with self._lock:
            self._kept = self._secured
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
            name: Table.restored(of_table, self._path_of(name))
            for name, of_table in state.items()
        }
        self._secured = _kept_of(state)
        self.release()

    def clear(self) -> None:
        """Let go of all rows, and remove their files."""
        with self._lock:
            self._tables, self._kept = {}, {}
            self._sweep()


def _kinds(rows: ClientRows) -> tuple[Kinds, Kinds]:
    """Return the kinds of the arrays and of the items that rows have."""
    return kinds_of(rows.arrays), kinds_of(rows.items)


def _kept_of(state: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the slot and the number of rows of each table that was secured."""
    return {name: (of["slot"], of["rows"][0]) for name, of in state.items()}


def is_file_name(name: str) -> bool:
    """Tell whether a file is called as those of a store are.

    Examples
    --------
    >>> is_file_name("client-store-personal-0.rows")
    True
    """
    return re.fullmatch(r"client-store-[a-z]+-[0-2]\.(rows|items)", name) is not None
