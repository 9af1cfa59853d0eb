"""One data set, split over clients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import ConfigurationError, DataError, check_range
from ..core.rng import Purpose, generator
from ..core.texts import listed
from .examples import DataSet, Examples, cast
from .groups import name_groups
from .lazy import LazyParts
from .partitions import natural_choice
from .partitions import partition as divide
from .parts import Parts
from .schema import Schema
from .skews import flipped_labels
from .tasks import CLASSIFICATION, TASKS

Indices = npt.NDArray[np.int64]

# So many clients' label counts are kept until they are asked for.
LATELY = 1 << 14


@dataclass(frozen=True)
class ClientData:
    """What one client has: examples to train on, and some it keeps for measuring."""

    train: Examples
    held_out: Examples

    def cast(
        self, dtype: npt.DTypeLike, where: str = "data", task: str = CLASSIFICATION
    ) -> ClientData:
        """Return the same in a model's types; see :meth:`Examples.cast`."""
        train, held_out = self.train, self.held_out
        if len(train):
            train = train.cast(dtype, where, task)
        if len(held_out):
            held_out = held_out.cast(dtype, where, task)
        return ClientData(train, held_out)


class FederatedData:
    """A data set whose training examples are divided among clients.

    The examples are put in the clients' order once, so that what a client has are
    slices of the same few arrays; nothing is copied again. The arrays are only read,
    so any number of processes can share them. Of a partition that is computed lazily,
    a client's examples are drawn and copied each time that they are asked for, and
    are not kept.

    Parameters
    ----------
    dataset : DataSet
        What is divided.
    partition : sequence of ndarray, or LazyParts
        For each client, numbers of its training examples; none twice. Clients of
        :class:`~fedweight.data.lazy.LazyParts` may share examples.
    held_out : float
        Share of a client's examples, in [0, 1), drawn at random, that it does not train
        on. A client with one example trains on it. Clients that share examples may
        train on what others hold out; nobody trains on test examples.
    proxy : float
        Share of all training examples, in [0, 1), that the server keeps; see
        :func:`take_proxy`. They are in no client's part: examples of ``partition`` that
        fall among them are taken out. LazyParts must not draw from them.
    validation : float
        Share of all training examples, in [0, 1), drawn at random from those that are
        no proxy, that the server keeps to choose by; likewise.
    seed : int
        Draws the proxy, the validation and the held-out examples.
    names : sequence of str
        The clients' names, or nothing where they go by their numbers.
    labels : ndarray, optional
        Shape ``[len(dataset.train)]``: what clients have in place of the true labels,
        which the server's proxy keeps.

    Attributes
    ----------
    name : str
        The data set's name.
    num_clients, num_classes : int
        K and C; C is 0 where numbers are predicted.
    task : str
        As in :class:`~fedweight.data.DataSet`.
    input_shape, target_shape : tuple of int
        The shape of one example, and of what is to be predicted of it, such as ``()``.
    class_names : tuple of str
        As in :class:`~fedweight.data.DataSet`.
    attribute_names : Mapping[str, tuple of str]
        As in :class:`~fedweight.data.DataSet`.
    feature_names, notes : tuple of str
        As in :class:`~fedweight.data.DataSet`.
    names : tuple of str
        The clients' names, or nothing; see :meth:`name_of`.
    test, proxy, validation : Examples
        The test set, and what the server keeps.
    test_file_rows : ndarray or None
        Which rows of their file the test examples are; see :meth:`file_rows`.
    sizes : ndarray
        Shape ``[K]``, int64: how many examples a client trains on.
    is_lazy : bool
        Whether what clients have is computed when it is asked for.
    holds_out : bool
        Whether any client has held-out examples.
    """

    def __init__(
        self,
        dataset: DataSet,
        partition: Sequence[Indices],
        *,
        held_out: float = 0.2,
        proxy: float = 0.0,
        validation: float = 0.0,
        seed: int = 0,
        names: Sequence[str] = (),
        labels: Indices | None = None,
    ) -> None:
        check_range("held_out", held_out, 0, 1, high_open=True)
        kept, chosen_by = _server_rows(dataset, proxy, validation, seed)
        free = np.ones(len(dataset.train), bool)
        free[kept] = free[chosen_by] = False
        self.name = dataset.name
        self.num_clients = len(partition)
        self.num_classes = dataset.num_classes
        self.task = dataset.task
        self.input_shape = dataset.input_shape
        self.target_shape = tuple(dataset.train.y.shape[1:])
        self.class_names = dataset.class_names
        self.attribute_names = dataset.attribute_names
        self.feature_names = dataset.feature_names
        self.notes = dataset.notes
        self.names = tuple(names)
        if names and len(names) != self.num_clients:
            raise DataError(
                f"names has {len(names)} entries for {self.num_clients} clients. Give "
                "one each, or none."
            )
        self.test = dataset.test
        rows = dataset.file_rows
        train_rows = None if rows is None else rows[0]
        self.test_file_rows = None if rows is None else rows[1]
        self.proxy = dataset.train.take(kept)
        self.validation = dataset.train.take(chosen_by)
        self.is_lazy = isinstance(partition, LazyParts)
        _check_partition(partition, free)
        self._clients: _Drawn | _InOrder
        train = dataset.train if labels is None else replace(dataset.train, y=labels)
        if isinstance(partition, LazyParts):
            self._clients = _Drawn(train, partition, held_out, seed, train_rows)
        else:
            self._clients = _InOrder(train, partition, free, held_out, seed, train_rows)
        self.sizes = self._clients.sizes
        self.holds_out = self._clients.holds_out
        self._lately: dict[int, tuple[Indices, Indices]] = {}

    def client(self, i: int) -> ClientData:
        """Return what client ``i``, from 0, has.

        The arrays are views, or copies where the partition is computed lazily.
        """
        train, held_out = map(self._clients.examples.take, self._rows(i))
        if self.is_lazy and TASKS[self.task].least_classes:
            # Who asks for their data often wants to know their labels next.
            if len(self._lately) >= LATELY:
                self._lately.clear()
            self._lately[i] = self._count(train.y), self._count(held_out.y)
        return ClientData(train, held_out)

    def file_rows(self, i: int) -> tuple[Indices, Indices] | None:
        """Return which rows of their file client ``i`` trains on and holds out.

        From 0, in the order of its examples; ``None`` where the data are no file's.
        Those of the test set are :attr:`test_file_rows`.
        """
        rows = self._clients.file_rows
        if rows is None:
            return None
        train, held_out = self._rows(i)
        return rows[train], rows[held_out]

    def __repr__(self) -> str:
        what = TASKS[self.task]
        parts = [
            f"{self.num_clients:,} clients",
            f"{int(self.sizes.sum()):,} examples to train on",
            f"{len(self.test):,} to test",
            f"inputs {list(self.input_shape)}",
        ]
        parts += [f"{self.num_classes} classes"] if what.least_classes else []
        named = sorted(self.examples.attributes)
        parts += [f"attributes {listed(named, most=9)}"] if named else []
        return f"FederatedData({self.name!r}: {', '.join(parts)})"

    def parts(self, clients: Sequence[int] | Indices) -> Parts | None:
        """Return what some clients train on, as rows of :attr:`examples`.

        ``None`` where a client's are drawn when they are asked for.
        """
        if not isinstance(self._clients, _InOrder):
            return None
        return self._clients.parts(np.asarray(clients, np.int64))

    @property
    def examples(self) -> Examples:
        """What all clients have together, in one set of arrays."""
        return self._clients.examples

    def name_of(self, client: int) -> str:
        """Return a client's name, or its number as text where it has none."""
        named = 0 <= client < len(self.names)
        return self.names[client] if named else str(client)

    def labels(self, i: int) -> tuple[Indices, Indices]:
        """Return how many examples of each class client ``i`` trains on and holds out.

        Where examples have several labels, or one for each pixel: how many have each.

        Returns
        -------
        tuple of ndarray
            Both of shape ``[C]``, int64.

        Raises
        ------
        DataError
            If examples have no class, but a number to predict.
        """
        if not TASKS[self.task].least_classes:
            raise DataError(
                f"data '{self.name}': the examples have no classes to count, but a "
                f"number to predict ({self.task})."
            )
        counts = self._lately.pop(i, None)
        if counts is None:
            train, held_out = self._rows(i)
            y = self._clients.examples.y
            counts = self._count(y[train]), self._count(y[held_out])
        return counts

    def described(self, i: int) -> tuple[int, int, Indices]:
        """Return how much client ``i`` trains on and holds out, and of which classes.

        Returns
        -------
        tuple
            The two numbers of examples, and how many of each class are trained on,
            ``[C]``; none where there are no classes.
        """
        task = TASKS[self.task]
        if task.has_classes:
            train, held_out = self.labels(i)
            return int(train.sum()), int(held_out.sum()), train
        y = self._clients.examples.y
        of_train, of_held_out = (len(y[rows]) for rows in self._rows(i))
        counts = self.labels(i)[0] if task.least_classes else np.empty(0, np.int64)
        return of_train, of_held_out, counts

    def _rows(self, i: int) -> tuple[Any, Any]:
        if not 0 <= i < self.num_clients:
            raise IndexError(f"there are clients 0 to {self.num_clients - 1}, not {i}.")
        return self._clients.rows(i)

    def _count(self, labels: Indices) -> Indices:
        return TASKS[self.task].class_counts(labels, self.num_classes)

    @cached_property
    def label_counts(self) -> Indices:
        """How many examples of each class the clients train on: ``[K, C]``, int64.

        It is computed at the first look. Where :attr:`is_lazy` that draws every client:
        for many, ask for the :meth:`labels` of a few.
        """
        return np.stack([self.labels(i)[0] for i in range(self.num_clients)])


