"""The proximal term of FedProx: stay near the global model.

Tian Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020,
equation 2: ``F_k(w) + (mu / 2) ||w - w_t||^2``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field
from torch import Tensor

from ...core.options import GIVEN, checked_fields
from .base import Batch, Objective
from .plain import Plain


@checked_fields
@dataclass(frozen=True, eq=False)
class Proximal(Objective):
    """Another objective plus ``(mu / 2) ||w - w_t||^2`` around the received model.

    Parameters
    ----------
    mu : float
        0 or more; 0 is the other objective alone. The term joins the gradient
        before momentum does, as a term of the loss would. From
        :attr:`~fedweight.clients.TrainingSettings.diverging_mu` on SGD diverges.
    inner : Objective
        The other objective; :class:`Plain` by default.
    """

    mu: Annotated[float, Field(ge=0)] = 0.01
    inner: Annotated[Objective, GIVEN] = field(default_factory=Plain)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the inner objective's loss; the term acts on the gradient."""
        return self.inner.loss(outputs, batch)

    def penalty_gradient(self, parameters: Tensor, start: Tensor) -> Tensor | None:
        """Return ``mu * (w - w_t)``, and what the inner objective adds."""
        own = self.mu * (parameters - start) if self.mu else None
        inner = self.inner.penalty_gradient(parameters, start)
        if own is None or inner is None:
            return inner if own is None else own
        return own + inner
