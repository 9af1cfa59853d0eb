"""Sensitive attributes as groups: codes 0, 1, ... and what each stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import DataError, closest
from ..core.texts import listed, shown
from .examples import DataSet
from .targets import Array

if TYPE_CHECKING:
    from .federated import FederatedData

# Texts are groups where they are so many different ones at most, and whole numbers
# where they are so many: more of them count or measure something.
MOST_TEXTS = 100
MOST_NUMBERS = 20


def groups_of(values: Array) -> tuple[str, ...] | None:
    """Return the groups that the values of an attribute name, or ``None``.

    Texts are, if there are :data:`MOST_TEXTS` different ones at most; so are true and
    false, and whole numbers of :data:`MOST_NUMBERS` different values at most.

    Parameters
    ----------
    values : ndarray
        Shape ``[n]``, one an example.

    Returns
    -------
    tuple of str or None
        Sorted as the values are; ``None`` where a value is missing, or they measure
        something.

    Examples
    --------
    >>> groups_of(np.array(["f", "m", "f"])), groups_of(np.array([2.0, 1.0]))
    (('f', 'm'), ('1', '2'))
    >>> groups_of(np.array([0.5, 1.0])), groups_of(np.array(["f", None]))
    (None, None)
    """
    known = _different(values)
    return None if known is None else tuple(map(_named, known.tolist()))


def name_groups(dataset: DataSet) -> DataSet:
    """Return a data set whose attributes are codes with names, where they are groups.

    Attributes that ``attribute_names`` names are left as they are, and so are those
    that are no groups (:func:`groups_of`, of training and test examples together).

    Examples
    --------
    >>> from fedweight.data import DataSet, Examples
    >>> some = Examples(np.zeros((2, 1)), np.arange(2), {"sex": np.array(["m", "f"])})
    >>> data = name_groups(DataSet("people", some, some, 2))
    >>> data.train.attributes["sex"].tolist(), dict(data.attribute_names)
    ([1, 0], {'sex': ('f', 'm')})
    """
    parts = [dataset.train, dataset.test]
    codes: list[dict[str, Array]] = [{}, {}]
    names: dict[str, tuple[str, ...]] = {}
    for name in dataset.train.attributes:
        if name in dataset.attribute_names:
            continue
        columns = [part.attributes.get(name) for part in parts]
        there = [column for column in columns if column is not None and len(column)]
        known = _different(np.concatenate(there)) if _alike(there) else None
        if known is None:
            continue
        names[name] = tuple(map(_named, known.tolist()))
        for own, column in zip(codes, columns, strict=True):
            if column is not None:
                own[name] = np.searchsorted(known, column).astype(np.int64)
    if not names:
        return dataset
    train, test = (
        replace(part, attributes={**part.attributes, **own})
        for part, own in zip(parts, codes, strict=True)
    )
    known_names = {**dataset.attribute_names, **names}
    return replace(dataset, train=train, test=test, attribute_names=known_names)


def codes_among(what: str, values: Array, names: Sequence[str]) -> Array:
    """Return the place of each value of an attribute among groups that are known.

    Raises
    ------
    DataError
        If a value is none of them; ``what`` begins the message.

    Examples
    --------
    >>> codes_among("'sex'", np.array(["m", "f", "m"]), ["f", "m"]).tolist()
    [1, 0, 1]
    """
    if values.ndim != 1:
        raise DataError(f"{what} has shape {values.shape}. Give one value an example.")
    different, places = np.unique(values, return_inverse=True)
    known = {name: code for code, name in enumerate(names)}
    texts = [_named(value) for value in different.tolist()]
    for text in texts:
        if text not in known:
            raise DataError(
                f"{what} holds {shown(text)}, which is none of "
                f"{listed(map(repr, names), most=20)}."
            )
    return np.array([known[text] for text in texts], np.int64)[places]


def check_groups(key: str, data: FederatedData, name: str) -> None:
    """Raise unless an attribute of some data is codes of groups.

    Parameters
    ----------
    key : str
        What a message calls the setting that names the attribute.
    data : FederatedData
        Whose.
    name : str
        The attribute.

    Raises
    ------
    DataError
        If the examples have no such attribute, miss values of it, or have numbers that
        measure something.
    """
    what, train, test = f"data '{data.name}'", data.examples, data.test
    if not name:
        have = listed(sorted(train.attributes), most=9) or "none"
        raise DataError(
            f"{key} must name a sensitive attribute of the examples, got ''. {what} "
            f"have {have}: those of a file are named in data.sensitive."
        )
    for part in (train, test):
        if name not in part.attributes and len(part):
            which = "" if part is train else "the test examples of "
            near = closest(name, part.attributes)
            have = listed(sorted(part.attributes), most=9) or "none"
            raise DataError(
                f"{key}: {which}{what} have no attribute {shown(name)}.{near} They "
                f"have {have}. Columns of a file are named in data.sensitive, as "
                "data.sensitive=sex; in Python give Examples(x, y, {name: column})."
            )
    for part in (train, test):
        column = part.attributes.get(name)
        if column is None or not len(column):
            continue
        if name not in data.attribute_names:
            raise DataError(f"{key}: {_why_not(what, name, column)}")
        number = len(data.attribute_names[name])
        known = np.isin(column, np.arange(number))
        if not known.all():
            odd = column[~known].flat[0].item()
            raise DataError(
                f"{key}: {what}: attribute '{name}' must be codes from 0 to "
                f"{number - 1}, as attribute_names names {number}, got {shown(odd)}. "
                f"Leave '{name}' out of attribute_names, and its values become codes."
            )


def _why_not(what: str, name: str, column: Array) -> str:
    """Return why the values of an attribute are no groups."""
    if column.ndim != 1:
        return (
            f"{what}: attribute '{name}' has shape {column.shape}. Give one value an "
            "example."
        )
    missing = missing_values(column)
    if missing.any():
        return (
            f"{what}: attribute '{name}' is missing for {int(missing.sum()):,} of "
            f"{len(column):,} examples. Give them a group of their own, such as "
            "'unknown', or leave them out."
        )
    if column.dtype.kind in "iuf":
        count = len(np.unique(column))
        return (
            f"{what}: attribute '{name}' has {count:,} different numbers, such as "
            f"{shown(column[0].item())}: it measures something, and makes no groups. "
            f"Put it into ranges first, such as numpy.digitize({name}, [30, 50])."
        )
    count = len({str(value) for value in column.tolist()})
    return (
        f"{what}: attribute '{name}' has {count:,} different values, such as "
        f"{shown(str(column[0]))}; at most {MOST_TEXTS} are groups, of texts alone. "
        "Put several into one first."
    )


def _alike(columns: list[Array]) -> bool:
    """Tell whether columns can be put together: numbers, or else texts."""
    numbers = {column.dtype.kind in "biuf" for column in columns}
    return len(numbers) == 1


def _different(values: Array) -> Array | None:
    """Return the different values of an attribute, sorted, if they are groups."""
    if values.ndim != 1 or not len(values) or missing_values(values).any():
        return None
    numbers = values.dtype.kind in "biuf"
    if not numbers and not all(isinstance(v, str) for v in values.tolist()):
        return None
    if values.dtype.kind == "f" and not (values == np.rint(values)).all():
        return None
    known: Array = np.unique(values)
    return known if len(known) <= (MOST_NUMBERS if numbers else MOST_TEXTS) else None


def missing_values(values: Array) -> Any:
    """Tell which values of an attribute are none: NaN, None, an empty text."""
    if values.dtype.kind == "f":
        return ~np.isfinite(values)
    if values.dtype.kind in "biu":
        return np.zeros(len(values), bool)
    empty = [v is None or v != v or v == "" for v in values.tolist()]
    return np.array(empty, bool)


def _named(value: Any) -> str:
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if whole else str(value)
