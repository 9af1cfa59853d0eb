"""Fine-tuning: the global model, trained on by each client for itself.

Tao Yu et al., "Salvaging Federated Learning by Local Adaptation", arXiv 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ...core.options import checked_fields
from .base import Personal, When


@checked_fields
@dataclass(frozen=True)
class FineTuned(Personal):
    """Personal models that are the global one, trained on by the local objective.

    Parameters
    ----------
    epochs : int
        Further passes over the client's data, 1 or more.
    when : {"rounds", "end"}
        After each round that a client takes part in, from what the round's local
        training has made of the global model; or once by all clients, from the last
        global model, as in the paper.
    """

    start = "trained"

    epochs: Annotated[int, Field(ge=1)] = 1
    when: When = "rounds"
