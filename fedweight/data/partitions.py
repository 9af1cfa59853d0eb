"""How one data set is divided among clients.

A partition is a pure function of the labels (or of the natural clients), the number
of clients and a random generator. It returns one sorted array of example numbers a
client; no example is with two clients, and unless it says otherwise every example is
with one. None of them draws again until it likes the result: each ends after one
pass. Those of :mod:`~fedweight.data.lazy` are the exception: their parts are computed
when they are asked for, and share examples.
"""

from __future__ import annotations

import heapq
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Gt

from ..core.errors import ConfigurationError, DataError, check_range
from ..core.options import check_options, validated
from ..core.registry import Registry, check_callable, make
from ..core.rng import Purpose, generator
from ..core.texts import shown
from .examples import DataSet
from .lazy import LazyParts
from .tasks import TASKS

# Where each example is with one client, so many clients for each example are enough:
# all but a few of them would be empty.
CLIENTS_PER_EXAMPLE = 10

Indices = npt.NDArray[np.int64]
Parts = list[Indices]

PARTITIONS = Registry(
    "partition",
    {
        "attribute": "fedweight.data.skews:attribute_skew",
        "classes": "fedweight.data.partitions:classes",
        "dirichlet": "fedweight.data.partitions:dirichlet",
        "dirichlet-sampled": "fedweight.data.lazy:dirichlet_sampled",
        "iid": "fedweight.data.partitions:iid",
        "natural": "fedweight.data.partitions:natural",
        "niid2": "fedweight.data.partitions:niid2",
        "quantity": "fedweight.data.partitions:quantity",
        "shards": "fedweight.data.partitions:shards",
    },
)

# Those that divide examples by their classes.
BY_CLASS = frozenset({"classes", "dirichlet", "dirichlet-sampled", "niid2", "shards"})


def partition(
    dataset: DataSet,
    name: str,
    num_clients: int | None,
    seed: int,
    *,
    rows: Indices | None = None,
    **options: Any,
) -> Parts | LazyParts:
    """Divide the training examples of a data set among clients.

    Parameters
    ----------
    dataset : DataSet
        What is divided.
    name : str
        One of :func:`partition_catalogue`, or ``"module:function"`` for one of your
        own: it is called as ``function(dataset, num_clients, rng, **options)`` and
        returns a sequence of ``num_clients`` integer arrays. If its third parameter
        is called ``seed``, it gets that instead of a generator, to name a stream for
        each client; it may return :class:`~fedweight.data.lazy.LazyParts`.
    num_clients : int or None
        K, 1 or more. ``None`` stands for all natural clients, with ``natural`` only.
    seed : int
        The same seed gives the same parts.
    rows : ndarray, optional
        Only these training examples are divided; by default all.
    **options
        What the partition's own function takes.

    Returns
    -------
    list of ndarray, or LazyParts
        Sorted example numbers, counted in ``dataset.train``, for each client.

    Examples
    --------
    >>> from fedweight.data import load
    >>> parts = partition(load("digits"), "iid", num_clients=4, seed=0)
    >>> [len(part) for part in parts]
    [360, 360, 359, 359]
    """
    function: Callable[..., Sequence[Indices]] = PARTITIONS.resolve(name)
    what = f"partition '{name}'"
    if rows is None:
        rows = np.arange(len(dataset.train))
    if num_clients is None and name != "natural":
        raise ConfigurationError(f"{what} needs num_clients, a number from 1.")
    if num_clients is not None:
        check_range("num_clients", num_clients, 1)
    check_callable(what, function, "function(dataset, num_clients, rng, **options)", 3)
    positional = list(inspect.signature(function).parameters)[:3]
    options = check_options(what, function, options, positional)
    if name == "natural":
        numbers, _ = _natural(dataset)
        groups = _groups(numbers[rows], natural_choice(dataset, num_clients))
        return [rows[group] for group in groups]
    task = TASKS[dataset.task]
    if name in BY_CLASS and not task.has_classes:
        others = sorted(PARTITIONS.entries.keys() - BY_CLASS)
        raise ConfigurationError(
            f"{what} divides examples by their classes, and those of data "
            f"'{dataset.name}' {task.instead} ({task.name}). Take one of "
            f"{', '.join(others)}."
        )
    subject: Any = dataset.train.y[rows]
    if name not in PARTITIONS.entries or positional[0] == "dataset":
        subject = _subset(dataset, rows)
    by_client = positional[2:] == ["seed"]
    if name in PARTITIONS.entries and not by_client:
        _check_clients(what, num_clients, len(rows))
    source = seed if by_client else generator(seed, Purpose.PARTITION)
    returned = make(what, lambda: function(subject, num_clients, source, **options))
    if isinstance(returned, LazyParts):
        _check_number(what, len(returned), num_clients)
        _check_rows(what, returned.rows, len(rows))
        return LazyParts(returned.sizes, returned.draw, rows[returned.rows])
    try:
        parts = [np.sort(np.asarray(part)) for part in returned]
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{what} returned {shown(returned)}: {error}. Return one array of example "
            "numbers for each client."
        ) from None
    if name not in PARTITIONS.entries:
        _check_parts(what, parts, num_clients, len(rows))
    return [rows[part] for part in parts]


