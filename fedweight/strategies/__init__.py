"""Server strategies: how much each client counts. One file a method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from ..registry import Registry
from .base import WeightingStrategy
from .round import ClientRecord, Round, RoundRecord

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

__all__ = [
    "STRATEGIES",
    "ClientRecord",
    "Round",
    "RoundRecord",
    "WeightingStrategy",
    "strategy_class",
]

STRATEGIES = Registry(
    "strategy",
    {
        "fedavg": "fedweight.strategies.fedavg:FedAvg",
        "fedprox": "fedweight.strategies.fedprox:FedProx",
        "feddisco": "fedweight.strategies.feddisco:FedDisco",
        "fedlaw": "fedweight.strategies.fedlaw:FedLAW",
        "fedce": "fedweight.strategies.fedce:FedCE",
        "ida": "fedweight.strategies.ida:IDA",
    },
)


def strategy_class(name: str) -> type[Strategy]:
    """Return a strategy's class by name, or the user's own by ``"module:Class"``.

    Raises
    ------
    ConfigurationError
        If there is none, or if it is no Flower strategy.

    Examples
    --------
    >>> strategy_class("fedavg").__name__
    'FedAvg'
    """
    from flwr.serverapp.strategy import Strategy

    found = STRATEGIES.resolve(name)
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise ConfigurationError(
            f"strategy '{name}' is {found!r}, which is not a class derived from "
            "flwr.serverapp.strategy.Strategy."
        )
    return found
