"""The rows of all clients for one purpose, and which is each client's newest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from .records import BLOCK, Array, Indices, Records

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

    def only(self, clients: Collection[int]) -> ClientRows:
        """Return those of some clients.

        Examples
        --------
        >>> rows = ClientRows(np.array([7, 4]), {"n": np.array([1, 2])})
        >>> rows.only([4, 5]).arrays["n"].tolist()
        [2]
        """
        chosen = np.isin(self.clients, list(clients))
        of_items = np.repeat(chosen, self.lengths)
        return ClientRows(
            self.clients[chosen],
            {name: values[chosen] for name, values in self.arrays.items()},
            {name: values[of_items] for name, values in self.items.items()},
            self.lengths[chosen],
        )


# Names, dtypes and shapes.
Kinds = list[tuple[str, str, tuple[int, ...]]]


class Table:
    """The rows of one purpose.

    Parameters
    ----------
    arrays, items : list of tuple
        Name, dtype and shape of what a row has, and of what an item has.
    path : Callable[[int, str], Path]
        Names the file of a slot and an ending.
    slot : int
        0, 1 or 2: which of three files it is. Another one may be what it was made of,
        and another what a checkpoint goes on with.
    """

    def __init__(
        self,
        arrays: Kinds,
        items: Kinds,
        path: Callable[[int, str], Path],
        slot: int = 0,
    ) -> None:
        self.arrays, self.item_arrays = arrays, items
        self.path = path
        self.slot = slot
        head = [(name, "<i8", ()) for name in (CLIENT, START, LENGTH)]
        kind = np.dtype([*head, *self.arrays], align=True)
        self.rows = Records(kind, lambda: path(slot, "rows"))
        kind = np.dtype(self.item_arrays, align=True)
        self.items = Records(kind, lambda: path(slot, "items"))
        self.index = np.empty(0, np.int64)  # By client: the number of its row, or -1.
        self.live = 0  # How many clients have a row.

    @property
    def parts(self) -> tuple[Records, Records]:
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

    def compacted(self, slot: int) -> Table:
        """Return a table of the newest rows alone; in another file if it is in one."""
        fresh = Table(self.arrays, self.item_arrays, self.path, slot)
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

    def remove(self) -> None:
        """Remove the files of a table that no checkpoint knows."""
        for part in self.parts:
            if part.filed:
                part.path().unlink(missing_ok=True)

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
        arrays, items = (
            [(name, dtype, tuple(shape)) for name, dtype, shape in state[part]]
            for part in ("arrays", "item-arrays")
        )
        table = cls(arrays, items, path, state["slot"])
        first = 0
        for records in table.rows.restore(state["rows"]):
            # Of several rows of one client the last one counts.
            clients, place = np.unique(records[CLIENT][::-1], return_index=True)
            table._point(clients, first + len(records) - 1 - place)
            first += len(records)
        for _ in table.items.restore(state["items"]):
            pass
        return table


def kinds_of(arrays: Mapping[str, Array]) -> Kinds:
    """Return names, dtypes and shapes of what each client has of some arrays."""
    return sorted((name, a.dtype.str, a.shape[1:]) for name, a in arrays.items())
