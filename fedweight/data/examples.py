"""What a data set is: arrays of examples, split into training and test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """A number of examples, one a row in every array.

    Attributes
    ----------
    x : ndarray
        Shape ``[n, ...]``. Images are float32 ``[n, c, h, w]``, tables float32
        ``[n, d]``, texts int64 token numbers ``[n, T]``.
    y : ndarray
        Shape ``[n]``, int64: the class of each example, from 0.
    attributes : Mapping[str, ndarray]
        Side data, one row an example, such as a sensitive attribute. A model never
        sees it.
    """

    x: Array
    y: Array
    attributes: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the arrays have the same number of rows."""
        columns = {"x": self.x, "y": self.y, **self.attributes}
        for name, column in columns.items():
            if len(column) != len(self.y):
                raise DataError(
                    f"'{name}' has {len(column)} rows, but there are "
                    f"{len(self.y)} labels. Give one row an example."
                )

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.y)

    def take(self, indices: slice | Indices) -> Examples:
        """Return some of the examples.

        Parameters
        ----------
        indices : slice or ndarray
            A slice gives views of the arrays; an array of indices copies.

        Examples
        --------
        >>> examples = Examples(np.zeros((4, 2), np.float32), np.arange(4))
        >>> part = examples.take(slice(1, 3))
        >>> len(part), np.shares_memory(part.x, examples.x)
        (2, True)
        """
        return Examples(
            self.x[indices],
            self.y[indices],
            {name: column[indices] for name, column in self.attributes.items()},
        )


@dataclass(frozen=True)
class DataSet:
    """A classification data set.

    Attributes
    ----------
    name : str
        What it is called in messages and records.
    train, test : Examples
        The test examples are for measuring only; no choice may depend on them.
    num_classes : int
        C; labels lie in ``0 .. C - 1``.
    natural_clients : ndarray, optional
        Shape ``[len(train)]``, int64: to which real client (a person, a hospital, a
        role) each training example belongs.
    class_names : tuple of str
        The name of each class, or nothing.
    attribute_names : Mapping[str, tuple of str]
        For attributes that are codes 0, 1, ...: what each code stands for.
    """

    name: str
    train: Examples
    test: Examples
    num_classes: int
    natural_clients: Array | None = None
    class_names: tuple[str, ...] = ()
    attribute_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example, such as ``(1, 28, 28)``."""
        return tuple(self.train.x.shape[1:])


def check(dataset: DataSet) -> DataSet:
    """Return the data set, or raise if a model could not be trained on it.

    Raises
    ------
    DataError
        If there are no training examples, inputs are not finite float32 or int64,
        labels are not int64 in ``0 .. C - 1``, or training and test differ in shape.
    """
    name = dataset.name
    if not len(dataset.train):
        raise DataError(f"data '{name}' has no training examples.")
    for part, examples in (("train", dataset.train), ("test", dataset.test)):
        x, y = examples.x, examples.y
        if x.dtype not in (np.float32, np.int64):
            raise DataError(
                f"data '{name}', {part}: inputs are {x.dtype}. Give float32, or int64 "
                "for tokens."
            )
        if x.shape[1:] != dataset.input_shape:
            raise DataError(
                f"data '{name}': an example has shape {dataset.input_shape} in the "
                f"training data and {x.shape[1:]} in the test data. Make them equal."
            )
        bad = _first_not_finite(x)
        if bad is not None:
            raise DataError(
                f"data '{name}', {part}: example {bad} holds NaN or infinity. Fill "
                "in or drop such values first."
            )
        if y.dtype != np.int64 or y.ndim != 1:
            raise DataError(
                f"data '{name}', {part}: labels are {y.dtype} of shape {y.shape}. "
                "Give int64 class numbers of shape [n]."
            )
        if len(y) and not (y.min() >= 0 and y.max() < dataset.num_classes):
            raise DataError(
                f"data '{name}', {part}: labels reach from {y.min()} to {y.max()}, "
                f"but {dataset.num_classes} classes allow 0 to "
                f"{dataset.num_classes - 1}."
            )
    natural = dataset.natural_clients
    if natural is not None and len(natural) != len(dataset.train):
        raise DataError(
            f"data '{name}': natural_clients has {len(natural)} entries for "
            f"{len(dataset.train)} training examples. Give one each."
        )
    return dataset


def _first_not_finite(x: Array) -> int | None:
    # The sum shows whether anything is wrong without an array of flags; only then is
    # it worth looking where. A sum that merely overflows is cleared by the look.
    if x.dtype == np.int64 or np.isfinite(x.sum(dtype=np.float64)):
        return None
    rows = np.isfinite(x).reshape(len(x), -1).all(axis=1)
    return None if rows.all() else int(np.argmin(rows))
