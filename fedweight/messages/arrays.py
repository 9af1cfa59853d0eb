"""Models as Flower's records of arrays, without an array for each tensor."""

from __future__ import annotations

import re
import threading
from collections.abc import (
    Callable,
    Collection,
    ItemsView,
    Iterator,
    KeysView,
    ValuesView,
)
from io import BytesIO
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, RecordDict

from ..core.errors import AggregationError
from ..core.layout import STAYING, Base, FlatModel, Layout
from .records import records_of

# How BatchNorm and its kin name the running statistics in a state dict. A record
# that came by wire does not say what is trained, so the names have to.
BUFFER_NAMES = ("running_mean", "running_var")


# How NumPy begins the bytes of an array of numbers.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(?P<dtype>[<>|][biufc]\d+)', "
    rb"'fortran_order': (?P<fortran>False|True), "
    rb"'shape': \((?P<shape>|\d+,|\d+(?:, \d+)+)\), \} *\n",
    re.DOTALL,
)
_HEADER_LOCK = threading.Lock()


def view(array: Array) -> npt.NDArray[Any]:
    """Read an array of a record without copying it.

    Raises
    ------
    AggregationError
        If the bytes are not a plain NumPy array; objects are never unpickled.
    """
    try:
        shape, fortran, dtype, start = _read_header(array.data)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        if any(length < 0 for length in shape):
            raise ValueError(f"its shape is {shape}")
        count = int(np.prod(shape, dtype=np.int64))
        flat = np.frombuffer(array.data, dtype, count, start)
        values: npt.NDArray[Any] = flat.reshape(shape, order="F" if fortran else "C")
    # NumPy lets Python's parser look at the header, which anybody may have written:
    # any error gets out, RecursionError and MemoryError too.
    except Exception as error:
        raise AggregationError(
            f"an array cannot be read: {type(error).__name__}: {error}."
        ) from error
    return values