class _InOrder:
    """Disjoint parts: the examples in the clients' order, each client two slices."""

    def __init__(
        self,
        train: Examples,
        partition: Sequence[Indices],
        free: npt.NDArray[np.bool_],
        held_out: float,
        seed: int,
        file_rows: Indices | None,
    ) -> None:
        order: list[Indices] = []
        lengths: list[int] = []
        for client, part in enumerate(partition):
            rows = np.asarray(part, np.int64)
            halves = _hold_out(rows[free[rows]], held_out, seed, client)
            order += halves
            lengths += [len(half) for half in halves]
        rows = np.concatenate(order)
        self.examples = train.take(rows)
        self.file_rows = None if file_rows is None else file_rows[rows]
        self.sizes = np.array(lengths[::2], np.int64)
        self.holds_out = any(lengths[1::2])
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def rows(self, i: int) -> tuple[slice, slice]:
        """Return the places of what client i trains on, and of what it holds out."""
        start, middle, stop = self._starts[2 * i : 2 * i + 3].tolist()
        return slice(start, middle), slice(middle, stop)

    def parts(self, clients: Indices) -> Parts:
        """Return what some clients train on."""
        return Parts(self.examples, self._starts[2 * clients], self.sizes[clients])


class _Drawn:
    """Parts that are drawn when they are asked for."""

    def __init__(
        self,
        train: Examples,
        parts: LazyParts,
        held_out: float,
        seed: int,
        file_rows: Indices | None,
    ) -> None:
        self.examples = train
        self.file_rows = file_rows
        self._parts = parts
        self._held_out = held_out
        self._seed = seed
        sizes = parts.sizes
        # One number that is seen K times stays one.
        few = sizes[:1] if sizes.strides == (0,) else sizes
        less = np.minimum(np.rint(held_out * few), np.maximum(few - 1, 0))
        self.sizes = np.broadcast_to((few - less).astype(np.int64), sizes.shape)
        self.holds_out = bool((less > 0).any())

    def rows(self, i: int) -> tuple[Indices, Indices]:
        """Return the places of what client i trains on, and of what it holds out."""
        return _hold_out(self._parts[i], self._held_out, self._seed, i)


