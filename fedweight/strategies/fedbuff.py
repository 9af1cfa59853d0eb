"""FedBuff: every update in the buffer counts alike, but for its age.

John Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation",
AISTATS 2022. Who arrives when is the schedule's
(:class:`~fedweight.server.schedules.Buffered`), and so is the discount ``s(tau)`` of an
update whose client began ``tau`` rounds ago.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import WeightingStrategy
from .round import Round


class FedBuff(WeightingStrategy):
    """Weigh the updates in a buffer alike, times the schedule's discount.

    The next global model is ``w + (1 / K) sum_k s(tau_k) Delta_k``, with ``Delta_k``
    what training added to the model that the client began with, and K the updates in
    the buffer. With a learning rate of the server's it is ``[server] name =
    "momentum"`` with ``beta = 0``.

    Notes
    -----
    The discounted weights sum to less than one where an update is stale. With the
    synchronous schedule none is, and this is the plain mean of the cohort.
    """

    def weights(self, round: Round) -> Tensor:
        """Return ``1 / K`` for each."""
        return torch.full(
            (round.num_clients,), 1 / round.num_clients, dtype=torch.float64
        )
