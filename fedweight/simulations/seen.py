"""What a grid sees of an app: the model that it sends, and what its clients answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord

from ..messages.records import records_of


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
