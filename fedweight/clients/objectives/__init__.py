"""Local objectives: what a client minimises on a batch. One file a method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...core.errors import ConfigurationError
from ...core.lazy import lazy_exports
from ...core.registry import Registry

if TYPE_CHECKING:
    from ...strategies.fedprox import Proximal
    from .base import Batch, Objective
    from .plain import Plain

__all__ = ["OBJECTIVES", "Batch", "Objective", "Plain", "Proximal", "objective"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Batch": ".base",
        "Objective": ".base",
        "Plain": ".plain",
        "Proximal": "...strategies.fedprox",
    },
)

OBJECTIVES = Registry(
    "objective",
    {
        "plain": "fedweight.clients.objectives.plain:Plain",
        "proximal": "fedweight.strategies.fedprox:Proximal",
    },
)


def objective(name: str, **options: Any) -> Objective:
    """Make an objective by name, or the user's own by ``"module:Class"``.

    Examples
    --------
    >>> objective("proximal", mu=0.1).mu
    0.1
    """
    from .base import Objective

    made = OBJECTIVES.resolve(name)(**options)
    if not isinstance(made, Objective):
        raise ConfigurationError(
            f"objective '{name}' is not derived from fedweight.clients.Objective."
        )
    return made
