"""Local objectives: what a client minimises on a batch. One file a method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...core.errors import ConfigurationError
from ...core.lazy import lazy_exports
from ...core.registry import Registry

if TYPE_CHECKING:
    from ...strategies.fedprox import Proximal
    from .balanced_softmax import BalancedSoftmax
    from .base import Around, Batch, Facts, Loss, Model, Objective
    from .fedlc import FedLC
    from .focal import Focal
    from .group_dro import GroupDRO
    from .ldr import ALDR, LDR
    from .plain import Plain
    from .sam import SAM

__all__ = [
    "ALDR",
    "LDR",
    "OBJECTIVES",
    "SAM",
    "Around",
    "BalancedSoftmax",
    "Batch",
    "Facts",
    "FedLC",
    "Focal",
    "GroupDRO",
    "Loss",
    "Model",
    "Objective",
    "Plain",
    "Proximal",
    "objective",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Around": ".base",
        "Batch": ".base",
        "Facts": ".base",
        "Loss": ".base",
        "Model": ".base",
        "Objective": ".base",
        "Plain": ".plain",
        "BalancedSoftmax": ".balanced_softmax",
        "FedLC": ".fedlc",
        "Focal": ".focal",
        "GroupDRO": ".group_dro",
        "ALDR": ".ldr",
        "LDR": ".ldr",
        "SAM": ".sam",
        "Proximal": "...strategies.fedprox",
    },
)

OBJECTIVES = Registry(
    "objective",
    {
        "plain": "fedweight.clients.objectives.plain:Plain",
        "proximal": "fedweight.strategies.fedprox:Proximal",
        "balanced-softmax": (
            "fedweight.clients.objectives.balanced_softmax:BalancedSoftmax"
        ),
        "fedlc": "fedweight.clients.objectives.fedlc:FedLC",
        "focal": "fedweight.clients.objectives.focal:Focal",
        "ldr": "fedweight.clients.objectives.ldr:LDR",
        "aldr": "fedweight.clients.objectives.ldr:ALDR",
        "group-dro": "fedweight.clients.objectives.group_dro:GroupDRO",
        "sam": "fedweight.clients.objectives.sam:SAM",
    },
)


def objective(name: str, **options: Any) -> Objective:
    """Make an objective by name, or the user's own by ``"module:Class"``.

    Examples
    --------
    >>> objective("proximal", mu=0.1).mu
    0.1
    """
    from .base import Objective, defines

    made = OBJECTIVES.resolve(name)(**options)
    if not isinstance(made, Objective):
        raise ConfigurationError(
            f"objective '{name}' is not derived from fedweight.clients.Objective."
        )
    if not any(defines(made, how) for how in ("example_losses", "batch_loss", "loss")):
        raise ConfigurationError(
            f"objective '{name}' must define example_losses(outputs, batch, facts), "
            "batch_loss or loss."
        )
    return made
