"""Targets: what is to be predicted of examples, and in which form it comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import DataError
from ..core.texts import shown

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]

INT64 = np.dtype(np.int64)

CLASSIFICATION = "classification"


@dataclass(frozen=True)
class Targets:
    """The targets that a task has.

    Attributes
    ----------
    name : str
        How a message calls them.
    cast : Callable[[str, ndarray, dtype], ndarray]
        Makes them of what is given, or says what to give; begins messages with a text.
    whole : bool
        Whether they are whole numbers, and not of the model's type.
    ndim : int
        Their number of axes.
    classes : bool
        Whether each example is of one of C classes.
    """

    name: str
    cast: Callable[[str, Array, npt.DTypeLike], Array]
    whole: bool = True
    ndim: int = 1
    classes: bool = True


def as_labels(where: str, y: Array) -> Indices:
    """Return labels as int64 ``[n]`` where they are whole numbers, or say what to give.

    Parameters
    ----------
    where : str
        How a message begins, such as ``"own.npz: 'y' is"``.
    y : ndarray
        Shape ``[n]`` or ``[n, 1]``.
    """
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        remedy = "Give class numbers from 0, of shape [n]"
        if y.ndim == 2 and y.dtype.kind in "biuf" and (y.sum(1) == 1).all():
            remedy += ": y.argmax(axis=1)"
        raise DataError(f"{where} {y.dtype} of shape {list(y.shape)}. {remedy}.")
    kind = y.dtype.kind
    if kind == "f":
        if not (np.isfinite(y).all() and (y == np.round(y)).all()):
            raise DataError(
                f"{where} {y.dtype} and no whole numbers. Give integer classes from 0; "
                "to predict a number, set task = 'regression'."
            )
        if len(y) and np.abs(y).max() >= 2**53:
            raise DataError(f"{where} {y.dtype} up to {np.abs(y).max():g}. {_CLASSES}")
    elif kind in "UOS":
        raise DataError(
            f"{where} {y.dtype}, such as {shown(y[0] if len(y) else '')}. Give integer "
            "classes from 0: numpy.unique(y, return_inverse=True)[1]."
        )
    elif kind not in "biu":
        raise DataError(f"{where} {y.dtype}. {_CLASSES}")
    return np.ascontiguousarray(as_whole(where, y))


_CLASSES = "Give integer classes from 0."


def as_whole(where: str, values: Array) -> Indices:
    """Return whole numbers as int64, or say that they are too large."""
    if values.dtype == np.uint64 and values.size and values.max() >= 2**63:
        raise DataError(f"{where} uint64 up to {values.max()}. Give int64.")
    return values.astype(np.int64, copy=False)


def as_numbers(where: str, y: Array, dtype: npt.DTypeLike = np.float32) -> Array:
    """Return numbers to predict as ``dtype``, ``[n]``, or say what to give.

    Parameters
    ----------
    where : str
        How a message begins, such as ``"own.npz: 'y' is"``.
    y : ndarray
        Shape ``[n]`` or ``[n, 1]``.
    dtype : dtype
        What they become.
    """
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or y.dtype.kind not in "biuf":
        raise DataError(
            f"{where} {y.dtype} of shape {list(y.shape)}. Give a number for each "
            "example, of shape [n]."
        )
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(y.astype(dtype, copy=False))
    if not np.isfinite(numbers).all():
        bad = y[~np.isfinite(numbers)][0]
        raise DataError(
            f"{where} {y.dtype}, and hold {bad:g}, where {numbers.dtype} has no finite "
            "number. Leave such examples out, or divide all."
        )
    return numbers


TARGETS: Mapping[str, Targets] = {
    CLASSIFICATION: Targets("labels", lambda where, y, dtype: as_labels(where, y)),
    "next-token": Targets("labels", lambda where, y, dtype: as_labels(where, y)),
    "regression": Targets("targets", as_numbers, whole=False, classes=False),
}