def _hold_out(
    rows: Indices, held_out: float, seed: int, client: int
) -> tuple[Indices, Indices]:
    """Divide a client's examples into what it trains on and what it holds out."""
    size = min(round(held_out * len(rows)), max(len(rows) - 1, 0))
    if not size:
        return np.sort(rows), rows[:0]
    shuffled = generator(seed, Purpose.HOLD_OUT, client=client).permutation(rows)
    return np.sort(shuffled[size:]), np.sort(shuffled[:size])


def take_proxy(labels: Indices, fraction: float, rng: np.random.Generator) -> Indices:
    """Draw a class-balanced share of the examples.

    Parameters
    ----------
    labels : ndarray
        Shape ``[n]``, the class of each example.
    fraction : float
        In [0, 1); 0 takes nothing. Each of the C classes gives ``fraction * n / C``
        examples, one at least, but never more than half of what it has: with rare
        classes the share is smaller than asked for.
    rng : Generator
        The source of randomness.

    Returns
    -------
    ndarray
        Sorted example numbers.

    Examples
    --------
    >>> labels = np.repeat([0, 1], [90, 10])
    >>> rows = take_proxy(labels, 0.1, np.random.default_rng(0))
    >>> np.bincount(labels[rows]).tolist()
    [5, 5]
    """
    check_range("proxy", fraction, 0, 1, high_open=True)
    rows = [np.empty(0, np.int64)]
    if fraction > 0 and len(labels):
        present = np.unique(labels)
        each = max(1, round(fraction * len(labels) / len(present)))
        for label in present:
            members = np.flatnonzero(labels == label)
            rows.append(rng.permutation(members)[: min(each, len(members) // 2)])
    return np.sort(np.concatenate(rows))


def federate(
    dataset: DataSet,
    partition: str = "dirichlet",
    num_clients: int | None = 20,
    held_out: float = 0.2,
    proxy: float = 0.02,
    seed: int = 0,
    leave_out: Collection[int] = (),
    validation: float = 0.0,
    flips: Mapping[str, Any] | None = None,
    **options: Any,
) -> FederatedData:
    """Divide a data set among clients.

    The server's proxy and validation examples are taken first, the others are divided,
    and then each client's held-out examples are drawn.

    Parameters
    ----------
    dataset : DataSet
        What is divided; see :func:`fedweight.data.load`.
    partition : str
        Its name; see :func:`fedweight.data.partition`.
    num_clients : int or None
        K; ``None`` stands for all natural clients.
    held_out, proxy : float
        See :class:`FederatedData`.
    seed : int
        The same seed gives the same clients.
    leave_out : Collection[int]
        Clients, from 0 to K - 1, that have no examples; all others have what they have
        with them.
    validation : float
        See :class:`FederatedData`.
    flips : Mapping[str, Any], optional
        Labels of clients are flipped, at some or in some groups more often: what
        :func:`~fedweight.data.skews.flipped_labels` takes, ``attribute``, ``rates`` and
        ``strength``.
    **options
        The partition's options, such as ``alpha``.

    Examples
    --------
    >>> from fedweight.data import load
    >>> data = federate(load("digits"), "dirichlet", num_clients=5, alpha=0.3)
    >>> len(data.client(0).train) == int(data.sizes[0])
    True
    """
    dataset = name_groups(cast(dataset))
    everybody = np.ones(len(dataset.train), bool)
    everybody[np.concatenate(_server_rows(dataset, proxy, validation, seed))] = False
    rows = np.flatnonzero(everybody)
    parts = divide(dataset, partition, num_clients, seed, rows=rows, **options)
    parts = _without(parts, leave_out)
    names: tuple[str, ...] = ()
    if partition == "natural":
        names = _natural_names(dataset, natural_choice(dataset, num_clients))
    labels = None
    if flips:
        labels = flipped_labels(dataset, parts, seed, **flips)
    return FederatedData(
        dataset,
        parts,
        held_out=held_out,
        proxy=proxy,
        validation=validation,
        seed=seed,
        names=names,
        labels=labels,
    )


def _without(
    parts: list[Indices] | LazyParts, clients: Collection[int]
) -> list[Indices] | LazyParts:
    """Return a partition in which some clients have no examples."""
    odd = [client for client in clients if not 0 <= client < len(parts)]
    if odd:
        raise ConfigurationError(
            f"leave_out names client {odd[0]}, but there are clients 0 to "
            f"{len(parts) - 1}."
        )
    if not clients:
        return parts
    if isinstance(parts, LazyParts):
        sizes = np.array(parts.sizes)
        sizes[[*clients]] = 0
        return LazyParts(sizes, _Draw(parts.draw, frozenset(clients)), parts.rows)
    nothing = np.empty(0, np.int64)
    return [nothing if k in clients else part for k, part in enumerate(parts)]


@dataclass(frozen=True)
class _Draw:
    """Draws what clients have, but nothing for those that are left out."""

    draw: Callable[[int], Indices]
    left_out: frozenset[int]

    def __call__(self, client: int) -> Indices:
        nothing = client in self.left_out
        return np.empty(0, np.int64) if nothing else self.draw(client)


def _natural_names(dataset: DataSet, chosen: Indices) -> tuple[str, ...]:
    """Return the names of chosen natural clients; nothing if a number says as much."""
    if dataset.natural_names:
        return tuple(dataset.natural_names[number] for number in chosen.tolist())
    every = len(chosen) == chosen.max(initial=-1) + 1
    return () if every else tuple(map(str, chosen.tolist()))


def load_client(
    path: str | Path,
    held_out: float = 0.2,
    seed: int = 0,
    schema: Schema | None = None,
    **options: Any,
) -> ClientData:
    """Read a real client's own examples, on its device.

    Parameters
    ----------
    path : str or Path
        A CSV or NPZ file that holds this client's examples only.
    held_out : float
        Share of the examples, in [0, 1), drawn at random, that are not trained on.
    seed : int
        Draws the held-out examples.
    schema : Schema, optional
        What columns others have: the file's are put in its order, or refused.
    **options
        What :func:`fedweight.data.files.load_one_csv` takes, or ``load_one_npz``.
    """
    from .files import load_one

    examples, _ = load_one(path, schema, **options)
    num_classes = int(examples.y.max(initial=0)) + 1
    dataset = DataSet(str(path), examples, examples.take(slice(0, 0)), num_classes)
    everything = np.arange(len(examples))
    return FederatedData(dataset, [everything], held_out=held_out, seed=seed).client(0)


def _server_rows(
    dataset: DataSet, proxy: float, validation: float, seed: int
) -> tuple[Indices, Indices]:
    """Return the numbers of the proxy examples, and of the validation examples."""
    check_range("validation", validation, 0, 1, high_open=True)
    y = dataset.train.y
    if not TASKS[dataset.task].has_classes:
        y = np.zeros(len(y), np.int64)  # As if all were of one class.
    kept = take_proxy(y, proxy, generator(seed, Purpose.PROXY))
    if not validation:
        return kept, kept[:0]
    others = np.setdiff1d(np.arange(len(y)), kept)
    size = min(max(1, round(validation * len(y))), len(others))
    drawn = generator(seed, Purpose.VALIDATION).permutation(others)[:size]
    return kept, np.sort(drawn)


def _check_partition(partition: Sequence[Indices], free: npt.NDArray[np.bool_]) -> None:
    n = len(free)
    if not len(partition):
        raise DataError("the partition has no client. Give one array a client.")
    lazy = partition if isinstance(partition, LazyParts) else None
    rows = np.concatenate(partition) if lazy is None else lazy.rows
    if len(rows) and not (rows.min() >= 0 and rows.max() < n):
        wrong = rows.min() if rows.min() < 0 else rows.max()
        raise DataError(
            f"the partition names example {wrong}, but the training examples are 0 to "
            f"{n - 1}."
        )
    if len(np.unique(rows)) != len(rows):
        raise DataError("the partition names an example twice. Give it to one client.")
    if lazy is not None and not free[rows].all():
        raise DataError(
            "the partition draws from examples that the server keeps. Let "
            "fedweight.data.federate make it, or set proxy = validation = 0."
        )
