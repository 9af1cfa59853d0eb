"""Server strategies: how much each client counts. One file a method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.errors import ConfigurationError
from ..core.lazy import lazy_exports
from ..core.registry import Registry

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

    from ..core.records import ClientRecord, RoundRecord
    from ..server.sampling import Draw
    from .afl import AFL
    from .agnostic_fair import AgnosticFair
    from .autoflip import AutoFLIP
    from .base import WeightingStrategy
    from .fair_incentive import FairIncentive
    from .fedasync import FedAsync
    from .fedau import FedAU
    from .fedavg import FedAvg
    from .fedbuff import FedBuff
    from .fedce import FedCE
    from .fedcollab import FedCollab
    from .feddisco import FedDisco
    from .fedlaw import FedLAW
    from .fedlex import FedLEx
    from .fednova import FedNova
    from .fedprox import FedProx
    from .global_group_dro import GlobalGroupDRO
    from .ida import IDA
    from .qfedavg import QFedAvg
    from .round import PerParameter, Report, Round, Selection, Vector
    from .server_optimizers import ServerAdam, ServerMomentum, ServerOptimizer

__all__ = [
    "AFL",
    "IDA",
    "SERVER_OPTIMIZERS",
    "STRATEGIES",
    "AgnosticFair",
    "AutoFLIP",
    "ClientRecord",
    "Draw",
    "FairIncentive",
    "FedAU",
    "FedAsync",
    "FedAvg",
    "FedBuff",
    "FedCE",
    "FedCollab",
    "FedDisco",
    "FedLAW",
    "FedLEx",
    "FedNova",
    "FedProx",
    "GlobalGroupDRO",
    "PerParameter",
    "QFedAvg",
    "Report",
    "Round",
    "RoundRecord",
    "Selection",
    "ServerAdam",
    "ServerMomentum",
    "ServerOptimizer",
    "Vector",
    "WeightingStrategy",
    "strategy_class",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "FedAsync": ".fedasync",
        "AFL": ".afl",
        "AgnosticFair": ".agnostic_fair",
        "AutoFLIP": ".autoflip",
        "FairIncentive": ".fair_incentive",
        "FedAU": ".fedau",
        "FedAvg": ".fedavg",
        "FedBuff": ".fedbuff",
        "FedCE": ".fedce",
        "FedCollab": ".fedcollab",
        "FedDisco": ".feddisco",
        "FedLAW": ".fedlaw",
        "FedLEx": ".fedlex",
        "FedNova": ".fednova",
        "FedProx": ".fedprox",
        "GlobalGroupDRO": ".global_group_dro",
        "IDA": ".ida",
        "QFedAvg": ".qfedavg",
        "WeightingStrategy": ".base",
        "PerParameter": ".round",
        "Report": ".round",
        "Round": ".round",
        "Selection": ".round",
        "Vector": ".round",
        "ServerAdam": ".server_optimizers",
        "ServerMomentum": ".server_optimizers",
        "ServerOptimizer": ".server_optimizers",
        "ClientRecord": "..core.records",
        "Draw": "..server.sampling",
        "RoundRecord": "..core.records",
    },
)

STRATEGIES = Registry(
    "strategy",
    {
        "fedavg": "fedweight.strategies.fedavg:FedAvg",
        "fedbuff": "fedweight.strategies.fedbuff:FedBuff",
        "fedasync": "fedweight.strategies.fedasync:FedAsync",
        "fedcollab": "fedweight.strategies.fedcollab:FedCollab",
        "fedprox": "fedweight.strategies.fedprox:FedProx",
        "feddisco": "fedweight.strategies.feddisco:FedDisco",
        "fedlaw": "fedweight.strategies.fedlaw:FedLAW",
        "fedce": "fedweight.strategies.fedce:FedCE",
        "ida": "fedweight.strategies.ida:IDA",
        "afl": "fedweight.strategies.afl:AFL",
        "qfedavg": "fedweight.strategies.qfedavg:QFedAvg",
        "fedau": "fedweight.strategies.fedau:FedAU",
        "fair-incentive": "fedweight.strategies.fair_incentive:FairIncentive",
        "agnostic-fair": "fedweight.strategies.agnostic_fair:AgnosticFair",
        "global-group-dro": "fedweight.strategies.global_group_dro:GlobalGroupDRO",
        "fednova": "fedweight.strategies.fednova:FedNova",
        "fedlex": "fedweight.strategies.fedlex:FedLEx",
        "autoflip": "fedweight.strategies.autoflip:AutoFLIP",
    },
)

SERVER_OPTIMIZERS = Registry(
    "server optimiser",
    {
        "none": "fedweight.strategies.server_optimizers:no_optimizer",
        "momentum": "fedweight.strategies.server_optimizers:ServerMomentum",
        "adam": "fedweight.strategies.server_optimizers:ServerAdam",
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
