"""What a grid may know of its clients, beyond what Flower's ``Grid`` promises.

Ours know all of it; of others a server asks here, and takes what Flower gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class NumbersClients(Protocol):
    """A grid whose nodes stand for numbered clients."""

    def client_of(self, node_id: int) -> int:
        """Return the number of the client behind a node."""
        ...


@runtime_checkable
class NamesClients(Protocol):
    """A grid whose clients may have names."""

    @property
    def name_of(self) -> Callable[[int], str] | None:
        """What gives a client's name; ``None`` where clients have only numbers."""
        ...


@runtime_checkable
class IsComplete(Protocol):
    """A grid whose clients may all be there from the start."""

    complete: bool


@runtime_checkable
class SumsModels(Protocol):
    """A grid that may add local models up as they come."""

    sums_models: bool


@runtime_checkable
class KnowsSizes(Protocol):
    """A grid that may know how many examples its clients have."""

    def sizes_of(self, clients: Sequence[int]) -> list[int] | None:
        """Return how many examples some clients have, where it is known."""
        ...


@runtime_checkable
class KnowsWhoCame(Protocol):
    """A grid whose clients come and go."""

    @property
    def connected(self) -> set[int]:
        """The numbers of all clients that were ever there."""
        ...


def number_of(grid: object) -> Callable[[int], int]:
    """Return what gives a node's client number; by default the node itself."""
    return grid.client_of if isinstance(grid, NumbersClients) else int


def name_of(grid: object) -> Callable[[int], str]:
    """Return what gives a client's name; by default its number."""
    return (grid.name_of if isinstance(grid, NamesClients) else None) or str


def is_complete(grid: object) -> bool:
    """Tell whether all clients are there, and waiting for more is in vain."""
    return isinstance(grid, IsComplete) and grid.complete


def sums_models(grid: object) -> bool:
    """Tell whether local models may be added up as they come."""
    return isinstance(grid, SumsModels) and grid.sums_models


def sizes_of(grid: object, clients: Sequence[int]) -> list[int] | None:
    """Return how many examples some clients have; ``None`` where nobody knows."""
    return grid.sizes_of(clients) if isinstance(grid, KnowsSizes) else None