def partition_catalogue() -> dict[str, str]:
    """Return each partition's name with a line that describes it."""
    return PARTITIONS.descriptions()


def iid(labels: Indices, num_clients: int, rng: np.random.Generator) -> Parts:
    """Every client alike: examples are dealt at random, in parts of equal size.

    Parameters
    ----------
    labels : ndarray
        Shape ``[n]``; only their number matters.
    num_clients : int
        K. With K > n some clients are empty.
    rng : Generator
        The source of randomness.

    References
    ----------
    H. B. McMahan et al., "Communication-Efficient Learning of Deep Networks from
    Decentralized Data", AISTATS, 2017.

    Examples
    --------
    >>> parts = iid(np.zeros(7, int), 3, np.random.default_rng(0))
    >>> [len(part) for part in parts]
    [3, 2, 2]
    """
    order = rng.permutation(len(labels))
    return [np.sort(part) for part in np.array_split(order, num_clients)]


@validated
def dirichlet(
    labels: Indices,
    num_clients: int,
    rng: np.random.Generator,
    *,
    alpha: Annotated[float, Gt(0)] = 0.3,
    min_size: int = 0,
    balanced: bool = False,
) -> Parts:
    """Label skew: each class is divided by shares from a Dirichlet distribution.

    Parameters
    ----------
    labels : ndarray
        Shape ``[n]``, the class of each example.
    num_clients : int
        K.
    rng : Generator
        The source of randomness.
    alpha : float
        Concentration, greater than 0. As alpha goes to infinity the clients become
        alike (iid); as it goes to 0 each class goes to one client.
    min_size : int
        How many examples a client has at least, from 0 to n / K. Where the draw gives
        fewer, the client gets random examples of whichever client is then the largest;
        the literature draws the whole partition again instead, which may never end.
    balanced : bool
        FedDisco's rule (its setting NIID-1): a client that already has n / K examples
        gets none of the classes that follow, so that sizes differ less.

    Raises
    ------
    ConfigurationError
        If a parameter is out of range, or there are too few examples for ``min_size``.

    References
    ----------
    T.-M. H. Hsu, H. Qi, M. Brown, "Measuring the Effects of Non-Identical Data
    Distribution for Federated Visual Classification", arXiv:1909.06335, 2019.

    M. Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural
    Networks", ICML, 2019 (shares a class).

    R. Ye et al., "FedDisco: Federated Learning with Discrepancy-Aware Collaboration",
    ICML, 2023.

    Examples
    --------
    >>> labels = np.repeat([0, 1], 50)
    >>> even = dirichlet(labels, 2, np.random.default_rng(0), alpha=1e6)
    >>> [np.bincount(labels[part]).tolist() for part in even]
    [[25, 25], [25, 25]]
    """
    parts: list[list[Indices]] = [[] for _ in range(num_clients)]
    sizes = np.zeros(num_clients, np.int64)
    for members in _by_class(labels, rng):
        open_to = np.ones(num_clients, bool)
        if balanced:
            open_to = sizes < len(labels) / num_clients
        takers = np.flatnonzero(open_to)
        cut = _cut(members, len(takers), alpha, rng)
        for taker, part in zip(takers, cut, strict=True):
            parts[taker].append(part)
            sizes[taker] += len(part)
    return _with_least_size([_merge(part) for part in parts], min_size, rng)


