"""q-FedAvg: clients count more, the higher their loss is.

Tian Li, Maziar Sanjabi, Ahmad Beirami and Virginia Smith, "Fair Resource Allocation in
Federated Learning", ICLR 2020. It minimises ``sum_k F_k(w)^(q + 1) / (q + 1)`` (q-FFL),
of which the mean loss is the case ``q = 0``.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..core.options import GIVEN
from ..messages import keys
from ..server.admission import check_not_negative
from .base import WeightingStrategy
from .round import Report, Round

# Added to every loss, as the authors' code does, so that none is 0.
GUARD = 1e-10


class QFedAvg(WeightingStrategy):
    """Weigh clients by a power of their loss, and shorten the step accordingly.

    With ``F_k`` the loss of the received model on client k's training data, ``D_k`` its
    update and ``L`` the inverse of the clients' learning rate, the paper's step is
    ``w - sum_k F_k^q g_k / sum_j h_j`` with ``g_k = -L D_k`` and
    ``h_j = q F_j^(q - 1) |g_j|^2 + L F_j^q``. Divided by ``L`` above and below, the
    weights of the updates are

    ``F_k^q / sum_j (q F_j^(q - 1) L |D_j|^2 + F_j^q)``.

    They sum to less than one, except with ``q = 0``: the sum is the step's length.

    Parameters
    ----------
    q : float
        0 or more; 0 is the plain mean of the models, whatever the sizes of the data;
        the larger, the more the worst served clients count, and the shorter the steps.
        The authors tune it for each data set; 0.1 is this library's default.
    lipschitz : float, optional
        Above 0; ``L``, the estimate of how fast the gradient changes; by default the
        inverse of ``local_learning_rate``. The smaller, the longer the steps.
    local_learning_rate : float
        Above 0; the clients' learning rate, without its decay. A run of this library
        tells it; alone it is the default of ``TrainingSettings``.

    Notes
    -----
    The paper draws clients in proportion to their data. Here all are drawn alike, so
    each client's loss counts once in what is minimised, whatever its size.
    """

    request = (keys.LOSS_BEFORE,)

    q: Annotated[float, Field(ge=0)] = 0.1
    lipschitz: Annotated[float, Field(gt=0)] | None = None
    local_learning_rate: Annotated[float, Field(gt=0), GIVEN] = 0.1

    def admit(self, report: Report) -> None:
        """Reject a loss below 0."""
        check_not_negative(report.metrics, keys.LOSS_BEFORE)

    def weights(self, round: Round) -> Tensor:
        """Return ``F^q`` over the sum of all ``h / L``.

        Over logarithms, so that no power leaves the range of numbers.
        """
        lipschitz = self.lipschitz or 1 / self.local_learning_rate
        q = torch.tensor(self.q, dtype=torch.float64)
        loss = (round.metric(keys.LOSS_BEFORE) + GUARD).log()
        length = round.updates.norms().double().log()
        curvature = q.log() + (q - 1) * loss + math.log(lipschitz) + 2 * length
        weights = (q * loss - torch.cat([q * loss, curvature]).logsumexp(0)).exp()
        round.log("step-length", float(weights.sum()))
        return weights
