"""What a grid may know of its clients, beyond what Flower's ``Grid`` promises.

Ours know all of it; of others a server asks here, and takes what Flower gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from ..core.client_store import ClientStore

if TYPE_CHECKING:
    from ..core.layout import Base
    from .codecs import Codec


def number_of(grid: object) -> Callable[[int], int]:
    """Return what gives a node's client number; by default the node itself."""
    given: Callable[[int], int] = getattr(grid, "client_of", int)
    return given


def name_of(grid: object) -> Callable[[int], str]:
    """Return what gives a client's name; by default its number."""
    given: Callable[[int], str] | None = getattr(grid, "name_of", None)
    return given or str


def is_complete(grid: object) -> bool:
    """Tell whether all clients are there, and waiting for more is in vain."""
    return bool(getattr(grid, "complete", False))


def sums_models(grid: object) -> bool:
    """Tell whether local models may be added up as they come."""
    return bool(getattr(grid, "sums_models", False))


def sizes_of(grid: object, clients: Sequence[int]) -> Sequence[int] | None:
    """Return how many examples some clients have; ``None`` where nobody knows."""
    known: Callable[[Sequence[int]], Sequence[int] | None] | None
    known = getattr(grid, "sizes_of", None)
    return None if known is None else known(clients)


def connected(grid: object) -> set[int] | None:
    """Return all clients that were ever there; ``None`` where none come and go."""
    there: set[int] | None = getattr(grid, "connected", None)
    return there


def staged(grid: object) -> AbstractContextManager[Callable[[], None]]:
    """Stage what clients keep in a ``with`` block, where the grid has it.

    It is dropped at the end unless the function is called that the block yields.
    """
    store: ClientStore | None = getattr(grid, "store", None)
    return nullcontext(lambda: None) if store is None else store.staged()


def read_by(grid: object, codec: Codec) -> None:
    """Have clients write models with a codec, where they go over a network."""
    reads = getattr(grid, "read_by", None)
    if reads is not None:
        reads(codec)


def bring_base(grid: object, base: Base) -> None:
    """Have clients sent what no round changes of a model, where they may lack it."""
    bring = getattr(grid, "bring", None)
    if bring is not None:
        bring(base)
