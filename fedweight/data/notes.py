"""What a user should know of the data at the end of a run, beside the numbers."""

from __future__ import annotations

import numpy as np

from ..core.texts import listed
from .federated import FederatedData
from .tasks import TASKS

# A feature so many times as wide as others decides every step; they hardly learn.
TIMES_WIDER = 1000

# So many examples tell how wide features are.
LOOKED_AT = 10_000


def notes(data: FederatedData) -> list[str]:
    """Return lines on what in the data may have spoiled a result.

    What the data set says of itself comes first; then features of which some are
    :data:`TIMES_WIDER` times as wide as others, more clients than examples, and classes
    and groups that no client has an example of. Most data give none.

    Parameters
    ----------
    data : FederatedData
        What a run trains on.

    Examples
    --------
    >>> from fedweight.data import federate, load
    >>> notes(federate(load("digits"), num_clients=5))
    []
    """
    found = [*data.notes, *_scale(data), *_clients(data), *_classes(data)]
    return [*found, *_groups(data)]


def _scale(data: FederatedData) -> list[str]:
    """Compare the features of a table of numbers by their standard deviations."""
    every = data.examples.x
    x = every[:: max(1, len(every) // LOOKED_AT)]
    if x.ndim != 2 or not np.issubdtype(x.dtype, np.floating) or not len(x):
        return []
    widths = x.std(axis=0, dtype=np.float64)
    widest = int(widths.argmax())
    others = np.sort(np.delete(widths, widest))
    others = others[others > 0]  # Those that never vary say nothing of the scale.
    usual = others[(len(others) - 1) // 2] if len(others) else np.inf
    if widths[widest] <= TIMES_WIDER * usual:
        return []
    name = data.feature_names[widest] if data.feature_names else str(widest)
    return [
        f"feature '{name}' is {widths[widest] / usual:,.0f} times as wide as others "
        f"(standard deviations {widths[widest]:.3g} and {usual:.3g}): scale them "
        "first, or in a CSV file with standardise = true"
    ]


def _clients(data: FederatedData) -> list[str]:
    """Say that there are more clients than examples, where none are shared."""
    examples = len(data.examples)
    if data.is_lazy or data.num_clients <= examples:
        return []
    return [
        f"there are more clients, {data.num_clients:,}, than training examples, "
        f"{examples:,}: {int((data.sizes == 0).sum()):,} clients have none"
    ]


def _classes(data: FederatedData) -> list[str]:
    """Name the classes that no client has; of a vocabulary that is nothing unusual."""
    if np.issubdtype(data.examples.x.dtype, np.integer):
        return []
    counts = TASKS[data.task].class_counts(data.examples.y, data.num_classes)
    missing = np.flatnonzero(counts == 0).tolist()
    if not missing or len(missing) == data.num_classes:
        return []
    names = data.class_names or range(data.num_classes)
    return [
        f"{len(missing):,} of {data.num_classes:,} classes have no training example: "
        f"{listed([names[k] for k in missing], most=5)}"
    ]


def nobody_is_of(attribute: str) -> str:
    """Return how the note begins that says which groups no client has."""
    return f"no training example is of group {attribute}: "


def _groups(data: FederatedData) -> list[str]:
    """Name the groups of sensitive attributes that no client has."""
    lines = []
    for attribute, names in data.attribute_names.items():
        codes = data.examples.attributes.get(attribute)
        if codes is None or not len(codes) or codes.dtype.kind not in "iu":
            continue
        there = {*np.unique(codes).tolist()}
        missing = [name for k, name in enumerate(names) if k not in there]
        if missing:
            lines.append(f"{nobody_is_of(attribute)}{listed(missing, most=5)}")
    return lines
