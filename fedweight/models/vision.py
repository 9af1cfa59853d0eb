"""Models of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from ..core.errors import ConfigurationError
from ..core.options import validated
from ..core.texts import shown
from .checks import check_widths, image_shape
from .heads import Head, Projection, Scale, make_head


class CNN(nn.Module):
    """Small LeNet-like convolutional network; options channels, hidden, head.

    Parameters
    ----------
    input_shape : tuple of int
        ``(c, h, w)`` with h and w of 4 or more: digits, MNIST, CIFAR.
    num_classes : int
        C.
    channels : sequence of two int
        How many filters (5 by 5) each convolution has; 2 by 2 pooling follows each.
    hidden : int
        The width of the hidden layer.
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

    References
    ----------
    Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-Based Learning Applied to
    Document Recognition", Proceedings of the IEEE, 1998.
    """

    channels_last = True  # See fedweight.core.module.FlatModule.

    @validated
    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        channels: Sequence[int] = (8, 16),
        hidden: Annotated[int, Ge(1)] = 64,
        head: Head = "linear",
        scale: Scale | None = None,
        projection: Projection | None = None,
    ) -> None:
        super().__init__()
        inputs, height, width = image_shape("cnn", input_shape, least=4)
        check_widths("channels", channels)
        if len(channels) != 2:
            raise ConfigurationError(
                f"channels must be two numbers, got {shown(list(channels))}."
            )
        first, second = channels
        self.features = nn.Sequential(
            nn.Conv2d(inputs, first, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Linear(second * (height // 4) * (width // 4), hidden),
            nn.ReLU(),
            make_head(head, hidden, num_classes, scale, projection),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[n, C]``."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


class ResNet18GN(nn.Module):
    """ResNet-18 for small images, with group instead of batch normalisation.

    The first convolution is 3 by 3 without pooling, as is usual on CIFAR. Group
    normalisation keeps no running statistics, so nothing but parameters is averaged.

    Parameters
    ----------
    input_shape : tuple of int
        ``(c, h, w)``, any number of channels, h and w of 8 or more.
    num_classes : int
        C.
    groups : int
        Into how many groups channels are normalised; must divide ``width``.
    width : int
        Channels of the first stage, 64 in the paper; later stages have 2, 4, 8 times
        as many.
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

    References
    ----------
    K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition",
    CVPR, 2016.

    Y. Wu, K. He, "Group Normalization", ECCV, 2018.

    K. Hsieh, A. Phanishayee, O. Mutlu, P. Gibbons, "The Non-IID Data Quagmire of
    Decentralized Machine Learning", ICML, 2020 (why not batch normalisation).
    """

    @validated
    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        groups: Annotated[int, Ge(1)] = 2,
        width: Annotated[int, Ge(1)] = 64,
        head: Head = "linear",
        scale: Scale | None = None,
        projection: Projection | None = None,
    ) -> None:
        super().__init__()
        inputs, _, _ = image_shape("resnet18-gn", input_shape, least=8)
        if width % groups:
            raise ConfigurationError(
                f"groups must divide width, got groups = {groups} and width = {width}."
            )
        self.stem = nn.Sequential(
            nn.Conv2d(inputs, width, 3, padding=1, bias=False),
            nn.GroupNorm(groups, width),
            nn.ReLU(),
        )
        blocks = []
        size = width
        for stage in range(4):
            for stride in (1 if stage == 0 else 2, 1):
                outputs = width * 2**stage
                blocks.append(_ResidualBlock(size, outputs, stride, groups))
                size = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classifier = make_head(head, size, num_classes, scale, projection)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[n, C]``."""
        features = self.blocks(self.stem(x)).mean(dim=(2, 3))
        logits: Tensor = self.classifier(features)
        return logits


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.GroupNorm(groups, outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.GroupNorm(groups, outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.GroupNorm(groups, outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.residual(x) + self.shortcut(x))
