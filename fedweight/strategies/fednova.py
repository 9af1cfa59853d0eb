"""FedNova: updates are divided by how much work they hold before they are averaged.

Jianyu Wang, Qinghua Liu, Hao Liang, Gauri Joshi and H. Vincent Poor, "Tackling the
Objective Inconsistency Problem in Heterogeneous Federated Optimization", NeurIPS 2020.
Where clients make different numbers of steps, their mean minimises another objective
than the one that is meant; the mean of what one step of each is worth does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from ..clients.probes import ClientRound
from ..core.errors import AggregationError
from ..core.texts import shown
from ..messages import keys
from .base import Told, WeightingStrategy
from .round import Report, Round, Selection


class FedNova(WeightingStrategy):
    """Weigh clients by data size over local work, and keep the length of the step.

    With ``p_k`` the share of the round's examples and ``a_k`` what client k reports as
    its normaliser, the next model is ``w + tau_eff * sum_k p_k D_k / a_k``: the weights
    of the updates ``D_k`` are ``tau_eff * p_k / a_k``. ``tau_eff = sum_k p_k a_k``, or,
    with a proximal term, ``sum_k p_k tau_k`` of the numbers of steps.

    Parameters
    ----------
    proximal_mu : float
        0 or more; the strength of a proximal term around the received model, as in
        FedProx. Clients are told it, 0 too, so that an objective's own does not count.

    Notes
    -----
    The weights sum to one where all clients do the same work; then it is FedAvg. Else
    they sum to more, without a proximal term, as short work is stretched. Clients are
    taken to train with the same learning rate. Momentum of the server is a server
    optimiser's.
    """

    request = (keys.NORMALISER,)

    proximal_mu: Annotated[float, Field(ge=0)] = 0.0

    def tell(self, selection: Selection) -> Mapping[str, Told]:
        """Tell every client ``mu``."""
        return {keys.PROXIMAL_MU: self.proximal_mu}

    def admit(self, report: Report) -> None:
        """Reject work that is none."""
        steps = (keys.NUM_STEPS,) if self.proximal_mu else ()
        for name in (keys.NORMALISER, *steps):
            value = report.metrics.get(name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise AggregationError(
                    f"its '{name}' must be above 0, got {shown(value)}"
                )

    def weights(self, round: Round) -> Tensor:
        """Return ``tau_eff * p / a``."""
        p, a = round.size_weights, round.metric(keys.NORMALISER)
        work = round.metric(keys.NUM_STEPS) if self.proximal_mu else a
        effective = (p * work).sum()
        round.log("effective-steps", effective)
        return effective * p / a


def normaliser(client: ClientRound) -> float:
    """Return how many plain gradients a client's update holds: the client's half.

    With sgd as :func:`gradients_in` says. Of Adam and the like the paper says nothing:
    there it is the number of steps.
    """
    settings, mu = client.settings, client.told.get(keys.PROXIMAL_MU, 0.0)
    rule: Any = settings.rule
    steps = client.num_steps
    if not rule.adds_up:
        return float(steps)
    pull = client.learning_rate * float(mu)
    rates: tuple[float, ...] = ()
    if settings.rate_schedule.over_steps:
        rates = tuple(settings.learning_rate_at(1.0, k, steps) for k in range(steps))
    how = rule.dampening, rule.nesterov, rates
    return gradients_in(steps, rule.momentum, pull, *how)


@lru_cache(maxsize=1024)
def gradients_in(
    steps: int,
    momentum: float = 0.0,
    pull: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    rates: tuple[float, ...] = (),
) -> float:
    """Return ``a``: the sum of what each step's gradient counts in an update of sgd.

    Plain, it is the number of steps; with momentum ``rho`` each step does
    ``c <- rho c + 1, a <- a + c``; with a proximal term, of ``pull`` the learning rate
    times ``mu``, ``a <- a (1 - pull) + 1``. With both, the term joins the gradient
    before momentum does. Dampening, Nesterov's momentum and ``rates``, each step's
    share of the learning rate, are counted as they are done.

    Examples
    --------
    >>> gradients_in(4), round(gradients_in(4, momentum=0.9), 3)
    (4.0, 9.049)
    """
    a = c = 0.0
    for step in range(steps):
        gradient = 1 - pull * a
        c = momentum * c + (1 - dampening if step else 1.0) * gradient
        moved = gradient + momentum * c if nesterov else c
        a += moved * (rates[step] if rates else 1.0)
    return a