@validated
def quantity(
    labels: Indices,
    num_clients: int,
    rng: np.random.Generator,
    *,
    alpha: Annotated[float, Gt(0)] = 0.5,
    min_size: int = 0,
) -> Parts:
    """Size skew: sizes come from a Dirichlet distribution, labels are dealt at random.

    Parameters
    ----------
    labels : ndarray
        Shape ``[n]``; only their number matters.
    num_clients : int
        K.
    rng : Generator
        The source of randomness.
    alpha : float
        Concentration, greater than 0. As alpha goes to infinity sizes become equal
        (iid); as it goes to 0 one client has everything.
    min_size : int
        How many examples a client has at least; see :func:`dirichlet`.

    References
    ----------
    Q. Li, Y. Diao, Q. Chen, B. He, "Federated Learning on Non-IID Data Silos: An
    Experimental Study", ICDE, 2022.

    Examples
    --------
    >>> labels = np.zeros(100, int)
    >>> parts = quantity(labels, 4, np.random.default_rng(0), alpha=1e6)
    >>> [len(part) for part in parts]
    [25, 25, 25, 25]
    """
    parts = _cut(rng.permutation(len(labels)), num_clients, alpha, rng)
    return _with_least_size([np.sort(part) for part in parts], min_size, rng)


@validated
def shards(
    labels: Indices,
    num_clients: int,
    rng: np.random.Generator,
    *,
    shards_per_client: Annotated[int, Ge(1)] = 2,
) -> Parts:
    """Label skew: sorted by label, cut into equal shards, a few shards a client.

    Parameters
    ----------
    labels : ndarray
        Shape ``[n]``, the class of each example.
    num_clients : int
        K.
    rng : Generator
        The source of randomness.
    shards_per_client : int
        From 1 to n / K. A shard holds one class, but for C - 1 shards at most that
        hold where two meet: with s shards all but C - 1 clients see s classes or
        fewer. With n / K shards, one example each, the partition is iid.

    References
    ----------
    H. B. McMahan et al., "Communication-Efficient Learning of Deep Networks from
    Decentralized Data", AISTATS, 2017 (200 shards of 300 digits, two a client).

    Examples
    --------
    >>> labels = np.repeat([0, 1, 2, 3], 10)
    >>> parts = shards(labels, 4, np.random.default_rng(0), shards_per_client=1)
    >>> [len(set(labels[part].tolist())) for part in parts]
    [1, 1, 1, 1]
    """
    count = num_clients * shards_per_client
    if count > len(labels):
        raise ConfigurationError(
            f"shards_per_client = {shards_per_client} with {num_clients} clients makes "
            f"{count} shards of {len(labels)} examples. Take fewer shards or clients."
        )
    pieces = np.array_split(np.concatenate(_by_class(labels, rng)), count)
    hands = rng.permutation(count).reshape(num_clients, shards_per_client)
    return [_merge([pieces[shard] for shard in hand]) for hand in hands]


@validated
def classes(
    labels: Indices,
    num_clients: int,
    rng: np.random.Generator,
    *,
    classes_per_client: int = 2,
) -> Parts:
    """Label skew: each client has examples of a fixed number of classes.

    Classes are dealt so that each is with equally many clients, up to one; a class is
    divided evenly among those who have it, of whom some get nothing where it has fewer
    examples than there are of them.

    Parameters
    ----------
    labels : ndarray
        Shape ``[n]``, the class of each example.
    num_clients : int
        K.
    rng : Generator
        The source of randomness.
    classes_per_client : int
        From 1 to the number of classes C; with C all clients have as much of a class,
        up to one example. ``K * classes_per_client`` must be C or more, so that no
        class is left.

    References
    ----------
    Q. Li, Y. Diao, Q. Chen, B. He, "Federated Learning on Non-IID Data Silos: An
    Experimental Study", ICDE, 2022 (there classes are drawn, here they are dealt).

    Examples
    --------
    >>> labels = np.repeat([0, 1, 2, 3], 10)
    >>> parts = classes(labels, 4, np.random.default_rng(0), classes_per_client=2)
    >>> [len(set(labels[part].tolist())) for part in parts]
    [2, 2, 2, 2]
    """
    members = _by_class(labels, rng)
    held = _deal(len(members), num_clients, classes_per_client, rng)
    return _share_evenly(members, held)


@validated
def niid2(
    labels: Indices,
    num_clients: int,
    rng: np.random.Generator,
    *,
    classes_per_client: int = 2,
) -> Parts:
    """FedDisco's NIID-2: one client like the whole, all others with few classes.

    The last client is the balanced one: it gets one K-th of every class, rounded. What
    is left is divided among the others as in :func:`classes`. The setting of the paper
    is K = 6 on ten classes: five clients with two classes each, and one with all.

    Parameters
    ----------
    labels : ndarray
        Shape ``[n]``, the class of each example.
    num_clients : int
        K, 2 or more.
    rng : Generator
        The source of randomness.
    classes_per_client : int
        From 1 to the number of classes C. ``(K - 1) * classes_per_client`` must be C
        or more, so that no class is left.

    References
    ----------
    R. Ye et al., "FedDisco: Federated Learning with Discrepancy-Aware Collaboration",
    ICML, 2023.

    Examples
    --------
    >>> labels = np.repeat(np.arange(10), 60)
    >>> parts = niid2(labels, 6, np.random.default_rng(0))
    >>> [len(set(labels[part].tolist())) for part in parts]
    [2, 2, 2, 2, 2, 10]
    >>> [len(part) for part in parts]
    [100, 100, 100, 100, 100, 100]
    """
    check_range("num_clients", num_clients, 2)
    members = _by_class(labels, rng)
    held = _deal(len(members), num_clients - 1, classes_per_client, rng)
    balanced, others = [], []
    for member in members:
        share = round(len(member) / num_clients)
        balanced.append(member[:share])
        others.append(member[share:])
    return [*_share_evenly(others, held), _merge(balanced)]


