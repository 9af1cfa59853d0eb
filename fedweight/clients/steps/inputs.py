"""What a step of a chunk of clients reads and changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ...core.layout import Entry
from ..objectives.base import Facts

# How a step's inputs are batched over clients; others are, along their first axis.
SHARED = ("step",)


class StepInputs(NamedTuple):
    """What a step of C clients reads, and changes in place.

    Attributes
    ----------
    parameters, buffers, counters : list of Tensor
        ``[C, *shape]``: the clients' models so far, tensor by tensor.
    frozen : list of Tensor
        ``[*shape]``: what is the same for all.
    ends : list of Tensor
        The rows ``[C, P]`` that the parameters are views of, and the received
        parameters, ``[P]``.
    sums : list of Tensor
        Losses and hits so far, ``[C]``, and the learning rate, 0-d.
    carry : list of Tensor
        ``[C, ...]``: what clients carry, in the order of their names.
    kept : list of Tensor
        ``[C, N + 1]``: what is kept of each example; the last place is for padding.
    facts : list of Tensor
        ``[C, ...]``: what the objective wants to know of each client.
    shared : list of Tensor
        ``[P]``: what all clients are told alike.
    batch : list of Tensor
        In the order of :attr:`StepNames.batch`.
    """

    parameters: list[Tensor]
    frozen: list[Tensor]
    buffers: list[Tensor]
    counters: list[Tensor]
    ends: list[Tensor]
    sums: list[Tensor]
    carry: list[Tensor]
    kept: list[Tensor]
    facts: list[Tensor]
    shared: list[Tensor]
    batch: list[Tensor]


class StepNames(NamedTuple):
    """What the tensors of a step's inputs are called.

    Attributes
    ----------
    carry, kept, facts, shared : tuple of str
        As the objective calls them.
    batch : tuple of str
        ``x``, ``y``, ``groups`` where they are wanted, ``seeds``, ``counts`` (real
        examples of each client), ``step``, ``mask`` where a step is not full, and
        ``ids`` (each example's place among the client's) where something is kept.
    """

    carry: tuple[str, ...]
    kept: tuple[str, ...]
    facts: tuple[str, ...]
    shared: tuple[str, ...]
    batch: tuple[str, ...]


def facts_of_client(
    names: StepNames,
    received: Tensor,
    facts: list[Tensor],
    carry: list[Tensor],
    shared: list[Tensor],
) -> Facts:
    """Return what one client's objective may know."""
    return Facts(
        received,
        dict(zip(names.facts, facts, strict=True)),
        dict(zip(names.carry, carry, strict=True)),
        dict(zip(names.shared, shared, strict=True)),
    )


def views(rows: Tensor, entries: Sequence[Entry]) -> list[Tensor]:
    """Return named tensors ``[C, *shape]`` as views of rows ``[C, P]``."""
    if not entries:
        return []
    parts = rows.split_with_sizes([e.stop - e.start for e in entries], 1)
    return [
        part.view(len(rows), *e.shape) for part, e in zip(parts, entries, strict=True)
    ]


def split(row: Tensor, entries: Sequence[Entry]) -> list[Tensor]:
    """Return named tensors as views of one client's row, ``[P]``."""
    if not entries:
        return []
    parts = row.split_with_sizes([e.stop - e.start for e in entries])
    return [part.view(e.shape) for part, e in zip(parts, entries, strict=True)]
