"""Models of rows of numbers, which take any other example for one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from .checks import check_widths
from .heads import Head, Projection, Scale, make_head


class Softmax(nn.Module):
    """Softmax (multinomial logistic) regression on the flattened input.

    Parameters
    ----------
    input_shape : tuple of int
        Any shape.
    num_classes : int
        C.
    """

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(math.prod(input_shape), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[n, C]``."""
        logits: Tensor = self.linear(x.flatten(1))
        return logits


class MLP(nn.Module):
    """Multilayer perceptron with ReLU on the flattened input; options hidden, head.

    Parameters
    ----------
    input_shape : tuple of int
        Any shape.
    num_classes : int
        C.
    hidden : int or sequence of int
        The width of each hidden layer; an empty sequence is softmax regression.
    head : {"linear", "cosine", "etf"}
        The last layer: linear; cosines of features and the classes' weights, as for the
        objective ``ldam``; or cosines with directions that are fixed, as for FedETF
        (:class:`~fedweight.models.heads.ETFHead`).
    scale : float, optional
        Above 0: what the cosines are multiplied by, 30 by default; of ``etf`` what the
        learned scale is at first, 1 by default.
    projection : int, optional
        To how many values ``etf`` projects features: as many as there are classes, or
        more.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        hidden: int | Sequence[int] = (128,),
        head: Head = "linear",
        scale: Scale | None = None,
        projection: Projection | None = None,
    ) -> None:
        super().__init__()
        widths = [hidden] if isinstance(hidden, int) else list(hidden)
        check_widths("hidden", widths)
        layers: list[nn.Module] = []
        size = math.prod(input_shape)
        for width in widths:
            layers += [nn.Linear(size, width), nn.ReLU()]
            size = width
        last = make_head(head, size, num_classes, scale, projection)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[n, C]``."""
        logits: Tensor = self.layers(x.flatten(1))
        return logits