def natural(
    natural_clients: Indices, num_clients: int | None, rng: np.random.Generator
) -> Parts:
    """Real clients, as the data set names them: a role, a person, a hospital.

    Parameters
    ----------
    natural_clients : ndarray
        Shape ``[n]``, which client each example belongs to.
    num_clients : int or None
        If smaller than the number of natural clients, only the largest that many are
        taken, and the examples of the others are with nobody. ``None``, or more than
        there are, means all. A client whose examples were all drawn for testing, or
        by the server for its proxy, stays as an empty one.
    rng : Generator
        Not used; here so that all partitions are called alike.

    References
    ----------
    S. Caldas et al., "LEAF: A Benchmark for Federated Settings", arXiv:1812.01097,
    2018.

    Examples
    --------
    >>> roles = np.array([7, 3, 7, 5, 5, 5])
    >>> [part.tolist() for part in natural(roles, 2, np.random.default_rng(0))]
    [[3, 4, 5], [0, 2]]
    """
    _, numbers = np.unique(natural_clients, return_inverse=True)
    return _groups(numbers, _largest(np.bincount(numbers), num_clients))


def natural_choice(dataset: DataSet, num_clients: int | None) -> Indices:
    """Return the numbers of the natural clients that ``natural`` takes, ascending.

    They are the largest by all of their examples, so no draw decides who they are.

    Parameters
    ----------
    dataset : DataSet
        One with natural clients.
    num_clients : int or None
        How many; ``None``, or more than there are, means all.
    """
    return _largest(_natural(dataset)[1], num_clients)


def _natural(dataset: DataSet) -> tuple[Indices, Indices]:
    """Return each training example's natural client, and the size of each client."""
    if dataset.natural_clients is None:
        raise DataError(
            f"data '{dataset.name}' has no natural clients. Take another "
            "partition, or name the client column of your file."
        )
    numbers = dataset.natural_clients
    if not dataset.natural_names:
        _, numbers = np.unique(numbers, return_inverse=True)
    sizes = dataset.natural_sizes
    if sizes is None:
        sizes = np.bincount(numbers, minlength=len(dataset.natural_names))
    return numbers, sizes


def _largest(sizes: Indices, num_clients: int | None) -> Indices:
    """Return the places of the largest sizes, ascending; ties go to the first."""
    if num_clients is None:
        return np.arange(len(sizes))
    return np.sort(np.argsort(-sizes, kind="stable")[:num_clients])


def _groups(numbers: Indices, chosen: Indices) -> Parts:
    """Return the places of each chosen number, ascending; none for one that is not."""
    order = np.argsort(numbers, kind="stable").astype(np.int64)
    found = numbers[order]
    starts = np.searchsorted(found, chosen, "left")
    stops = np.searchsorted(found, chosen, "right")
    return [order[a:b] for a, b in zip(starts, stops, strict=True)]


def _by_class(labels: Indices, rng: np.random.Generator) -> Parts:
    """Return the example numbers of each class that occurs, shuffled."""
    order = np.argsort(labels, kind="stable").astype(np.int64)
    _, counts = np.unique(labels, return_counts=True)
    members = np.split(order, np.cumsum(counts)[:-1])
    return [rng.permutation(member) for member in members]


def _cut(members: Indices, count: int, alpha: float, rng: np.random.Generator) -> Parts:
    """Cut an array into parts whose shares are one Dirichlet draw."""
    shares = rng.dirichlet(np.full(count, alpha))
    if not math.isclose(shares.sum(), 1, rel_tol=1e-6):
        # Beyond the range of floating numbers the draw is its own limit.
        extreme = np.zeros(count)
        extreme[rng.integers(count)] = 1
        shares = extreme if alpha < 1 else np.full(count, 1 / count)
    # Rounding keeps a cut that is due at a whole number from falling below it.
    places = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
    return np.split(members, places)


