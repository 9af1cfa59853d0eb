"""The records of a message, and which values those of numbers and texts can carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from ..core.errors import AggregationError
from ..core.texts import shown

# A whole number of a record has at most so many bits, with its sign.
MOST_INTEGER = 2**63 - 1

# A list that a client reports has at most so many numbers.
MOST_NUMBERS = 1_000_000
NUMBERS = f"a number, or a list of at most {MOST_NUMBERS:,} numbers"

R = TypeVar("R")


def records_of(content: Mapping[str, Any], kind: type[R]) -> dict[str, R]:
    """Return the records of one kind, by name.

    ``content.array_records`` and its like are live views, which Flower builds anew each
    time and fills by writing every record back: several times as slow.

    Examples
    --------
    >>> from flwr.app import ArrayRecord, ConfigRecord, RecordDict
    >>> content = RecordDict({"arrays": ArrayRecord(), "config": ConfigRecord()})
    >>> list(records_of(content, ArrayRecord))
    ['arrays']
    """
    return {name: r for name, r in content.items() if isinstance(r, kind)}


def fits_config(value: Any) -> bool:
    """Tell whether a value can be one of a config record: a number, text or bytes.

    Examples
    --------
    >>> fits_config(0.5), fits_config("exp"), fits_config(2**70), fits_config(None)
    (True, True, False, False)
    """
    if isinstance(value, int):
        return -MOST_INTEGER - 1 <= value <= MOST_INTEGER
    return isinstance(value, float | str | bytes)


def as_measured(value: Any) -> int | float | list[int] | list[float] | None:
    """Return what a client measured as a record carries it; ``None`` if it cannot.

    Parameters
    ----------
    value : Any
        A number, or up to :data:`MOST_NUMBERS` in a list, an array or a tensor of one
        dimension. True and False are 1 and 0.

    Examples
    --------
    >>> as_measured(np.float32(0.5)), as_measured((1, 2.5)), as_measured([True])
    (0.5, [1.0, 2.5], [1])
    >>> as_measured("a"), as_measured([[1]]), as_measured(None), as_measured(2**70)
    (None, None, None, None)
    """
    try:
        array = np.asarray(value)
        if array.dtype.kind == "b":
            array = array.astype(np.int64)
        if array.dtype.kind == "u":
            array = array.astype(np.int64) if (array <= MOST_INTEGER).all() else array
    except Exception:  # A ragged list, or whatever somebody's object raises.
        return None
    if array.dtype.kind not in "if" or array.ndim > 1 or array.size > MOST_NUMBERS:
        return None
    found: int | float | list[int] | list[float] = array.tolist()
    return found


def check_side_data(name: str, value: Any) -> None:
    """Raise ``AggregationError`` unless a client's side data are finite numbers."""
    numbers = as_measured(value) if isinstance(value, list) else None
    if numbers is not None and bool(np.isfinite(numbers).all()):
        return
    raise AggregationError(
        f"its '{name}' must be a list of at most {MOST_NUMBERS:,} finite numbers, got "
        f"{shown(value)}"
    )
