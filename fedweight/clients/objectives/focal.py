"""Focal loss: examples that the model is sure of count little.

Tsung-Yi Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 4,
without its weights of classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...core.options import checked_fields
from .base import Batch, Facts, Objective


@checked_fields
@dataclass(frozen=True, eq=False)
class Focal(Objective):
    """Cross-entropy, times ``(1 - p) ** gamma`` of each example's own class.

    Parameters
    ----------
    gamma : float
        0 or more; 0 is the cross-entropy. The mean loss is far smaller than the
        cross-entropy's, so the learning rate may have to be larger.
    """

    gamma: Annotated[float, Field(ge=0)] = 2.0

    def example_losses(self, outputs: Tensor, batch: Batch, facts: Facts) -> Tensor:
        """Return ``-(1 - p_y) ** gamma * log p_y``."""
        losses = F.cross_entropy(outputs, batch.y, reduction="none")
        return (1 - (-losses).exp()) ** self.gamma * losses
