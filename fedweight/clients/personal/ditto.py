"""Ditto: a personal model that is held near the global one.

Tian Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization",
ICML 2021, Algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ...core.options import checked_fields
from ..objectives import OBJECTIVES
from ..objectives.base import Objective
from .base import Personal


@checked_fields
@dataclass(frozen=True)
class Ditto(Personal):
    """Personal models that minimise ``F_k(v) + (weight / 2) ||v - w||^2``.

    ``F_k`` is what local training minimises, without what hears the strategy: that is
    part of how the global model is made, ``G`` in the paper. ``w`` is the global model
    that the client received. A step is ``v - rate * (grad F_k(v) + weight * (v - w))``.

    Parameters
    ----------
    weight : float
        Lambda, 0 or more. At 0 clients train alone; the larger, the nearer the
        personal models are to the global one. The authors choose among 0.05 to 2.
    epochs : int
        Passes over the client's data for the personal model in each round.
    """

    weight: Annotated[float, Field(ge=0)] = 1.0
    epochs: Annotated[int, Field(ge=1)] = 1

    def objective(self, local: Objective) -> Objective:
        """Return the local objective with the proximal term."""
        return OBJECTIVES.resolve("proximal")(self.weight, local)  # type: ignore[no-any-return]
