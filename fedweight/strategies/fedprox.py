"""FedProx: FedAvg for clients that differ in data and in how much work they can do.

Tian Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020,
Algorithm 2. On the clients a proximal term holds the local model near the global
one (equation 2); on the server whoever answered counts, stragglers included.
"""

from __future__ import annotations

from typing import Unpack

from ..core.errors import check_range
from ..messages import keys
from .base import StrategyArguments
from .fedavg import FedAvg


class FedProx(FedAvg):
    """Weigh clients by data size, partial work included; tell them the proximal term.

    The server averages as FedAvg does. Each client is told ``mu`` and minimises
    ``F_k(w) + (mu / 2) * ||w - w_global||^2``, for which it needs a local objective
    that reads it.

    Parameters
    ----------
    proximal_mu : float
        0 or more; 0 is FedAvg with its stragglers kept. The larger, the nearer the
        clients stay to the global model, until ``learning_rate * mu`` of a client's
        SGD is about a tenth of ``2 * (1 + momentum)``. From there on steps overshoot,
        and from that bound on the term alone makes local training diverge; with the
        loss it may a little before. The authors tune over 0.001, 0.01, 0.1, 0.5 and
        1; 0.01 is this library's default, as in FedDisco's experiments.
    drop_stragglers : bool
        True leaves out partial work, which is what the paper argues against.
    **arguments
        Those of :class:`~fedweight.strategies.base.WeightingStrategy`.

    Notes
    -----
    The paper's algorithm samples clients in proportion to their data and averages
    them uniformly; its authors' code samples uniformly and averages by data size.
    This follows the code.
    """

    def __init__(
        self,
        proximal_mu: float = 0.01,
        drop_stragglers: bool = False,
        **arguments: Unpack[StrategyArguments],
    ) -> None:
        check_range("proximal_mu", proximal_mu, 0, high_open=True)
        super().__init__(drop_stragglers, **arguments)
        self.proximal_mu = float(proximal_mu)

    def train_config(self, round: int) -> dict[str, float | int]:
        """Tell every client ``mu``."""
        return {keys.PROXIMAL_MU: self.proximal_mu}
