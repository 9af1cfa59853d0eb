"""What a data set is: arrays of examples, split into training and test."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.digests import digest_of
from ..core.errors import DataError, check_choice
from ..core.texts import shown
from .targets import INT64, Array, Indices, as_labels, as_whole
from .tasks import CLASSIFICATION, TASKS

# The tables of a run have a column for each class: more than a reader, or a browser,
# could make anything of.
MOST_CLASSES = 100_000

# How many channels images have, and how high and wide they are at least, where the last
# axis is taken for the channels.
CHANNELS = (1, 3, 4)
LEAST_SIDE = 8


@dataclass(frozen=True)
class Examples:
    """A number of examples, one a row in every array.

    What is no array yet (a list, a frame or a column of pandas) becomes one.

    Attributes
    ----------
    x : ndarray
        Shape ``[n, ...]``. Images are float32 ``[n, c, h, w]``, tables float32
        ``[n, d]``, texts int64 token numbers ``[n, T]``.
    y : ndarray
        What is to be predicted: shape ``[n]``, int64, the class of each example, from
        0; or as another task has it (:mod:`fedweight.data.tasks`).
    attributes : Mapping[str, ndarray]
        Side data, one row an example, such as a sensitive attribute. A model never
        sees it.
    """

    x: Array
    y: Array
    attributes: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make arrays, and check that they have the same number of rows."""
        x, y, attributes = self.x, self.y, self.attributes
        if type(x) is not np.ndarray or type(y) is not np.ndarray:
            object.__setattr__(self, "x", as_array("x", x))
            object.__setattr__(self, "y", as_array("y", y))
        if any(type(column) is not np.ndarray for column in attributes.values()):
            attributes = {name: as_array(name, c) for name, c in attributes.items()}
            object.__setattr__(self, "attributes", attributes)
        n = len(self.y)
        if len(self.x) == n and all(len(c) == n for c in attributes.values()):
            return
        for name, column in {"x": self.x, **attributes}.items():
            if len(column) != n:
                raise DataError(
                    f"'{name}' has {len(column)} rows, but there are "
                    f"{n} labels. Give one row an example."
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

    def fits(self, dtype: np.dtype[Any], task: str = CLASSIFICATION) -> bool:
        """Tell quickly whether :meth:`cast` has nothing to do; if not, it looks."""
        x, y, what = self.x, self.y, TASKS[task]
        return (
            (x.dtype == dtype or x.dtype == INT64)
            and y.dtype == (INT64 if what.whole else dtype)
            and y.ndim == what.ndim
            and x.flags.c_contiguous
            and y.flags.c_contiguous
        )

    def cast(
        self,
        dtype: npt.DTypeLike = np.float32,
        where: str = "data",
        task: str = CLASSIFICATION,
    ) -> Examples:
        """Return the examples as a model of some dtype can train on them.

        Classes become int64, other targets and floating inputs ``dtype``, whole inputs
        int64, which are tokens. What fits already is not copied.

        Parameters
        ----------
        dtype : dtype
            What the model's weights are.
        where : str
            How a message calls the examples.
        task : str
            Which targets they have: one of :data:`~fedweight.data.tasks.TASKS`.

        Raises
        ------
        DataError
            If it is not certain what is meant; the message has the call that says it.

        Examples
        --------
        >>> examples = Examples([[0.5], [1.5]], [0.0, 1.0]).cast()
        >>> examples.x.dtype, examples.y.dtype
        (dtype('float32'), dtype('int64'))
        """
        x, y, what = self.x, self.y, TASKS[task]
        if x.dtype not in (dtype, np.int64) or min(x.strides) < 0:
            x = as_inputs(f"{where}: inputs are", x, dtype)
        wanted = np.int64 if what.whole else dtype
        if y.dtype != wanted or y.ndim != what.ndim or min(y.strides) < 0:
            y = what.cast(f"{where}: {what.targets} are", y, wanted)
        same = x is self.x and y is self.y
        return self if same else Examples(x, y, self.attributes)


@dataclass(frozen=True)
class DataSet:
    """A data set, and what is to be predicted of it.

    Attributes
    ----------
    name : str
        What it is called in messages and records.
    train, test : Examples
        The test examples are for measuring only; no choice may depend on them.
    num_classes : int
        C, classes or labels; 0 where numbers are predicted.
    natural_clients : ndarray, optional
        Shape ``[len(train)]``, int64: to which real client (a person, a hospital, a
        role) each training example belongs.
    class_names : tuple of str
        The name of each class or label, or nothing.
    attribute_names : Mapping[str, tuple of str]
        For attributes that are codes 0, 1, ...: what each code stands for.
    natural_names : tuple of str
        The name of each natural client; then ``natural_clients`` are places in it.
        A client may be there without examples: it keeps its number.
    natural_sizes : ndarray, optional
        Shape ``[len(natural_names)]``: how many examples each natural client has in
        all, before some were drawn for testing. By these the largest are found.
    feature_names : tuple of str
        The name of each feature of a table, or nothing.
    notes : tuple of str
        What a user should know of these data, a line each.
    task : str
        What is predicted: one of :data:`~fedweight.data.tasks.TASKS`.
    file_rows : tuple of ndarray, optional
        Of data that a file holds: which of its rows, from 0, each training and each
        test example is.
    """

    name: str
    train: Examples
    test: Examples
    num_classes: int = 0
    natural_clients: Array | None = None
    class_names: tuple[str, ...] = ()
    attribute_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    natural_names: tuple[str, ...] = ()
    natural_sizes: Array | None = None
    feature_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    task: str = CLASSIFICATION
    file_rows: tuple[Indices, Indices] | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example, such as ``(1, 28, 28)``."""
        return tuple(self.train.x.shape[1:])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that is trained and measured on; of data of files, of those.

        Rows of a file are drawn anew for training and testing with every seed.
        """
        several: list[Any] = []
        for part in (self.train, self.test):
            several += [part.x, part.y]
            for name in sorted(part.attributes):
                several += [name, part.attributes[name]]
        several += [self.natural_clients, self.natural_sizes, list(self.natural_names)]
        names = sorted((k, list(v)) for k, v in self.attribute_names.items())
        several += [names, list(self.class_names), list(self.feature_names)]
        return digest_of([*several, int(self.num_classes), self.task])

    def known_by(self, digest: str) -> DataSet:
        """Return the same data, known by the files that they were read from."""
        same = replace(self)
        vars(same)["digest"] = digest
        return same


def check(dataset: DataSet) -> DataSet:
    """Return a data set that a model can be trained on: the same, or mended.

    Arrays are cast where it is certain what is meant (:meth:`Examples.cast`), and
    natural clients are numbered from 0 in the order of their names, or else of what
    they are called by.

    Raises
    ------
    DataError
        If there are no training examples, inputs are not finite numbers, targets are
        not what the task has, or training and test differ in shape.
    """
    dataset, what = cast(dataset), f"data '{dataset.name}'"
    num_classes, task = dataset.num_classes, TASKS[dataset.task]
    least = task.least_classes
    if not isinstance(num_classes, numbers.Integral) or num_classes < least:
        raise DataError(
            f"{what}: num_classes must be a whole number from {least}, got "
            f"{shown(num_classes)}."
        )
    if num_classes and not least:
        raise DataError(
            f"{what}: {dataset.task} has no classes, but num_classes is {num_classes}. "
            "Leave it out."
        )
    if num_classes > MOST_CLASSES:
        raise DataError(
            f"{what}: there are {num_classes:,} classes; at most {MOST_CLASSES:,} can "
            "be counted for each client. Number those that occur from 0, without gaps: "
            "numpy.unique(y, return_inverse=True)[1]."
        )
    if not len(dataset.train):
        raise DataError(f"{what} has no training examples.")
    if 0 in dataset.input_shape:
        raise DataError(
            f"{what}: an example has shape {dataset.input_shape}, which holds no "
            "number. Give each a feature or more."
        )
    for part, examples in (("train", dataset.train), ("test", dataset.test)):
        x, y = examples.x, examples.y
        if x.shape[1:] != dataset.input_shape:
            raise DataError(
                f"{what}: an example has shape {dataset.input_shape} in the "
                f"training data and {x.shape[1:]} in the test data. Make them equal."
            )
        if y.shape[1:] != dataset.train.y.shape[1:]:
            raise DataError(
                f"{what}: an example's {task.targets} have shape "
                f"{dataset.train.y.shape[1:]} in the training data and {y.shape[1:]} "
                "in the test data. Make them equal."
            )
        bad = _first_not_finite(x)
        if bad is not None:
            raise DataError(
                f"{what}, {part}: example {bad} holds NaN or infinity. Fill "
                "in or drop such values first."
            )
        task.check(f"{what}, {part}", x, y, num_classes)
    names = dataset.class_names
    if names and len(names) != num_classes:
        raise DataError(
            f"{what}: class_names are {len(names)} for {num_classes} classes. Give one "
            "each, or none."
        )
    return dataset


def cast(dataset: DataSet) -> DataSet:
    """Return a data set in the types that training takes; see :func:`check`."""
    what, task = f"data '{dataset.name}'", dataset.task
    check_choice(f"{what}: task", task, TASKS)
    train, test = dataset.train, dataset.test
    train = train.cast(where=f"{what}, train", task=task)
    if len(test):
        test = test.cast(where=f"{what}, test", task=task)
    else:
        test = train.take(slice(0, 0))
    if train is not dataset.train or test is not dataset.test:
        dataset = replace(dataset, train=train, test=test)
    return _numbered(dataset)


def _numbered(dataset: DataSet) -> DataSet:
    """Return the data set with its natural clients numbered, and named if need be."""
    what, names = f"data '{dataset.name}'", dataset.natural_names
    if dataset.natural_clients is None:
        if names:
            raise DataError(
                f"{what} has natural_names but no natural_clients. Give both, or none."
            )
        return dataset
    given = as_array("natural_clients", dataset.natural_clients)
    if len(given) != len(dataset.train):
        raise DataError(
            f"{what}: natural_clients has {len(given)} entries for "
            f"{len(dataset.train)} training examples. Give one each."
        )
    if not names:
        names, natural = name_clients(given, what)
        if names == tuple(str(number) for number in range(len(names))):
            names = ()  # They are numbers already.
    else:
        natural = as_labels(f"{what}: natural_clients are", given)
        if len(set(names)) != len(names):
            raise DataError(
                f"{what}: natural_names has a name twice. Make them unique."
            )
        if not (natural.min() >= 0 and natural.max() < len(names)):
            raise DataError(
                f"{what}: natural_clients reach from {natural.min()} to "
                f"{natural.max()}, but natural_names has {len(names)} names. They are "
                "places in it, from 0."
            )
    sizes = dataset.natural_sizes
    if sizes is not None and len(sizes) != len(names or set(natural.tolist())):
        raise DataError(
            f"{what}: natural_sizes has {len(sizes)} entries for {len(names)} natural "
            "clients. Give one each."
        )
    return replace(dataset, natural_clients=natural, natural_names=names)


def name_clients(clients: Array, what: str = "data") -> tuple[tuple[str, ...], Indices]:
    """Return natural clients' names, and each example's client as a number.

    Parameters
    ----------
    clients : ndarray
        Shape ``[n]`` or ``[n, 1]``: what each example's client is called, numbers or
        texts.
    what : str
        How a message calls the data.

    Returns
    -------
    tuple
        The K names in sorted order, and the place of each example's client among
        them, ``[n]``.

    Examples
    --------
    >>> names, numbers = name_clients(np.array([40, 7, 40]))
    >>> names, numbers.tolist()
    (('7', '40'), [1, 0, 1])
    """
    if clients.ndim == 2 and clients.shape[1] == 1:
        clients = clients[:, 0]
    if clients.ndim != 1:
        raise DataError(
            f"{what}: clients have shape {list(clients.shape)}. Give each example one "
            "number or text, in shape [n]."
        )
    if clients.dtype.kind == "O":
        clients = clients.astype(str)
    if clients.dtype.kind not in "biufUS":
        raise DataError(f"{what}: clients are {clients.dtype}. Give numbers or texts.")
    if clients.dtype.kind == "f" and not np.isfinite(clients).all():
        raise DataError(f"{what}: a client is NaN or infinite. Give each a number.")
    values, numbers_ = np.unique(clients, return_inverse=True)
    names = [
        v.decode(errors="replace") if isinstance(v, bytes) else str(v)
        for v in values.tolist()
    ]
    if len(set(names)) < len(names):
        raise DataError(
            f"{what}: clients are bytes that are not UTF-8, and some read alike. Give "
            "texts: numpy.char.decode(client, 'latin-1')."
        )
    return tuple(names), numbers_.astype(np.int64)


def as_array(name: str, values: Any) -> Array:
    """Return anything that holds rows of values as an array, or say what to give."""
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise DataError(
            f"'{name}' has masked values, and nothing here knows of masks. Give "
            "values.filled(...)."
        )
    try:
        array: Array = np.asarray(values)
    except Exception as error:
        raise DataError(
            f"'{name}' cannot be made an array: {shown(str(error))[1:-1]}. Give a "
            "numpy array, one row an example."
        ) from None
    if array.ndim == 0:
        raise DataError(f"'{name}' is {shown(values)}. Give an array of rows.")
    return array


def as_inputs(where: str, x: Array, dtype: npt.DTypeLike = np.float32) -> Array:
    """Return inputs as ``dtype`` or, for whole numbers, int64; see :meth:`cast`.

    Parameters
    ----------
    where : str
        How a message begins, such as ``"own.npz: 'x' is"``.
    x : ndarray
        Shape ``[n, ...]``.
    dtype : dtype
        What floating inputs become.
    """
    kind = x.dtype.kind
    if kind in "fb":
        with np.errstate(over="ignore"):
            cast = x.astype(dtype, copy=False)
        lost = ~np.isfinite(cast) & np.isfinite(x) if cast.itemsize < x.itemsize else []
        if np.any(lost):
            raise DataError(
                f"{where} {x.dtype} and reach {x[lost][0]:g}, beyond what {cast.dtype} "
                "holds. Divide them first."
            )
        return np.ascontiguousarray(cast)
    if x.dtype == np.uint8 and x.ndim > 2:
        raise DataError(
            f"{where} uint8 of shape {list(x.shape)}, which look like pixels. Scale "
            "them first: x.astype(numpy.float32) / 255."
        )
    if kind in "iu":
        return np.ascontiguousarray(as_whole(where, x))
    if kind in "UOS":
        raise DataError(
            f"{where} {x.dtype}, such as {shown(x.flat[0] if x.size else '')}. Give "
            "numbers: pandas.get_dummies makes them of categories."
        )
    raise DataError(f"{where} {x.dtype}. Give float32, or int64 for tokens.")


def channels_last(shape: tuple[int, ...]) -> bool:
    """Tell whether one example's shape is by its looks an image ``(h, w, c)``.

    Examples
    --------
    >>> channels_last((28, 28, 1)), channels_last((3, 32, 32))
    (True, False)
    """
    if len(shape) != 3:
        return False
    height, width, channels = shape
    return (
        channels in CHANNELS
        and height not in CHANNELS
        and min(height, width) >= LEAST_SIDE
    )


def _first_not_finite(x: Array) -> int | None:
    # The sum shows whether anything is wrong without an array of flags; only then is
    # it worth looking where. A sum that merely overflows is cleared by the look.
    if x.dtype == np.int64 or np.isfinite(x.sum(dtype=np.float64)):
        return None
    rows = np.isfinite(x).reshape(len(x), -1).all(axis=1)
    return None if rows.all() else int(np.argmin(rows))
