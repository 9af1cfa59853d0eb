"""Queries: what clients are asked before the rounds, without a model to train.

A server names one in the config of a ``query.ask`` message. What is run is what the
client has under that name itself, in :data:`QUERIES` or in its app's ``queries``; never
what a message brings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from ..core.registry import Registry
from ..messages import keys

if TYPE_CHECKING:
    from ..data.federated import ClientData

QUERIES = Registry(
    "query",
    {
        keys.LABEL_COUNTS: f"{__name__}:label_counts",
        "discriminate": "fedweight.strategies.fedcollab:discriminate",
    },
)


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
    """What a client answers: numbers, arrays and side data, by name."""

    metrics: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    profile: Mapping[str, Any] = field(default_factory=dict)

    def message(self, reply_to: Message) -> Message:
        """Return it as Flower sends it."""
        content = RecordDict({keys.METRICS: MetricRecord(dict(self.metrics))})
        if self.arrays:
            content[keys.ARRAYS] = ArrayRecord(
                {name: Array(array) for name, array in self.arrays.items()}
            )
        if self.profile:
            content[keys.PROFILE] = ConfigRecord(dict(self.profile))
        return Message(content, reply_to=reply_to)


Query = Callable[[ClientQuery], Answer]


def label_counts(asked: ClientQuery) -> Answer:
    """Answer how many training examples there are, and of each class."""
    train = asked.data.train
    counts = np.bincount(train.y, minlength=asked.num_classes).tolist()
    return Answer({keys.NUM_EXAMPLES: len(train)}, profile={keys.LABEL_COUNTS: counts})
