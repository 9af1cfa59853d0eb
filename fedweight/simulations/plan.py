"""The plan: how a cohort is cut into work for threads and workers.

A plan may change the last bits of a result, by training clients at once that would
otherwise train one by one; how many threads or workers there are never does. So the
plan belongs to a run's record, and the cut depends on the plan and the cohort alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import ConfigurationError, check_range
from ..core.texts import shown

if TYPE_CHECKING:
    from ..messages.dispatch import Cohort

ENGINES = ("auto", "local", "ray")

# Clients that evaluate in one go, at least: they share the global model, so small
# held-out parts go through it together. Of many clients so many lists are made, enough
# for threads and workers; and none has more than the last number of clients.
EVALUATION_CHUNK = 32
EVALUATION_LISTS = 16
LONGEST_EVALUATION = 256

# Clients that train one after another are handed out in so many lists, enough for
# threads to end together; more where a list would be so long that the models in it,
# which are held until it ends, take much memory.
LOOP_LISTS = 64
LONGEST_LOOP = 16


@dataclass(frozen=True)
class Plan:
    """How clients are trained.

    Parameters
    ----------
    chunk : int
        How many clients train at once, 1 or more (see
        :mod:`fedweight.clients.steps.batched`); 1 trains them one after another. Else
        nobody is left alone: of an odd number of clients in twos, three go together.
    """

    chunk: int = 1

    def __post_init__(self) -> None:
        """Check the range."""
        check_range("chunk", self.chunk, 1)

    @classmethod
    def parse(cls, text: str) -> Plan | None:
        """Read a plan: ``loop``, ``batched-20``; ``auto`` is ``None``.

        Examples
        --------
        >>> Plan.parse("batched-20")
        Plan(chunk=20)
        """
        if text == "auto":
            return None
        if text == "loop":
            return cls()
        number = re.fullmatch("batched-([0-9]{1,9})", text)
        if number and int(number[1]) >= 2:
            return cls(int(number[1]))
        raise ConfigurationError(
            f"engine.plan must be 'auto', 'loop' or 'batched-N' with N clients at "
            f"once, 2 or more, got {shown(text)}."
        )

    def __str__(self) -> str:
        return "loop" if self.chunk == 1 else f"batched-{self.chunk}"

    def halved(self, tried: int) -> Plan:
        """Return the plan for a device that has no room for so many at once.

        Examples
        --------
        >>> Plan(80).halved(50), Plan(20).halved(50), Plan(3).halved(3)
        (Plan(chunk=25), Plan(chunk=20), Plan(chunk=1))
        """
        # Three in twos would be three again.
        return Plan(min(self.chunk, -(-tried // 2) if tried > 3 else 1))

    def cut(
        self,
        cohort: Cohort,
        sizes: Sequence[int] | None,
        nodes: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Return the cohort's nodes in the lists that are handled at once.

        Parameters
        ----------
        cohort : Cohort
            What is sent.
        sizes : Sequence[int], optional
            How much work each of its clients has. Clients of like size share a list,
            so that few wait for others, and the largest come first.
        nodes : Sequence[int], optional
            Whom to cut, with their ``sizes``; by default all of the cohort.
        """
        nodes = list(cohort.nodes if nodes is None else nodes)
        if not nodes:
            return []
        train = cohort.trains
        if train and sizes is not None:
            order = np.argsort(-np.asarray(sizes), kind="stable").tolist()
            nodes = [nodes[k] for k in order]
        if not train:
            even = -(-len(nodes) // EVALUATION_LISTS)
            limit = min(max(EVALUATION_CHUNK, even), LONGEST_EVALUATION)
        elif self.chunk > 1:
            limit = self.chunk
        else:
            limit = min(-(-len(nodes) // LOOP_LISTS), LONGEST_LOOP)
        count = -(-len(nodes) // limit)
        if train and self.chunk > 1:
            count = min(count, max(len(nodes) // 2, 1))
        # The first lists have one more, where they cannot all be alike.
        least, more = divmod(len(nodes), count)
        ends = [k * least + min(k, more) for k in range(count + 1)]
        return [nodes[start:end] for start, end in pairwise(ends)]


def sizes_of(client_app: Any, clients: Sequence[int]) -> list[int] | None:
    """Return how many examples some clients have, where the app knows."""
    sizes = getattr(client_app, "sizes", None)
    if isinstance(sizes, np.ndarray):
        found: list[int] = sizes[np.asarray(clients, np.int64)].tolist()
        return found
    return None if sizes is None else [int(sizes[client]) for client in clients]
