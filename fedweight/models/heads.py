"""The last layer of a classifier."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor, nn

from ..core.errors import ConfigurationError, check_range

Head = Literal["linear", "cosine", "etf"]

Scale = Annotated[float, Gt(0)]

Projection = Annotated[int, Ge(1)]


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


class ETFHead(nn.Module):
    """A classifier that is never trained: the vertices of a simplex, fixed from a seed.

    Features are projected and scaled to length 1; a logit is the cosine with a class's
    vertex, times a scale that is learned, and averaged like any weight. All pairs of
    classes are equally far apart, whatever the clients have of them.

    Parameters
    ----------
    features, num_classes : int
        How many features there are, and C, the classes: 2 or more.
    scale : float
        Above 0: what the learned scale is at first.
    projection : int, optional
        d', to how many values features are projected: C or more, and C by default.

    Attributes
    ----------
    etf : nn.Parameter
        ``[d', C]``, frozen: :func:`simplex_etf`. It is no part of what travels.
    scale : nn.Parameter
        0-d.

    References
    ----------
    Zexi Li et al., "No Fear of Classifier Biases: Neural Collapse Inspired Federated
    Learning with Synthetic and Fixed Classifier", ICCV, 2023.
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        scale: float,
        projection: int | None = None,
    ) -> None:
        super().__init__()
        width = num_classes if projection is None else projection
        self.projection = nn.Linear(features, width)
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.etf = nn.Parameter(simplex_etf(num_classes, width), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return logits ``[n, C]`` of features ``[n, d]``."""
        projected = F.normalize(self.projection(input), dim=1)
        return self.scale * (projected @ self.etf)


def simplex_etf(num_classes: int, width: int) -> Tensor:
    """Return the vertices of a simplex around 0, as columns: ``[d', C]``.

    Each has length 1, and any two have the cosine ``-1 / (C - 1)``, the least that C
    directions can all have (an equiangular tight frame): ``sqrt(C / (C - 1)) P (I - 1
    1^T / C)``, with the orthonormal columns of P drawn from PyTorch's global stream.

    Parameters
    ----------
    num_classes : int
        C, 2 or more.
    width : int
        d', C or more.

    Examples
    --------
    >>> with torch.random.fork_rng():
    ...     vertices = simplex_etf(3, 4)
    >>> (vertices.T @ vertices + 0.0).round(decimals=4).tolist()
    [[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]]
    """
    check_range("num_classes of head 'etf'", num_classes, 2)
    if width < num_classes:
        raise ConfigurationError(
            f"projection must be the number of classes, {num_classes}, or more, got "
            f"{width}: with fewer, no so many directions are equally far apart."
        )
    drawn = torch.rand(width, num_classes, dtype=torch.float64).numpy()
    columns, upper = np.linalg.qr(drawn)
    # Which of the two directions a column has is each library's own choice.
    columns = columns * np.sign(np.diag(upper))
    centred = columns - columns.mean(1, keepdims=True)
    vertices = math.sqrt(num_classes / (num_classes - 1)) * centred
    return torch.from_numpy(vertices).to(torch.get_default_dtype())


def make_head(
    head: Head,
    features: int,
    num_classes: int,
    scale: float | None = None,
    projection: int | None = None,
) -> nn.Module:
    """Return a model's last layer, from features ``[n, d]`` to logits ``[n, C]``."""
    if projection is not None and head != "etf":
        raise ConfigurationError(
            f"projection is {projection}, but a head that is '{head}' has none. Leave "
            "it out, or choose head 'etf'."
        )
    if head == "cosine":
        return CosineHead(features, num_classes, 30.0 if scale is None else scale)
    if head == "etf":
        first = 1.0 if scale is None else scale
        return ETFHead(features, num_classes, first, projection)
    return nn.Linear(features, num_classes)
