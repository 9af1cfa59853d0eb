"""Which values Flower's records of numbers and texts can carry, by wire too."""

from __future__ import annotations

from typing import Any

# A whole number of a record has at most so many bits, with its sign.
MOST_INTEGER = 2**63 - 1


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
