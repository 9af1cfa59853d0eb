"""Frozen tensors, sent once to the clients that do not have them."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from ..core.layout import Base
from . import keys
from .arrays import FlatRecord

log = logging.getLogger("fedweight")


class BaseSender:
    """Asks nodes whether they have a model's frozen tensors; sends them where not.

    Parameters
    ----------
    base : Base
        The tensors.
    grid : Grid
        What carries the messages.
    timeout : float
        Seconds that nodes have for an answer.
    """

    def __init__(self, base: Base, grid: Grid, timeout: float) -> None:
        self.base = base
        self.grid = grid
        self.timeout = timeout
        self._asked: set[int] = set()

    def send(self, nodes: Iterable[int]) -> None:
        """See to it that nodes have the tensors, each once.

        One that does not answer may have them; if not, its reply to a train message
        says so, and it is asked again.
        """
        new = set(nodes) - self._asked
        self._asked |= new
        told = {keys.CONFIG: ConfigRecord({keys.BASE: self.base.digest})}
        lack = self._lacking(RecordDict({**told}), new)
        sent = RecordDict({**told, keys.ARRAYS: FlatRecord(self.base.alone)})
        for node in sorted(self._lacking(sent, lack)):
            log.warning("node %d did not take the model's frozen tensors", node)

    def watched(self, replies: Iterable[Message]) -> Iterable[Message]:
        """Note which nodes lost the tensors, as one does that was restarted."""
        several = list(replies)
        for reply in several:
            if reply.has_error() and keys.OTHER_BASE in str(reply.error.reason):
                self._asked.discard(reply.metadata.src_node_id)
        return several

    def _lacking(self, content: RecordDict, nodes: set[int]) -> set[int]:
        """Ask some nodes; return those that say that they lack the tensors."""
        messages = [
            Message(content, dst_node_id=node, message_type=f"query.{keys.BASE}")
            for node in sorted(nodes)
        ]
        if not messages:
            return set()
        lacking = set()
        for reply in self.grid.send_and_receive(messages, timeout=self.timeout):
            answer = None if reply.has_error() else reply.content.get(keys.BASE)
            if isinstance(answer, ConfigRecord) and answer.get(keys.BASE) is False:
                lacking.add(reply.metadata.src_node_id)
        return lacking
