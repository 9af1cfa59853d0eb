"""Records of one kind, the first of them in a file and the newest in memory."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..writing import cannot_write

Indices = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

# Files are read and copied so many bytes at a time.
BLOCK = 16 << 20

# Where a file is mapped, a system brings about so many bytes for one that is read.
NEIGHBOURS = 64 << 10


class Records:
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
        self._looked = 0  # About so many bytes of the file are mapped by now.
        self._unsynced = False
        self._digest: Any = hashlib.blake2b(digest_size=32)

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
        self._looked += len(read) * max(self.dtype.itemsize, NEIGHBOURS)
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
            raise cannot_write(path, error) from error
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
                raise cannot_write(path, error) from error
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
