"""What clients keep beyond a run: personal models, and what objectives carry.

One safetensors file for each of the two, a row a client, in the order of the clients'
numbers. Rows are written and read some at a time: together they may be larger than the
memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..clients.client_state import BUFFERS, CARRY, INTEGERS, KEPT, PARAMETERS
from ..core.client_store import ClientStore
from ..core.errors import DataError, closest
from ..core.layout import Layout
from ..core.texts import plain, shown
from ..core.writing import cannot_write, written_aside

# The tables of the store that are written, and their files.
FILES = {
    "personal": "personal-models.safetensors",
    "objective": "client-states.safetensors",
}

# Whose a row is, and how many examples it keeps something of.
CLIENT, LENGTH = "$client", "$length"

# So many bytes of rows are in memory at a time, about.
BLOCK = 16 << 20

_DTYPES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bool": "BOOL"},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Column:
    """A tensor of the file: what of a row it is, and where it goes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    of: str
    place: slice | None = None

    def taken(self, arrays: Mapping[str, Array]) -> Array:
        """Return it of some rows, ``[C, *shape]``, or the values of their examples."""
        values = arrays[self.of]
        values = values if self.place is None else values[:, self.place]
        return values.reshape(-1, *self.shape).astype(self.dtype, copy=False)


def write_kept(folder: Path, store: ClientStore, layout: Callable[[], Layout]) -> None:
    """Write what clients keep into a run's folder; nothing of what nobody keeps.

    Parameters
    ----------
    folder : Path
        The run's.
    store : ClientStore
        Where it lies.
    layout : Callable[[], Layout]
        Returns that of the personal models; asked if there are any.

    Raises
    ------
    OutputError
        If a file cannot be written; it is not there then.
    """
    for table, name in FILES.items():
        clients = store.clients(table)
        if len(clients):
            path = folder / name
            try:
                with written_aside(path) as file:
                    _write(file, store, table, clients, layout)
            except OSError as error:
                raise cannot_write(path, error) from error


def _write(
    file: Any,
    store: ClientStore,
    table: str,
    clients: Array,
    layout: Callable[[], Layout],
) -> None:
    first = store.read(table, clients[:1])
    size = sum(a.nbytes for a in (*first.arrays.values(), *first.items.values()))
    step = max(1, BLOCK // max(1, size))
    blocks = [clients[k : k + step] for k in range(0, len(clients), step)]
    of_rows = _columns(first.arrays, layout)
    of_examples = [
        _Column(name, (), str(values.dtype), name)
        for name, values in first.items.items()
    ]
    counted = 0
    if of_examples:
        lengths = [int(store.read(table, some).lengths.sum()) for some in blocks]
        counted = sum(lengths)
        of_rows.append(_Column(LENGTH, (), "int64", LENGTH))
    of_rows.append(_Column(CLIENT, (), "int64", CLIENT))
    header, starts, end = {}, {}, 0
    # The widest numbers first: all then lie where their width divides the place.
    columns = [*of_rows, *of_examples]
    columns.sort(key=lambda one: -np.dtype(one.dtype).itemsize)
    for one in columns:
        rows = counted if one in of_examples else len(clients)
        begin = end
        end += rows * math.prod(one.shape) * np.dtype(one.dtype).itemsize
        starts[one.name] = begin
        header[one.name] = {
            "dtype": _DTYPES[one.dtype],
            "shape": [rows, *one.shape],
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    data = file.tell()
    for some in blocks:
        found = store.read(table, some)
        arrays = {**found.arrays, **found.items}
        arrays |= {CLIENT: found.clients, LENGTH: found.lengths}
        for one in columns:
            values = np.ascontiguousarray(one.taken(arrays))
            file.seek(data + starts[one.name])
            file.write(values.data if values.size else b"")
            starts[one.name] += values.nbytes


def _columns(
    arrays: Mapping[str, Array], layout: Callable[[], Layout]
) -> list[_Column]:
    """Return what rows of arrays are written as: of models tensor by tensor."""
    columns = []
    vectors = {"parameter": PARAMETERS, "buffer": BUFFERS}
    if PARAMETERS in arrays:
        for e in layout().entries:
            if e.kind in vectors:
                place = slice(e.start, e.stop)
                columns.append(
                    _Column(e.name, e.shape, e.dtype, vectors[e.kind], place)
                )
    for name, values in arrays.items():
        if name not in vectors.values():
            shape, dtype = values.shape[1:], str(values.dtype)
            columns.append(_Column(name.removeprefix(INTEGERS), shape, dtype, name))
    return columns


class PerClient(Mapping[int, dict[str, Tensor]]):
    """What each client keeps, by its number or name; a row is read when asked for.

    Parameters
    ----------
    path : Path
        The file.
    name_of : Callable[[int], str]
        What a client is called.
    others : Callable[[], Mapping[str, Tensor]], optional
        Returns the tensors that all have in common, of models. Then what is carried
        besides is left out; else the models are.
    """

    def __init__(
        self,
        path: Path,
        name_of: Callable[[int], str],
        others: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.path = path
        self._others = others
        self._common: Mapping[str, Tensor] | None = None
        with self._opened() as file:
            self._names = [
                name
                for name in file.keys()  # noqa: SIM118
                if name not in (CLIENT, LENGTH)
                and name.startswith((CARRY, KEPT)) != bool(others)
            ]
            clients = file.get_tensor(CLIENT).tolist()
            self._ends: list[int] = []
            if LENGTH in file.keys():  # noqa: SIM118
                self._ends = file.get_tensor(LENGTH).cumsum(0).tolist()
        self._row = {client: row for row, client in enumerate(clients)}
        self._called = name_of
        self._by_name: dict[str, int] | None = None

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, "pt") as file:
                yield file
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{self.path} cannot be read: {plain(error)}.") from error

    def __getitem__(self, client: int | str) -> dict[str, Tensor]:
        """Return what a client keeps, by name; copies.

        Raises
        ------
        KeyError
            If it keeps nothing.
        """
        row = self._row[self._number(client)]
        if self._common is None:
            self._common = self._others() if self._others else {}
        found = dict(self._common)
        with self._opened() as file:
            for name in self._names:
                rows = slice(row, row + 1)
                if name.startswith(KEPT):
                    begin = self._ends[row - 1] if row else 0
                    found[name] = file.get_slice(name)[begin : self._ends[row]]
                else:
                    found[name] = file.get_slice(name)[rows][0]
        return {name: values.clone() for name, values in found.items()}

    def _number(self, client: int | str) -> int:
        if not isinstance(client, str):
            return client
        if self._by_name is None:
            self._by_name = {self._called(one): one for one in self._row}
        if client not in self._by_name:
            raise KeyError(
                f"no client that keeps something is called {shown(client)}."
                f"{closest(client, self._by_name)}"
            )
        return self._by_name[client]

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of the clients that keep something, ascending."""
        return iter(self._row)

    def __len__(self) -> int:
        """Return how many clients keep something."""
        return len(self._row)

    def __repr__(self) -> str:
        return f"PerClient({str(self.path)!r}: {len(self)} clients)"
