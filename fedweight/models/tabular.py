"""Models of rows of numbers, which take any other example for one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from .checks import check_widths


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
    """Multilayer perceptron with ReLU on the flattened input; option hidden.

    Parameters
    ----------
    input_shape : tuple of int
        Any shape.
    num_classes : int
        C.
    hidden : int or sequence of int
        The width of each hidden layer; an empty sequence is softmax regression.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        hidden: int | Sequence[int] = (128,),
    ) -> None:
        super().__init__()
        widths = [hidden] if isinstance(hidden, int) else list(hidden)
        check_widths("hidden", widths)
        layers: list[nn.Module] = []
        size = math.prod(input_shape)
        for width in widths:
            layers += [nn.Linear(size, width), nn.ReLU()]
            size = width
        self.layers = nn.Sequential(*layers, nn.Linear(size, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[n, C]``."""
        logits: Tensor = self.layers(x.flatten(1))
        return logits
