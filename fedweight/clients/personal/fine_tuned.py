"""Fine-tuning: the global model, trained on by each client for itself.

Tao Yu et al., "Salvaging Federated Learning by Local Adaptation", arXiv 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ...core.options import checked_fields
from ..objectives.base import Objective
from .base import Personal


@checked_fields
@dataclass(frozen=True)
class FineTuned(Personal):
    """Personal models that are a round's local models, trained for some more epochs.

    Parameters
    ----------
    epochs : int
        Further passes over the client's data, after those of the round.
    """

    start = "trained"

    epochs: Annotated[int, Field(ge=1)] = 1

    def objective(self, local: Objective) -> Objective:
        """Return the local objective."""
        return local
