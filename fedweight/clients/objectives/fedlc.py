"""FedLC: logits calibrated by how many examples of a class the client has.

Jie Zhang et al., "Federated Learning with Label Distribution Skew via Logits
Calibration", ICML 2022, equation 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...core.options import checked_fields
from .base import Batch, Facts, Objective


@checked_fields
@dataclass(frozen=True, eq=False)
class FedLC(Objective):
    """Cross-entropy of ``z_c - tau * n_c ** (-1 / 4)``; the model predicts with ``z``.

    Parameters
    ----------
    tau : float
        0 or more. The larger, the wider the margin of classes that are rare at the
        client.

    Notes
    -----
    A class without examples at the client takes no part in its softmax: the term would
    be infinite.
    """

    wants = frozenset({"class-counts"})

    tau: Annotated[float, Field(ge=0)] = 1.0

    def example_losses(self, outputs: Tensor, batch: Batch, facts: Facts) -> Tensor:
        """Return ``-log softmax(z - tau * n ** (-1 / 4))[y]``."""
        n = facts.class_counts
        calibrated = outputs - self.tau * n.clamp(min=1) ** -0.25
        known = torch.where(n > 0, calibrated, -torch.inf)
        return F.cross_entropy(known, batch.y, reduction="none")
