"""Dice loss: how little what a model marks and what is there overlap.

Fausto Milletari, Nassir Navab, Seyed-Ahmad Ahmadi, "V-Net: Fully Convolutional Neural
Networks for Volumetric Medical Image Segmentation", 3DV 2016, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ...core.options import checked_fields
from ...data.tasks import TASKS, Segmentation
from ..batchable import one_hot
from .base import Batch, Facts, Objective

# Added to both sides of a Dice coefficient, which is 1 where there is nothing at all.
SMOOTH = 1e-5


def dice_losses(likely: Tensor, target: Tensor) -> Tensor:
    """Return one minus the soft Dice coefficient of each class, ``[..., C]``.

    Parameters
    ----------
    likely, target : Tensor
        ``[..., n, C]``: probabilities, and 1 where a decision is of a class.
    """
    both = (likely * target).sum(-2)
    return dice_of_sums(both, likely.square().sum(-2) + target.square().sum(-2))


def dice_of_sums(both: Tensor, squares: Tensor) -> Tensor:
    """Return one minus the soft Dice coefficient, of sums of ``p y`` and ``p^2 + y^2``.

    Examples
    --------
    >>> dice_of_sums(torch.tensor([2.0, 0.0]), torch.tensor([4.0, 4.0]))
    tensor([0.0000, 1.0000])
    """
    return 1 - (2 * both + SMOOTH) / (squares + SMOOTH)


def likely_and_true(outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each class's probability, and 1 where it is the true one.

    Both ``[n, C]``, or for the pixels of images ``[n, h * w, C]``; 0 for padding, which
    is no example of any class.
    """
    likely, y = outputs.softmax(1), batch.y
    if outputs.ndim > 2:
        likely, y = likely.flatten(2).transpose(1, 2), y.flatten(1)
    target = one_hot(y, outputs.shape[1], outputs.dtype)
    if batch.mask is None:
        return likely, target
    real = batch.mask.view(-1, *[1] * (likely.ndim - 1)) > 0
    return torch.where(real, likely, 0), torch.where(real, target, 0)


@checked_fields
@dataclass(frozen=True, eq=False)
class Dice(Objective):
    """Dice loss of the pixels of a batch, with the cross-entropy as far as is told.

    ``(1 - share) * CE + share * mean_c (1 - D_c)`` with the soft Dice coefficient of
    each class but the background, 0::

        D_c = 2 sum p_c y_c / (sum p_c^2 + sum y_c^2)

    summed over the pixels of all images of the batch: in a single image a class may not
    occur at all.

    Parameters
    ----------
    share : float
        In [0, 1]: how much the Dice loss counts; 0 is the cross-entropy.
    """

    tasks = (Segmentation.name,)

    share: Annotated[float, Field(ge=0, le=1)] = 1.0

    def batch_loss(self, outputs: Tensor, batch: Batch, facts: Facts) -> Tensor:
        """Return the loss of a batch."""
        likely, target = (t.flatten(0, 1) for t in likely_and_true(outputs, batch))
        dice = dice_losses(likely, target)[1:].mean()
        plain = TASKS[Segmentation.name].example_losses(outputs, batch.y)
        return (1 - self.share) * batch.mean(plain) + self.share * dice
