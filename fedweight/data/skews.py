"""Bias on purpose: who has which groups, and whose labels are wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ..core.errors import ConfigurationError, closest
from ..core.options import validated
from ..core.rng import Purpose, generator
from ..core.texts import listed, shown
from .examples import DataSet
from .lazy import LazyParts
from .tasks import TASKS

Indices = npt.NDArray[np.int64]


@validated
def attribute_skew(
    dataset: DataSet,
    num_clients: int,
    rng: np.random.Generator,
    *,
    attribute: str | Sequence[str] = "",
    skewed: Literal["groups", "labels-by-group"] = "groups",
    strength: Annotated[float, Field(ge=0, le=1)] = 0.5,
) -> list[Indices]:
    """Group skew: a share of each client's examples is from one group, sizes are equal.

    A share ``1 - strength`` of all examples, drawn by lot, is dealt evenly. The rest is
    put in order and cut into equal pieces, one a client in random order; so all clients
    are of one size, up to an example, and what differs between them is their groups.

    Parameters
    ----------
    dataset : DataSet
        Its training examples have the attribute.
    num_clients : int
        K. With K > n some clients are empty.
    rng : Generator
        The source of randomness.
    attribute : str or list of str
        Whose groups, such as ``"sex"`` of Adult. Of several attributes those groups
        that they make together: ``["sex", "race"]``.
    skewed : {"groups", "labels-by-group"}
        What is put in order. With ``"groups"`` a client's piece is of one group, so
        clients differ in whom they serve. With ``"labels-by-group"`` it is of one
        difference between label and group, counted round: its label is then told by the
        group, in another way at other clients, and a model that only sees one of them
        learns to judge by the group.
    strength : float
        In [0, 1]. 0 is iid; at 1 all of a client is from one piece, and all clients but
        those where two groups meet, one fewer than there are groups, have one only.

    Raises
    ------
    ConfigurationError
        If the data have no such groups.

    Examples
    --------
    >>> from fedweight.data import Examples
    >>> sex = np.repeat([0, 1], 10)
    >>> some = Examples(np.zeros((20, 1), np.float32), np.arange(20) % 2, {"sex": sex})
    >>> data = DataSet("people", some, some, 2, attribute_names={"sex": ("f", "m")})
    >>> rng = np.random.default_rng(0)
    >>> parts = attribute_skew(data, 4, rng, attribute="sex", strength=1.0)
    >>> sorted(np.bincount(sex[part], minlength=2).tolist() for part in parts)
    [[0, 5], [0, 5], [5, 0], [5, 0]]
    """
    groups, labels = np.zeros(len(dataset.train), np.int64), dataset.train.y
    names = [attribute] if isinstance(attribute, str) else [*attribute] or [""]
    for name in names:
        own = _groups_of(dataset, name)
        groups = groups * len(dataset.attribute_names[name]) + own
    task = TASKS[dataset.task]
    if skewed == "labels-by-group" and not task.has_classes:
        raise ConfigurationError(
            f"skewed = 'labels-by-group' goes by the examples' classes, and those of "
            f"data '{dataset.name}' {task.instead} ({task.name}). Take 'groups'."
        )
    if skewed == "labels-by-group":
        groups = (labels - groups) % max(dataset.num_classes, 1)
    order = rng.permutation(len(groups)).astype(np.int64)
    even, rest = np.split(order, [len(order) - round(strength * len(order))])
    rest = rest[np.argsort(groups[rest], kind="stable")]
    pieces = np.array_split(rest, num_clients)
    hands = rng.permutation(num_clients)
    # Whose piece is an example longer is not, if possible, dealt one more, too.
    dealt = np.array_split(even, num_clients)[::-1]
    return [np.sort(np.concatenate([dealt[k], pieces[k]])) for k in hands]


@validated
def flipped_labels(
    dataset: DataSet,
    parts: Sequence[Indices],
    seed: int,
    *,
    attribute: str = "",
    rates: Sequence[Annotated[float, Field(ge=0, le=1)]],
    strength: Annotated[float, Field(ge=0, le=1)] = 0.0,
) -> Indices:
    """Flip labels of clients' examples, at some clients or in some groups more often.

    An example of group g at client k has a label of another class with probability
    ``rates[g] * f_k``. With two classes that is the other one, with more each of the
    others is as likely. The same examples are flipped whatever the rates, and more of
    them where rates are higher: an example that is flipped at a low rate is at a higher
    one, too.

    Parameters
    ----------
    dataset : DataSet
        Its training examples have the attribute. It stays as it is, and so does what is
        in nobody's part: test examples and the server's proxy keep their true labels.
    parts : sequence of ndarray
        For each of K clients, the numbers of its training examples.
    seed : int
        The same seed flips the same examples.
    attribute : str
        Whose groups, such as ``"sex"`` of Adult; empty: all examples are one.
    rates : sequence of float
        One a group, in the order of ``attribute_names``, each in [0, 1]: the mean over
        clients.
    strength : float
        In [0, 1], how much clients differ: ``f_k`` are K numbers of equal distance from
        ``1 - strength`` to ``1 + strength``, in random order. At 0 all flip alike; at 1
        one client does not flip at all, and another one twice as often as the mean. No
        rate times ``1 + strength`` may be above 1.

    Returns
    -------
    ndarray
        Shape ``[len(dataset.train)]``, the labels that clients have.

    Raises
    ------
    ConfigurationError
        If the data have no such groups or no classes, there are not as many rates as
        groups, a rate would be above 1, or clients that differ share examples.

    Examples
    --------
    >>> from fedweight.data import Examples
    >>> sex = np.repeat([0, 1], 500)
    >>> some = Examples(np.zeros((1000, 1)), np.zeros(1000, np.int64), {"sex": sex})
    >>> data = DataSet("people", some, some, 2, attribute_names={"sex": ("f", "m")})
    >>> parts = [np.arange(1000)]
    >>> y = flipped_labels(data, parts, 0, attribute="sex", rates=[0.3, 0.0])
    >>> bool(0.25 < y[:500].mean() < 0.35), int(y[500:].sum())
    (True, 0)
    """
    groups, labels = np.zeros(len(dataset.train), np.int64), dataset.train.y
    names: Sequence[str] = ("all examples",)
    if attribute:
        groups = _groups_of(dataset, attribute)
        names = dataset.attribute_names[attribute]
    task = TASKS[dataset.task]
    if not task.has_classes:
        raise ConfigurationError(
            f"rates flip the examples' classes, and those of data '{dataset.name}' "
            f"{task.instead} ({task.name})."
        )
    if len(rates) != len(names):
        raise ConfigurationError(
            f"rates must be {len(names)}, one for "
            + (f"each group of '{attribute}', " if attribute else "")
            + f"{listed(names, most=9)}, got {len(rates)}."
            + ("" if attribute else " Of groups, name their attribute.")
        )
    if max(rates) * (1 + strength) > 1:
        raise ConfigurationError(
            f"a rate times 1 + strength is the one of the client that flips most, and "
            f"must be at most 1, got {max(rates):g} * (1 + {strength:g}). Lower one."
        )
    # Drawn for every example, so that nobody's depend on who has which.
    n, stream = len(labels), generator(seed, Purpose.FLIPS)
    chance, which = stream.random(n), stream.random(n)
    factors = np.zeros(n)
    if isinstance(parts, LazyParts):
        if strength > 0:
            raise ConfigurationError(
                "strength has clients flip different shares of their labels, and "
                "clients of this partition share examples. Set it to 0, or take "
                "another partition."
            )
        factors[parts.rows] = 1.0
    else:
        spread = np.linspace(1 - strength, 1 + strength, len(parts))
        spread = spread if len(parts) > 1 else np.ones(1)
        for part, factor in zip(parts, stream.permutation(spread), strict=True):
            factors[part] = factor
    flips = chance < np.asarray(rates)[groups] * factors
    others = dataset.num_classes - 1
    steps = 1 + np.minimum((which * others).astype(np.int64), max(others - 1, 0))
    flipped: Indices = np.where(flips, (labels + steps) % dataset.num_classes, labels)
    return flipped


def _groups_of(dataset: DataSet, attribute: str) -> Indices:
    """Return the group of each training example, or raise if there are none."""
    known = dataset.attribute_names
    if attribute not in known or attribute not in dataset.train.attributes:
        raise ConfigurationError(
            f"attribute: data '{dataset.name}' have no groups {shown(attribute)}."
            f"{closest(attribute, known)} They have {', '.join(known) or 'none'}."
        )
    return dataset.train.attributes[attribute].astype(np.int64)
