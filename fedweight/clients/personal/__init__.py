"""Personal models: what clients train besides, and keep. One file a method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...core.errors import ConfigurationError
from ...core.lazy import lazy_exports
from ...core.registry import Registry

if TYPE_CHECKING:
    from .base import Personal, Phase
    from .ditto import Ditto
    from .fedetf import FedETF
    from .fine_tuned import FineTuned

__all__ = [
    "PERSONAL",
    "Ditto",
    "FedETF",
    "FineTuned",
    "Personal",
    "Phase",
    "personal",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Personal": ".base",
        "Phase": ".base",
        "Ditto": ".ditto",
        "FedETF": ".fedetf",
        "FineTuned": ".fine_tuned",
    },
)

PERSONAL = Registry(
    "personal model",
    {
        "none": "fedweight.clients.personal.base:nothing",
        "ditto": "fedweight.clients.personal.ditto:Ditto",
        "fedetf": "fedweight.clients.personal.fedetf:FedETF",
        "fine-tuned": "fedweight.clients.personal.fine_tuned:FineTuned",
    },
)


def personal(name: str, **options: Any) -> Personal | None:
    """Make what clients keep by name, or the user's own by ``"module:Class"``.

    Examples
    --------
    >>> personal("ditto", weight=0.5).weight
    0.5
    >>> personal("none") is None
    True
    """
    from .base import Personal

    made = PERSONAL.resolve(name)(**options)
    if made is not None and not isinstance(made, Personal):
        raise ConfigurationError(
            f"personal model '{name}' is not derived from "
            "fedweight.clients.personal.Personal."
        )
    return made
