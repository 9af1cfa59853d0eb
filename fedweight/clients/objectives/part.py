"""Another objective by which only a part of the model is trained."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Around, Objective


class Part(Around):
    """Another objective, by which only some layers are trained.

    The optimiser leaves the others alone: neither momentum nor weight decay moves them.

    Parameters
    ----------
    inner : Objective
        The other one.
    layers : Sequence[str]
        Layers or tensors, by name or by some parts of it in a row: ``"head"`` is each
        parameter that has a part ``head`` in its name, as ``layers.head.weight`` has.

    Examples
    --------
    >>> from fedweight.clients.objectives import Plain
    >>> part = Part(Plain(), ["head"])
    >>> part.trains("layers.head.weight"), part.trains("layers.heads.weight")
    (True, False)
    """

    def __init__(self, inner: Objective, layers: Sequence[str]) -> None:
        self.inner = inner
        self.layers = tuple(layers)

    def trains(self, name: str) -> bool:
        """Return whether it is of these layers, and the other one trains it."""
        return is_of(name, self.layers) and self.inner.trains(name)


def is_of(name: str, layers: Sequence[str]) -> bool:
    """Tell whether a parameter is of one of some layers, as :class:`Part` has them."""
    return any(f".{layer}." in f".{name}." for layer in layers)
