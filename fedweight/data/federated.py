"""One data set, split over clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError, check_range
from ..rng import Purpose, generator
from ._options import check_options
from .examples import DataSet, Examples, check
from .partitions import partition as divide

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClientData:
    """What one client has: examples to train on, and some it keeps for measuring."""

    train: Examples
    held_out: Examples


class FederatedData:
    """A data set whose training examples are divided among clients.

    The examples are put in the clients' order once, so that what a client has are
    slices of the same few arrays; nothing is copied again. The arrays are only read,
    so any number of processes can share them.

    Parameters
    ----------
    dataset : DataSet
        What is divided.
    partition : sequence of ndarray
        For each client, numbers of its training examples; none twice.
    held_out : float
        Share of a client's examples, in [0, 1), drawn at random, that it does not train
        on. A client with one example trains on it.
    proxy : float
        Share of all training examples, in [0, 1), that the server keeps; see
        :func:`take_proxy`. They are in no client's part: examples of ``partition`` that
        fall among them are taken out.
    seed : int
        Draws the proxy and the held-out examples.

    Attributes
    ----------
    name : str
        The data set's name.
    num_clients, num_classes : int
        K and C.
    input_shape : tuple of int
        The shape of one example.
    class_names : tuple of str
        As in :class:`~fedweight.data.DataSet`.
    attribute_names : Mapping[str, tuple of str]
        As in :class:`~fedweight.data.DataSet`.
    test, proxy : Examples
        The test set, and what the server keeps.
    label_counts : ndarray
        Shape ``[K, C]``, int64: how many examples of each class a client trains on.
    sizes : ndarray
        Shape ``[K]``, int64: how many examples a client trains on.
    """

    def __init__(
        self,
        dataset: DataSet,
        partition: Sequence[Indices],
        *,
        held_out: float = 0.2,
        proxy: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_range("held_out", held_out, 0, 1, high_open=True)
        n = len(dataset.train)
        kept = _proxy_rows(dataset, proxy, seed)
        free = np.ones(n, bool)
        free[kept] = False
        _check_partition(partition, n)
        order, lengths, train_lengths = [], [], []
        for client, part in enumerate(partition):
            rows = np.asarray(part, np.int64)
            rows = rows[free[rows]]
            rng = generator(seed, Purpose.HOLD_OUT, client=client)
            size = min(round(held_out * len(rows)), max(len(rows) - 1, 0))
            shuffled = rng.permutation(rows)
            order += [np.sort(shuffled[size:]), np.sort(shuffled[:size])]
            lengths.append(len(rows))
            train_lengths.append(len(rows) - size)

        self.name = dataset.name
        self.num_clients = len(partition)
        self.num_classes = dataset.num_classes
        self.input_shape = dataset.input_shape
        self.class_names = dataset.class_names
        self.attribute_names = dataset.attribute_names
        self.test = dataset.test
        self.proxy = dataset.train.take(kept)
        self.sizes = np.array(train_lengths, np.int64)
        self._examples = dataset.train.take(np.concatenate(order))
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.label_counts = np.stack(
            [
                np.bincount(self.client(k).train.y, minlength=self.num_classes)
                for k in range(self.num_clients)
            ]
        )

    def client(self, i: int) -> ClientData:
        """Return what client ``i``, from 0, has; the arrays are views."""
        if not 0 <= i < self.num_clients:
            raise IndexError(f"there are clients 0 to {self.num_clients - 1}, not {i}.")
        start, stop = int(self._starts[i]), int(self._starts[i + 1])
        middle = start + int(self.sizes[i])
        return ClientData(
            self._examples.take(slice(start, middle)),
            self._examples.take(slice(middle, stop)),
        )


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
    if fraction > 0:
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
    **options: Any,
) -> FederatedData:
    """Divide a data set among clients.

    The server's proxy examples are taken first, the others are divided, and then each
    client's held-out examples are drawn.

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
    **options
        The partition's options, such as ``alpha``.

    Examples
    --------
    >>> from fedweight.data import load
    >>> data = federate(load("digits"), "dirichlet", num_clients=5, alpha=0.3)
    >>> len(data.client(0).train) == int(data.sizes[0])
    True
    """
    everybody = np.ones(len(dataset.train), bool)
    everybody[_proxy_rows(dataset, proxy, seed)] = False
    rows = np.flatnonzero(everybody)
    parts = divide(dataset, partition, num_clients, seed, rows=rows, **options)
    return FederatedData(dataset, parts, held_out=held_out, proxy=proxy, seed=seed)


def load_client(
    path: str | Path, held_out: float = 0.2, seed: int = 0, **options: Any
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
    **options
        What :func:`fedweight.data.files.load_one_csv` takes; an NPZ file has none.
    """
    from .files import load_one_csv, load_one_npz

    path = Path(path).expanduser()
    readers = {".csv": load_one_csv, ".npz": load_one_npz}
    if path.suffix not in readers:
        raise DataError(f"{path}: the name must end in .csv or .npz.")
    read = readers[path.suffix]
    check_options(f"a client's {path.suffix} file", read, options, ["path"], DataError)
    examples = read(path, **options)
    num_classes = int(examples.y.max(initial=0)) + 1
    nothing = examples.take(slice(0, 0))
    dataset = check(DataSet(str(path), examples, nothing, num_classes))
    everything = np.arange(len(examples))
    return FederatedData(dataset, [everything], held_out=held_out, seed=seed).client(0)


def _proxy_rows(dataset: DataSet, fraction: float, seed: int) -> Indices:
    return take_proxy(dataset.train.y, fraction, generator(seed, Purpose.PROXY))


def _check_partition(partition: Sequence[Indices], n: int) -> None:
    if not len(partition):
        raise DataError("the partition has no client. Give one array a client.")
    rows = np.concatenate(partition)
    if len(rows) and not (rows.min() >= 0 and rows.max() < n):
        wrong = rows.min() if rows.min() < 0 else rows.max()
        raise DataError(
            f"the partition names example {wrong}, but the training examples are 0 to "
            f"{n - 1}."
        )
    if len(np.unique(rows)) != len(rows):
        raise DataError("the partition names an example twice. Give it to one client.")
