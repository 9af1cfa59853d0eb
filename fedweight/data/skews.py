"""Bias on purpose: who has which groups of a sensitive attribute."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ..core.errors import ConfigurationError, closest
from ..core.options import validated
from ..core.texts import shown
from .examples import DataSet
from .tasks import TASKS

Indices = npt.NDArray[np.int64]


@validated
def attribute_skew(
    dataset: DataSet,
    num_clients: int,
    rng: np.random.Generator,
    *,
    attribute: str = "",
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
    attribute : str
        Whose groups, such as ``"sex"`` of Adult.
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
    groups, labels = _groups_of(dataset, attribute), dataset.train.y
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


def _groups_of(dataset: DataSet, attribute: str) -> Indices:
    """Return the group of each training example, or raise if there are none."""
    known = dataset.attribute_names
    if attribute not in known or attribute not in dataset.train.attributes:
        raise ConfigurationError(
            f"attribute: data '{dataset.name}' have no groups {shown(attribute)}."
            f"{closest(attribute, known)} They have {', '.join(known) or 'none'}."
        )
    return dataset.train.attributes[attribute].astype(np.int64)
