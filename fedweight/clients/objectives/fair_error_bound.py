"""Fair error-bound scaling: groups with a large error have their predictions shrunk.

Yu Tian et al., "FairSeg: A Large-Scale Medical Image Segmentation Dataset for Fairness
Learning Using Segment Anything Model with Fair Error-Bound Scaling", ICLR 2024; here
for classification, which is the segmentation of images of one pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...core.options import checked_fields
from ..batchable import one_hot
from .base import Batch, Facts, Objective

# Added to both sides of a Dice coefficient, which is 1 where there is nothing at all.
SMOOTH = 1e-5

# A group's loss is taken for no smaller.
LEAST = 1e-6


def dice_losses(likely: Tensor, target: Tensor) -> Tensor:
    """Return one minus the soft Dice coefficient of each class, ``[..., C]``.

    Parameters
    ----------
    likely, target : Tensor
        ``[..., n, C]``: probabilities, and 1 where an example is of a class.
    """
    both = (likely * target).sum(-2)
    sizes = likely.square().sum(-2) + target.square().sum(-2)
    return 1 - (2 * both + SMOOTH) / (sizes + SMOOTH)


def bound_scales(losses: Tensor, present: Tensor, gamma: float) -> Tensor:
    """Return by what each group's predictions are multiplied, ``[G]``, in (0, 0.77).

    ``tanh((min_b D_b / D_a) ** gamma)``, with the smallest loss of the groups that are
    there; of the others the values do not count.

    Parameters
    ----------
    losses, present : Tensor
        ``[G]``: the groups' losses ``D``, and which are in the batch.
    gamma : float
        0 or more.

    Examples
    --------
    >>> losses = torch.tensor([0.2, 0.4, 0.8])
    >>> bound_scales(losses, torch.tensor([True, True, True]), 1.0)
    tensor([0.7616, 0.4621, 0.2449])
    """
    losses = losses.clamp(min=LEAST)
    least = torch.where(present, losses, torch.inf).amin()
    share = torch.where(present, least / losses, 1)
    return (share**gamma).tanh()


@checked_fields
@dataclass(frozen=True, eq=False)
class FairErrorBound(Objective):
    """Cross-entropy, and a Dice loss in which groups with a large error are scaled.

    ``(1 - share) * CE + share * mean_c Dice_c(scale_g * p, y)``, with the predictions
    of each example multiplied by its group's scale: the larger the group's loss in the
    batch, the smaller its scale, and the more is lost on it. That is no weight of an
    example: the Dice loss of all groups grows. The scales are no part of the gradient.

    Parameters
    ----------
    group : str
        The attribute of the examples that says which group each is in, such as
        ``"sex"`` of Adult. It does not leave the client.
    share : float
        In [0, 1]: how much the Dice loss counts; 0 is the cross-entropy.
    gamma : float
        0 or more; at 0 the groups are scaled alike.

    Notes
    -----
    The authors' code takes the smallest loss over all groups, which is 0 as soon as a
    group is absent from a batch, so that no group counts. Small clients often lack
    one; here the smallest is that of the groups which are there.
    """

    wants = frozenset({"groups"})

    group: str = ""
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    gamma: Annotated[float, Field(ge=0)] = 1.0

    def batch_loss(self, outputs: Tensor, batch: Batch, facts: Facts) -> Tensor:
        """Return the loss of a batch."""
        assert batch.groups is not None
        likely = outputs.softmax(1)
        target = one_hot(batch.y, outputs.shape[1], outputs.dtype)
        if batch.mask is not None:  # Padding is no example of any class.
            real = batch.mask[:, None] > 0
            likely, target = (torch.where(real, t, 0) for t in (likely, target))
        member = one_hot(batch.groups, facts.group_counts.shape[0], outputs.dtype)
        if batch.mask is not None:
            member = member * batch.mask[:, None]
        by_group = member.t()[:, :, None]
        constant = likely.detach()
        losses = dice_losses(constant * by_group, target * by_group).sum(1)
        scales = bound_scales(losses, member.sum(0) > 0, self.gamma)
        scaled = likely * (member @ scales)[:, None]
        cross = batch.mean(F.cross_entropy(outputs, batch.y, reduction="none"))
        dice = dice_losses(scaled, target).mean()
        return (1 - self.share) * cross + self.share * dice
