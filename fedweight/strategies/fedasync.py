"""FedAsync: every model that arrives is mixed into the global one.

Cong Xie, Sanmi Koyejo, Indranil Gupta, "Asynchronous Federated Optimization", 2019.
Who arrives when is the schedule's (:class:`~fedweight.server.schedules.Buffered`, with
a buffer of one), and so is the discount ``s(tau)`` of a client that began ``tau``
rounds ago.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .base import WeightingStrategy
from .round import Round


class FedAsync(WeightingStrategy):
    """Mix each model that arrives into the global model.

    The next global model is ``(1 - a) w + a w_k`` with ``a = mixing * s(tau_k)``. Where
    several arrive at once, as with a larger buffer or the synchronous schedule, they
    are mixed in one after another, in the order of the clients' numbers.

    Parameters
    ----------
    mixing : float
        In (0, 1]: how much a fresh model counts. At 1 a fresh model replaces the global
        one. The authors' 0.6 by default.

    Notes
    -----
    Unlike FedBuff it mixes *models*: a stale client also takes back a part of what the
    global model has learned since it began.
    """

    discounts = True

    mixing: Annotated[float, Field(gt=0, le=1)] = 0.6

    def aggregate(self, round: Round) -> Tensor:
        """Mix the clients' models in; a model's share is what the later ones leave."""
        shares = self.mixing * round.discounts
        left = torch.flip(torch.cumprod(torch.flip(1 - shares, [0]), 0), [0])
        after = torch.cat([left[1:], torch.ones(1, dtype=torch.float64)])
        weights = shares * after
        round.log("weight", weights)
        return round.differences.combine(weights).add_(round.model.parameters)
