"""How a measure is spread over clients."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np


def client_spread(values: Iterable[float]) -> dict[str, float]:
    """Summarise a measure, such as accuracy, that every client has.

    Parameters
    ----------
    values : Iterable[float]
        One a client; NaN stands for a client that has none, and is left out.

    Returns
    -------
    dict[str, float]
        ``mean`` and ``std`` (population) over clients, each counting once;
        ``worst10`` and ``best10``, the means of the lowest and highest tenth
        (rounded up to whole clients). All NaN where no client has a value.

    Examples
    --------
    >>> client_spread([0.5, 0.7, 0.9, float("nan")])["worst10"]
    0.5
    """
    known = np.sort([v for v in values if not math.isnan(v)])
    if not len(known):
        return dict.fromkeys(("mean", "std", "worst10", "best10"), math.nan)
    tenth = math.ceil(len(known) / 10)
    return {
        "mean": float(known.mean()),
        "std": float(known.std()),
        "worst10": float(known[:tenth].mean()),
        "best10": float(known[-tenth:].mean()),
    }
