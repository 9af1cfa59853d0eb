"""Models that give a class for each pixel of an image."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from ..core.errors import ConfigurationError
from ..core.options import validated
from .checks import image_shape


class UNet(nn.Module):
    """Small U-Net for a class of each pixel; options width, depth, groups.

    Each of ``depth`` times the image is halved and its channels doubled; then it is
    doubled again, beside what it was before. It is normalised by groups of channels,
    which keeps no running statistics, so nothing but parameters is averaged.

    Parameters
    ----------
    input_shape : tuple of int
        ``(c, h, w)``; h and w are multiples of ``2 ** depth``.
    num_classes : int
        C, the background included.
    width : int
        Channels at full size, a multiple of ``groups``; 64 in the paper.
    depth : int
        From 1 to 8: how often the image is halved; 4 in the paper.
    groups : int
        Into how many groups channels are normalised.

    References
    ----------
    O. Ronneberger, P. Fischer, T. Brox, "U-Net: Convolutional Networks for Biomedical
    Image Segmentation", MICCAI, 2015 (without padding, and without normalisation).

    Y. Wu, K. He, "Group Normalization", ECCV, 2018.
    """

    channels_last = True  # See fedweight.core.module.FlatModule.

    @validated
    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        width: Annotated[int, Ge(1)] = 8,
        depth: Annotated[int, Ge(1), Le(8)] = 2,
        groups: Annotated[int, Ge(1)] = 2,
    ) -> None:
        super().__init__()
        channels, *sides = image_shape("unet", input_shape, least=2)
        if width % groups:
            raise ConfigurationError(
                f"groups must divide width, got groups = {groups} and width = {width}."
            )
        for side in sides:
            if side % 2**depth:
                raise ConfigurationError(
                    f"model 'unet' halves images {depth} times (depth), and {side} "
                    f"pixels cannot be halved so often. Pad images to multiples of "
                    f"{2**depth}, or lower depth."
                )
        widths = [width * 2**k for k in range(depth + 1)]
        before = [channels, *widths]
        self.down = nn.ModuleList(
            _block(before[k], widths[k], groups) for k in range(depth + 1)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(widths[k + 1], widths[k], 2, stride=2)
            for k in range(depth)
        )
        self.join = nn.ModuleList(
            _block(2 * widths[k], widths[k], groups) for k in range(depth)
        )
        self.halve = nn.MaxPool2d(2)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[n, C, h, w]``."""
        first, *deeper = self.down
        x = first(x)
        beside = []
        for block in deeper:
            beside.append(x)
            x = block(self.halve(x))
        for up, join, other in zip(
            reversed(self.up), reversed(self.join), reversed(beside), strict=True
        ):
            x = join(torch.cat([other, up(x)], 1))
        logits: Tensor = self.classifier(x)
        return logits


def _block(inputs: int, outputs: int, groups: int) -> nn.Sequential:
    """Return two convolutions, each normalised and rectified."""
    layers: list[nn.Module] = []
    for size in (inputs, outputs):
        layers += [
            nn.Conv2d(size, outputs, 3, padding=1, bias=False),
            nn.GroupNorm(groups, outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)
