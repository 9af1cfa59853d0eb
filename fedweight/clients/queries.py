"""Queries: what clients are asked before the rounds, without a model to train.

A server names one in the config of a ``query.ask`` message. What is run is what the
client has under that name itself, in :data:`~fedweight.clients.registries.QUERIES` or
in its app's ``queries``; never what a message brings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from ..core.errors import ClientError
from ..core.texts import shown
from ..messages import keys
from ..messages.records import NUMBERS, as_measured
from .probes import class_counts

if TYPE_CHECKING:
    from ..data.federated import ClientData


@dataclass(frozen=True)
class ClientQuery:
    """What a client is asked.

    Attributes
    ----------
    client : int
        The client's number.
    told : ConfigRecord
        What the server told it.
    arrays : Mapping[str, ndarray]
        What it was sent.
    data : ClientData
        The client's examples.
    num_classes : int
        C.
    seed : int
        The run's.
    """

    client: int
    told: ConfigRecord
    arrays: Mapping[str, npt.NDArray[Any]]
    data: ClientData
    num_classes: int
    seed: int


@dataclass(frozen=True)
class Answer:
    """What a client answers: numbers, arrays and side data, by name.

    Attributes
    ----------
    metrics, profile : Mapping
        Numbers, or lists of up to a million, by name.
    arrays : Mapping[str, ndarray]
        Arrays of numbers, by name.
    """

    metrics: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    profile: Mapping[str, Any] = field(default_factory=dict)

    def message(self, reply_to: Message) -> Message:
        """Return it as Flower sends it.

        Raises
        ------
        ClientError
            If a value is no number, and no list of numbers.
        """
        metrics: dict[str, Any] = _measured(self.metrics)
        content = RecordDict({keys.METRICS: MetricRecord(metrics)})
        if self.arrays:
            arrays = {name: np.asarray(array) for name, array in self.arrays.items()}
            for name, array in arrays.items():
                if array.dtype.kind not in "biufc":
                    raise ClientError(
                        f"an Answer's array '{name}' must be of numbers, got "
                        f"{array.dtype}"
                    )
            content[keys.ARRAYS] = ArrayRecord(
                {name: Array(array) for name, array in arrays.items()}
            )
        if self.profile:
            content[keys.PROFILE] = ConfigRecord(_measured(self.profile))
        return Message(content, reply_to=reply_to)


def _measured(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of an answer as a record carries them."""
    found = {name: as_measured(value) for name, value in values.items()}
    for name, value in found.items():
        if value is None:
            raise ClientError(
                f"an Answer's '{name}' must be {NUMBERS}, got {shown(values[name])}"
            )
    return found


Query = Callable[[ClientQuery], Answer]


def label_counts(asked: ClientQuery) -> Answer:
    """Answer how many training examples there are, and of each class."""
    train = asked.data.train
    counts = class_counts(train, asked.num_classes)
    return Answer({keys.NUM_EXAMPLES: len(train)}, profile={keys.LABEL_COUNTS: counts})


def group_counts(asked: ClientQuery) -> Answer:
    """Answer how many training examples there are, and of each group: ``[G]``.

    Groups are those of the attribute that the server tells as ``group``; where it is
    there, G is the largest code that the client has, and one.
    """
    name = str(asked.told.get(keys.GROUP))
    train = asked.data.train
    if name not in train.attributes:
        raise ClientError(
            f"group: the data have no attribute '{name}'; they have "
            f"{', '.join(sorted(train.attributes)) or 'none'}."
        )
    codes = train.attributes[name]
    if codes.dtype.kind not in "iu" or (len(codes) and codes.min() < 0):
        raise ClientError(
            f"group: '{name}' must be codes of groups, from 0, and is {codes.dtype}."
        )
    counts = np.bincount(codes, minlength=1).tolist()
    return Answer({keys.NUM_EXAMPLES: len(train)}, profile={keys.GROUP_COUNTS: counts})


def feature_sums(asked: ClientQuery) -> Answer:
    """Answer the sum of each feature, or of its squared distances from a ``mean``."""
    x = asked.data.train.x
    if len(x) and (x.ndim != 2 or x.dtype.kind != "f"):
        raise ClientError(
            "features are wanted, one row of numbers an example, and these inputs are "
            f"{x.dtype} of shape {list(x.shape[1:])}. Take tables, or a fixed "
            "embedding."
        )
    values = x.reshape(len(x), math.prod(x.shape[1:])).astype(np.float64)
    if "mean" in asked.arrays and len(x):
        values = np.square(values - asked.arrays["mean"])
    return Answer({keys.NUM_EXAMPLES: len(x)}, arrays={"sums": values.sum(0)})
