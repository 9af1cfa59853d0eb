"""SAM: a step with the gradient at the worst point near by.

Pierre Foret et al., "Sharpness-Aware Minimization for Efficiently Improving
Generalization", ICLR 2021, equations 2 and 3; on clients, Zhe Qu et al., "Generalized
Federated Learning via Sharpness Aware Minimization", ICML 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field
from torch import Tensor

from ...core.options import checked_fields
from .base import Around, Facts, NamedObjective
from .plain import Plain


@checked_fields
@dataclass(frozen=True, eq=False)
class SAM(Around):
    """Another objective, with its gradient taken where it is steepest near by.

    ``epsilon = rho * g / ||g||`` with the gradient ``g`` at the local model ``w``; the
    step is made with the gradient at ``w + epsilon``. Two gradients a step. Running
    statistics are those of the first one.

    Parameters
    ----------
    rho : float
        0 or more; at 0 this is the other objective, at twice the cost.
    inner : Objective
        The other objective, also by its name, or as a table of ``name`` and options:
        ``inner = {name = "focal", gamma = 1.0}``.
    """

    rho: Annotated[float, Field(ge=0)] = 0.05
    inner: NamedObjective = field(default_factory=Plain)

    def gradient(
        self,
        gradient_at: Callable[[Tensor], Tensor],
        parameters: Tensor,
        facts: Facts,
    ) -> Tensor:
        """Return the gradient at ``w + epsilon``."""
        gradient = gradient_at(parameters)
        epsilon = self.rho * gradient / (gradient.norm() + 1e-12)
        return gradient_at(parameters + epsilon)
