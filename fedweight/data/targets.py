"""Targets: what is to be predicted of examples, cast to the form a task takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import DataError
from ..core.texts import shown

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]

INT64 = np.dtype(np.int64)


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
    if y.dtype.kind == "f" and not _is_whole(y):
        raise DataError(
            f"{where} {y.dtype} and no whole numbers. Give integer classes from 0; "
            "to predict a number, set task = 'regression'."
        )
    if y.dtype.kind in "UOS":
        raise DataError(
            f"{where} {y.dtype}, such as {shown(y[0] if len(y) else '')}. Give integer "
            "classes from 0: numpy.unique(y, return_inverse=True)[1]."
        )
    return _as_classes(where, y)


def as_masks(where: str, y: Array) -> Indices:
    """Return the class of each pixel as int64 ``[n, h, w]``, or say what to give.

    Parameters
    ----------
    where : str
        How a message begins, such as ``"own.npz: 'y' is"``.
    y : ndarray
        Shape ``[n, h, w]`` or ``[n, 1, h, w]``, whole numbers.

    Examples
    --------
    >>> as_masks("y is", np.zeros((2, 1, 3, 4), np.uint8)).shape
    (2, 3, 4)
    """
    if y.ndim == 4 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 3:
        remedy = "Give the class of each pixel from 0, of shape [n, h, w]"
        if y.ndim == 4:
            remedy += ": y.argmax(axis=1) of masks with a channel for each class"
        raise DataError(f"{where} {y.dtype} of shape {list(y.shape)}. {remedy}.")
    if y.dtype.kind == "f" and not _is_whole(y):
        raise DataError(
            f"{where} {y.dtype} and no whole numbers. Give integer classes from 0: "
            "(y > 0.5).astype(numpy.int64) of the likelihood of one."
        )
    return _as_classes(where, y)


def as_flags(where: str, y: Array, dtype: npt.DTypeLike = np.float32) -> Array:
    """Return whether each label holds, 0 or 1, as ``dtype``, or say what to give.

    Parameters
    ----------
    where : str
        How a message begins, such as ``"own.npz: 'y' is"``.
    y : ndarray
        Shape ``[n, L]``: 0 and 1, or false and true.
    dtype : dtype
        What they become.

    Examples
    --------
    >>> as_flags("y is", np.array([[True, False]])).tolist()
    [[1.0, 0.0]]
    """
    if y.ndim != 2 or y.dtype.kind not in "biuf":
        remedy = "Give 0 or 1 for each example and label, of shape [n, L]"
        if y.ndim == 1:
            remedy += ": y[:, None] of one label"
        raise DataError(f"{where} {y.dtype} of shape {list(y.shape)}. {remedy}.")
    odd = y[(y != 0) & (y != 1)]  # NaN differs from both.
    if len(odd):
        raise DataError(
            f"{where} {y.dtype}, and hold {odd[0]:g}. Give 1 where a label holds, else "
            "0."
        )
    return np.ascontiguousarray(y.astype(dtype, copy=False))


_CLASSES = "Give integer classes from 0."


def _is_whole(y: Array) -> bool:
    return bool(np.isfinite(y).all() and (y == np.round(y)).all())


def _as_classes(where: str, y: Array) -> Indices:
    """Return whole numbers as int64, or say that they are none."""
    if y.dtype.kind == "f" and y.size and np.abs(y).max() >= 2**53:
        raise DataError(f"{where} {y.dtype} up to {np.abs(y).max():g}. {_CLASSES}")
    if y.dtype.kind not in "biuf":
        raise DataError(f"{where} {y.dtype}. {_CLASSES}")
    return np.ascontiguousarray(as_whole(where, y))


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
