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
    from .class_balanced import ClassBalanced
    from .dice import Dice
    from .dynamic import Dynamic
    from .fair_error_bound import FairErrorBound
    from .fedlc import FedLC
    from .focal import Focal
    from .group_dro import GroupDRO
    from .ldam import LDAM
    from .ldr import ALDR, LDR
    from .noisy_labels import DWS, RENT
    from .part import Part
    from .plain import Plain
    from .sam import SAM

__all__ = [
    "ALDR",
    "DWS",
    "LDAM",
    "LDR",
    "OBJECTIVES",
    "RENT",
    "SAM",
    "Around",
    "BalancedSoftmax",
    "Batch",
    "ClassBalanced",
    "Dice",
    "Dynamic",
    "Facts",
    "FairErrorBound",
    "FedLC",
    "Focal",
    "GroupDRO",
    "Loss",
    "Model",
    "Objective",
    "Part",
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
        "ClassBalanced": ".class_balanced",
        "Dice": ".dice",
        "Dynamic": ".dynamic",
        "FairErrorBound": ".fair_error_bound",
        "FedLC": ".fedlc",
        "Focal": ".focal",
        "GroupDRO": ".group_dro",
        "LDAM": ".ldam",
        "DWS": ".noisy_labels",
        "RENT": ".noisy_labels",
        "Part": ".part",
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
        "class-balanced": "fedweight.clients.objectives.class_balanced:ClassBalanced",
        "ldam": "fedweight.clients.objectives.ldam:LDAM",
        "fedlc": "fedweight.clients.objectives.fedlc:FedLC",
        "focal": "fedweight.clients.objectives.focal:Focal",
        "ldr": "fedweight.clients.objectives.ldr:LDR",
        "aldr": "fedweight.clients.objectives.ldr:ALDR",
        "dice": "fedweight.clients.objectives.dice:Dice",
        "dynamic": "fedweight.clients.objectives.dynamic:Dynamic",
        "rent": "fedweight.clients.objectives.noisy_labels:RENT",
        "dws": "fedweight.clients.objectives.noisy_labels:DWS",
        "fair-error-bound": (
            "fedweight.clients.objectives.fair_error_bound:FairErrorBound"
        ),
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
    from .checks import check_declared

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
    check_declared(made)
    return made
