"""What a grid sees of an app: the model that it sends, and what its clients answer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Message, MetricRecord

from ..messages.records import records_of

# By the type of messages, for each reply what :class:`Seen` has noted.
Metrics = Mapping[str, Sequence[Mapping[str, Any]]]


class Seen:
    """Takes note of messages that pass through a grid.

    Parameters
    ----------
    client_of : Callable[[int], int]
        Gives the number of the client behind a node.
    wanted : bool
        Whether anything is to be noted.

    Attributes
    ----------
    arrays : ArrayRecord, optional
        The first array record of the message that was sent last and had one.
    metrics : dict[str, list[dict]]
        By the type of messages, for each reply: its ``client``, and what its metric
        records say; or its ``error``. Of metrics called ``client`` the number stays.
    failures : list[str]
        The errors among the replies.
    began : float, optional
        When the first reply was there, by ``time.perf_counter()``: what was before is
        start-up.
    """

    def __init__(self, client_of: Callable[[int], int], wanted: bool = True) -> None:
        self._client_of = client_of
        self.wanted = wanted
        self.arrays: ArrayRecord | None = None
        self.metrics: dict[str, list[dict[str, Any]]] = {}
        self.failures: list[str] = []
        self.began: float | None = None

    def sent(self, message: Message) -> None:
        """Take note of a message to a client."""
        if not self.wanted:
            return
        for record in records_of(message.content, ArrayRecord).values():
            self.arrays = record
            return

    def replied(self, replies: Iterable[Message]) -> None:
        """Take note of replies."""
        for reply in replies if self.wanted else ():
            if self.began is None:
                self.began = time.perf_counter()
            told: dict[str, Any] = {}
            if reply.has_error():
                told["error"] = reply.error.reason
                self.failures.append(str(reply.error.reason))
            else:
                for record in records_of(reply.content, MetricRecord).values():
                    told |= record
            told = {**told, "client": self._client_of(reply.metadata.src_node_id)}
            self.metrics.setdefault(reply.metadata.message_type, []).append(told)


def difference_of_models(
    mine: Sequence[npt.NDArray[Any]], others: Sequence[npt.NDArray[Any]]
) -> float:
    """Return the largest difference of the values of two models.

    Relative to the value where that is larger than 1; infinite where the shapes differ,
    or one value is not finite and the other is another one.

    Examples
    --------
    >>> difference_of_models([np.array([1.0, 101.0])], [np.array([1.0, 100.0])])
    0.01
    """
    if [a.shape for a in mine] != [a.shape for a in others]:
        return float("inf")
    pairs = zip(mine, others, strict=True)
    return max((_apart(a, b) for a, b in pairs if a.size), default=0.0)


def _apart(mine: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """Return the largest difference of two tensors' values."""
    kinds = {mine.dtype.kind, other.dtype.kind}
    if kinds - {*"biufc"}:
        return 0.0 if np.array_equal(mine, other) else math.inf
    wide = np.complex128 if "c" in kinds else np.float64
    a, b = mine.astype(wide), other.astype(wide)
    with np.errstate(invalid="ignore"):
        apart = np.abs(a - b) / np.maximum(1.0, np.abs(b))
    # Of what is not finite there is no difference: it is the same, or it is not.
    apart = np.where(np.isfinite(apart), apart, math.inf)
    apart[(a == b) | (np.isnan(a) & np.isnan(b))] = 0.0
    return float(apart.max())


def difference_of_metrics(mine: Metrics, others: Metrics) -> float:
    """Return the largest difference of what clients told, as of two models.

    Whoever they were, since Flower's nodes have no number: the replies of one kind are
    sorted. Errors are counted, and infinite is where something else was told.

    Examples
    --------
    >>> ours = {"train": [{"client": 0, "loss": 2.0}, {"client": 1, "loss": 1.0}]}
    >>> difference_of_metrics(ours, {"train": [{"loss": 1.0}, {"loss": 2.0}]})
    0.0
    >>> difference_of_metrics(ours, {"train": [{"loss": 1.0}, {"error": "..."}]})
    inf
    """
    first, second = _sorted(mine), _sorted(others)
    if [name for name, _ in first] != [name for name, _ in second]:
        return float("inf")
    return difference_of_models([v for _, v in first], [v for _, v in second])


def _sorted(metrics: Metrics) -> list[tuple[str, npt.NDArray[Any]]]:
    found = []
    for kind, replies in sorted(metrics.items()):
        rows = []
        for reply in replies:
            told = dict(reply) | ({"error": 1.0} if "error" in reply else {})
            told.pop("client", None)
            rows.append(sorted((k, np.ravel(v).tolist()) for k, v in told.items()))
        found += [
            (f"{kind} {name}", np.asarray(values, float))
            for row in sorted(rows)
            for name, values in row
        ]
    return found
