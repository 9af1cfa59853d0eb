"""The last layer of a classifier."""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor, nn

Head = Literal["linear", "cosine"]

Scale = Annotated[float, Gt(0)]


class CosineHead(nn.Linear):
    """Logits that are cosines of the features and each class's weights, times a scale.

    Parameters
    ----------
    features, num_classes : int
        How many features there are, and classes.
    scale : float
        Above 0: logits lie between its negative and itself.

    References
    ----------
    Hao Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition",
    CVPR, 2018.
    """

    def __init__(self, features: int, num_classes: int, scale: float) -> None:
        super().__init__(features, num_classes, bias=False)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """Return logits ``[n, C]`` of features ``[n, d]``."""
        features, weights = (F.normalize(t, dim=1) for t in (input, self.weight))
        return self.scale * F.linear(features, weights)


def make_head(head: Head, features: int, num_classes: int, scale: float) -> nn.Module:
    """Return a model's last layer, from features ``[n, d]`` to logits ``[n, C]``."""
    if head == "cosine":
        return CosineHead(features, num_classes, scale)
    return nn.Linear(features, num_classes)
