"""FedAvg: a client counts by how much data it has.

Brendan McMahan et al., "Communication-Efficient Learning of Deep Networks from
Decentralized Data", AISTATS 2017, Algorithm 1.
"""

from __future__ import annotations

from torch import Tensor

from .base import WeightingStrategy
from .round import Round

# What makes the rule; whoever replaces any of it may need each client's model.
_RULE = (
    "weights",
    "aggregate",
    "aggregate_buffers",
    "request",
    "ask",
    "admit",
    "screen",
    "keeps",
    "configure_train",
    "aggregate_train",
)


class FedAvg(WeightingStrategy):
    """Weigh each client by its share of the cohort's data.

    The next global model is ``sum_k p_k w_k`` with ``p_k = n_k / sum_j n_j`` over the
    clients that took part, of which each has data.

    Parameters
    ----------
    drop_stragglers : bool
        Leave out clients that did not finish their local epochs, as the FedAvg
        baseline of the FedProx paper does. False counts their partial work.
    """

    drop_stragglers: bool = False

    def weights(self, round: Round) -> Tensor:
        """Return ``p`` (:attr:`Round.size_weights`)."""
        return round.size_weights

    @property
    def weighs_by_size(self) -> bool:
        """True, unless a class that derives from this one has other ideas."""
        return not any(
            getattr(type(self), name) is not getattr(FedAvg, name) for name in _RULE
        )

    def keeps(self, round: int, client: int, straggler: bool) -> bool:
        """Leave out stragglers if asked to."""
        return not (straggler and self.drop_stragglers)
