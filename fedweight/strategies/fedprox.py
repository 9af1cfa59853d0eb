"""FedProx: FedAvg for clients that differ in data and in how much work they can do.

Tian Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020,
Algorithm 2. On the clients a proximal term holds the local model near the global
one (equation 2); on the server whoever answered counts, stragglers included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field
from torch import Tensor

from ..clients.objectives.base import Around, Facts, NamedObjective
from ..clients.objectives.plain import Plain
from ..core.options import checked_fields
from ..messages import keys
from .base import Told
from .fedavg import FedAvg
from .round import Selection


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

    Notes
    -----
    The paper's algorithm samples clients in proportion to their data and averages
    them uniformly; its authors' code samples uniformly and averages by data size.
    This follows the code.
    """

    proximal_mu: Annotated[float, Field(ge=0)] = 0.01

    def tell(self, selection: Selection) -> Mapping[str, Told]:
        """Tell every client ``mu``."""
        return {keys.PROXIMAL_MU: self.proximal_mu}


@checked_fields
@dataclass(frozen=True, eq=False)
class Proximal(Around):
    """Another objective plus ``(mu / 2) ||w - w_t||^2`` around the received model.

    Parameters
    ----------
    mu : float
        0 or more; 0 is the other objective alone. The term joins the gradient
        before momentum does, as a term of the loss would. From
        :attr:`~fedweight.clients.TrainingSettings.diverging_mu` on SGD diverges.
    inner : Objective
        The other objective, also by its name, or as a table of ``name`` and options:
        ``inner = {name = "focal", gamma = 1.0}``.
    """

    mu: Annotated[float, Field(ge=0)] = 0.01
    inner: NamedObjective = field(default_factory=Plain)

    def penalty_gradient(self, parameters: Tensor, facts: Facts) -> Tensor | None:
        """Return ``mu * (w - w_t)``, and what the inner objective adds."""
        own = self.mu * (parameters - facts.received) if self.mu else None
        inner = self.inner.penalty_gradient(parameters, facts)
        if own is None or inner is None:
            return inner if own is None else own
        return own + inner