def _merge(pieces: Sequence[Indices]) -> Indices:
    if not pieces:
        return np.empty(0, np.int64)
    return np.sort(np.concatenate(pieces))


def _with_least_size(parts: Parts, min_size: int, rng: np.random.Generator) -> Parts:
    """Move examples, one at a time, from the largest client to each too small one."""
    total = sum(len(part) for part in parts)
    if not 0 <= min_size * len(parts) <= total:
        raise ConfigurationError(
            f"min_size must be from 0 to {total // len(parts)} for {total} examples "
            f"and {len(parts)} clients, got {min_size}. Take fewer clients."
        )
    small = [number for number, part in enumerate(parts) if len(part) < min_size]
    if not small:
        return parts
    largest = [(-len(part), number) for number, part in enumerate(parts)]
    heapq.heapify(largest)
    given: dict[int, list[int]] = {}
    left = [len(part) for part in parts]
    hands: dict[int, list[int]] = {number: [] for number in small}
    for number in small:
        for _ in range(min_size - left[number]):
            _, donor = largest[0]
            if donor not in given:
                given[donor] = rng.permutation(parts[donor]).tolist()
            hands[number].append(given[donor].pop())
            left[donor] -= 1
            heapq.heapreplace(largest, (-left[donor], donor))
    new = list(parts)
    for donor, kept in given.items():
        new[donor] = np.sort(np.array(kept, np.int64))
    for number, got in hands.items():
        new[number] = _merge([parts[number], np.array(got, np.int64)])
    return new


def _deal(
    num_classes: int, num_clients: int, each: int, rng: np.random.Generator
) -> list[list[int]]:
    """Return, for each class, the clients that hold it.

    Every client in turn takes the classes that fewest hold so far, ties by lot.
    """
    check_range("classes_per_client", each, 1, num_classes)
    if num_clients * each < num_classes:
        raise ConfigurationError(
            f"classes_per_client = {each} leaves classes without a client: "
            f"{num_clients} such clients hold {num_clients * each} of {num_classes}. "
            f"Take {math.ceil(num_classes / num_clients)} or more, or more clients."
        )
    holders: list[list[int]] = [[] for _ in range(num_classes)]
    for client in range(num_clients):
        lot = rng.permutation(num_classes)
        held = np.array([len(holders[number]) for number in lot])
        for number in lot[np.argsort(held, kind="stable")[:each]]:
            holders[number].append(client)
    return holders


def _share_evenly(members: Parts, holders: list[list[int]]) -> Parts:
    num_clients = 1 + max(client for clients in holders for client in clients)
    pieces: list[Parts] = [[] for _ in range(num_clients)]
    for member, clients in zip(members, holders, strict=True):
        split = np.array_split(member, len(clients))
        for client, piece in zip(clients, split, strict=True):
            pieces[client].append(piece)
    return [_merge(piece) for piece in pieces]


def _subset(dataset: DataSet, rows: Indices) -> DataSet:
    natural = dataset.natural_clients
    return replace(
        dataset,
        train=dataset.train.take(rows),
        natural_clients=None if natural is None else natural[rows],
    )


def _check_clients(what: str, num_clients: int | None, n: int) -> None:
    if num_clients is not None and num_clients > CLIENTS_PER_EXAMPLE * max(n, 1):
        raise ConfigurationError(
            f"{what} gives each of {n} training examples to one client; "
            f"{num_clients} clients would be empty but for a few. Take fewer, at most "
            f"{CLIENTS_PER_EXAMPLE * n}, or 'dirichlet-sampled', whose clients share "
            "examples."
        )


def _check_number(what: str, number: int, num_clients: int | None) -> None:
    if number != num_clients:
        raise DataError(
            f"{what} returned {number} parts for {num_clients} clients. Return one "
            "a client; it may be empty."
        )


def _check_rows(what: str, rows: Indices, n: int) -> None:
    if len(rows) and not (rows.min() >= 0 and rows.max() < n):
        raise DataError(f"{what} returned example numbers outside 0 to {n - 1}.")


def _check_parts(what: str, parts: Parts, num_clients: int | None, n: int) -> None:
    _check_number(what, len(parts), num_clients)
    everything = np.concatenate(parts)
    if len(everything) and not np.issubdtype(everything.dtype, np.integer):
        raise DataError(f"{what} returned {everything.dtype}. Return example numbers.")
    _check_rows(what, everything, n)
    if len(np.unique(everything)) != len(everything):
        raise DataError(f"{what} gave an example twice. Give each to one client.")