def _read_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return an array's shape, Fortran order, dtype, and where its values start.

    NumPy's reader has Python parse the header, in which two threads at once can fail
    (CPython before 3.11.8 and 3.12.2, issue 106905). So what NumPy writes for numbers
    is read here, and anything else by one of our threads at a time.
    """
    usual = _HEADER.match(data)
    if usual and usual.end() == 10 + int.from_bytes(data[8:10], "little"):
        shape = tuple(int(n) for n in usual["shape"].split(b",") if n.strip())
        dtype = np.dtype(usual["dtype"].decode())
        return shape, usual["fortran"] == b"True", dtype, usual.end()
    stream = BytesIO(data)
    with _HEADER_LOCK:
        version = np.lib.format.read_magic(stream)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        return *read(stream), stream.tell()


def layout_of(
    record: ArrayRecord,
    buffers: Collection[str] | None = None,
    frozen: Collection[str] | None = None,
) -> Layout:
    """Lay out a record of arrays.

    Parameters
    ----------
    record : ArrayRecord
        Named arrays, as a state dict gives them.
    buffers : Collection[str], optional
        Names of the floating arrays that change without being trained. By default
        those whose last part is ``running_mean`` or ``running_var``.
    frozen : Collection[str], optional
        Names of the floating arrays that never change; none by default.
    """
    if isinstance(record, FlatRecord) and record.flat is not None:
        return record.flat.layout
    if buffers is None:
        buffers = {n for n in record if n.rsplit(".", 1)[-1] in BUFFER_NAMES}
    shapes = {n: (a.shape, a.dtype) for n, a in record.items()}
    return Layout.of(shapes, buffers, frozen or ())


def flatten(
    record: ArrayRecord,
    layout: Layout,
    *,
    given: str = "the record",
    expected: str = "the model",
) -> FlatModel:
    """Read a record's arrays into vectors.

    Parameters
    ----------
    record : ArrayRecord
        Has the layout's names and shapes, in any order.
    layout : Layout
        What is expected.
    given, expected : str
        What an error calls the two.

    Raises
    ------
    AggregationError
        If a tensor is missing, unexpected, or of another shape or kind; the message
        names it.
    """
    flat = record.flat if isinstance(record, FlatRecord) else None
    if flat is not None and (flat.layout is layout or flat.layout == layout):
        return flat
    arrays = {name: view(array) for name, array in record.items()}
    return FlatModel.of_arrays(arrays, layout, given=given, expected=expected)


def complete(
    record: ArrayRecord,
    base: Base,
    *,
    given: str = "the record",
    expected: str = "the model",
) -> FlatModel:
    """Read a record's arrays into a whole model.

    Parameters
    ----------
    record : ArrayRecord
        Has the names and shapes of the whole model, or of the part that travels.
    base : Base
        What is taken where the record leaves it out.
    given, expected : str
        What an error calls the two.

    Raises
    ------
    AggregationError
        As :func:`flatten` does.
    """
    layout = base.layout
    if not leaves_out_base(record, layout):
        return flatten(record, layout, given=given, expected=expected)
    part = flatten(record, layout.travelling, given=given, expected=expected)
    return base.complete(part)


def leaves_out_base(record: ArrayRecord, layout: Layout) -> bool:
    """Tell whether a record has only the part of a model that travels."""
    part = layout.travelling
    if part is layout:
        return False
    flat = record.flat if isinstance(record, FlatRecord) else None
    if flat is not None:
        return flat.layout == part
    return not any(e.name in record for e in layout.entries if e.kind in STAYING)


_MAKING = threading.Lock()


class FlatRecord(ArrayRecord):
    """Flower's ``ArrayRecord`` over a :class:`FlatModel`.

    It is an ordinary record to whoever reads it as one: the arrays are made at the
    first look. Code of ours reads :attr:`flat` and never pays for them. Changing an
    array makes it an ordinary record (``flat`` is ``None`` then). The vectors are
    shared, not copied: nobody may change them in place.
    """

    def __init__(self, flat: FlatModel) -> None:
        super().__init__()
        self.__dict__["_flat"] = flat
        self.__dict__["_made"] = False

    @property
    def flat(self) -> FlatModel | None:
        """The vectors, or ``None`` once somebody has changed an array."""
        value: FlatModel | None = self.__dict__["_flat"]
        return value

    def _make(self) -> None:
        flat = self.flat
        if flat is None or self.__dict__["_made"]:
            return
        with _MAKING:  # Clients that train in several threads read the same record.
            if not self.__dict__["_made"]:
                arrays = [(n, Array(np.asarray(v))) for n, v in flat.named_arrays()]
                self.__dict__["_data"].update(arrays)
                self.__dict__["_made"] = True

    def plain(self) -> ArrayRecord:
        """Return an ordinary ``ArrayRecord`` with the same arrays."""
        return ArrayRecord(dict(self.items()))

    def copy(self) -> Self:
        """Return a shallow copy; the vectors are shared."""
        new = super().copy()
        new.__dict__["_flat"] = self.flat
        new.__dict__["_made"] = self.__dict__["_made"]
        return new

    def __getitem__(self, item: str) -> Array:
        self._make()
        return super().__getitem__(item)

    def __setitem__(self, key: str, value: Array) -> None:
        self._make()
        self.__dict__["_flat"] = None
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self._make()
        self.__dict__["_flat"] = None
        super().__delitem__(key)

    def __iter__(self) -> Iterator[str]:
        self._make()
        return super().__iter__()

    def __len__(self) -> int:
        flat = self.flat
        return super().__len__() if flat is None else len(flat.layout.entries)

    def __contains__(self, key: object) -> bool:
        self._make()
        return super().__contains__(key)

    def __eq__(self, other: object) -> bool:
        self._make()
        if isinstance(other, FlatRecord):
            other._make()
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        self._make()
        return super().__repr__()

    def keys(self) -> KeysView[str]:
        """Return the names."""
        self._make()
        return super().keys()

    def values(self) -> ValuesView[Array]:
        """Return the arrays."""
        self._make()
        return super().values()

    def items(self) -> ItemsView[str, Array]:
        """Return names and arrays."""
        self._make()
        return super().items()

    def deflate(self) -> bytes:
        """Serialise as an ordinary record, so that any Flower node can read it."""
        return self.plain().deflate()

    def __reduce__(self) -> tuple[Callable[..., ArrayRecord], tuple[Any, ...]]:
        flat = self.flat
        if flat is None:
            return ArrayRecord, (dict(self.__dict__["_data"]),)
        return FlatRecord, (flat,)


def arrays_of(content: RecordDict) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a message, by name."""
    return {
        name: array.numpy()
        for record in records_of(content, ArrayRecord).values()
        for name, array in record.items()
    }
