"""Plain local training: the mean cross-entropy of the batch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .base import Batch, Objective


class Plain(Objective):
    """Mean cross-entropy, as FedAvg's clients minimise."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean of ``-log softmax(outputs)[y]``."""
        if batch.mask is None:
            return F.cross_entropy(outputs, batch.y)
        return batch.mean(F.cross_entropy(outputs, batch.y, reduction="none"))
