"""Fair error-bound scaling: groups with a large error have their predictions shrunk.

Yu Tian et al., "FairSeg: A Large-Scale Medical Image Segmentation Dataset for Fairness
Learning Using Segment Anything Model with Fair Error-Bound Scaling", ICLR 2024; here
also for classification, which is the segmentation of images of one pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ...core.options import checked_fields
from ...data.tasks import TASKS, Classification, Segmentation
from ..batchable import one_hot
from .base import Batch, Facts, Objective
from .dice import dice_losses, dice_of_sums, likely_and_true

# A group's loss is taken for no smaller.
LEAST = 1e-6


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
    tasks = (Classification.name, Segmentation.name)

    group: str = ""
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    gamma: Annotated[float, Field(ge=0)] = 1.0

    def batch_loss(self, outputs: Tensor, batch: Batch, facts: Facts) -> Tensor:
        """Return the loss of a batch."""
        assert batch.groups is not None
        likely, target = likely_and_true(outputs, batch)
        member = one_hot(batch.groups, facts.group_counts.shape[0], outputs.dtype)
        if batch.mask is not None:
            member = member * batch.mask[:, None]
        by_group = member.t()[:, :, None]

        def of_groups(values: Tensor) -> Tensor:
            """Add up, class by class, what each group's examples have: ``[G, C]``."""
            of_each = values.sum(1) if values.ndim > 2 else values
            return (of_each * by_group).sum(1)

        constant = likely.detach()
        squares = of_groups(constant.square()) + of_groups(target.square())
        losses = dice_of_sums(of_groups(constant * target), squares).sum(1)
        scales = bound_scales(losses, member.sum(0) > 0, self.gamma)
        scale = (member @ scales).view(-1, *[1] * (likely.ndim - 1))
        scaled, target = (t.flatten(0, -2) for t in (likely * scale, target))
        task = Segmentation if outputs.ndim > 2 else Classification
        cross = batch.mean(TASKS[task.name].example_losses(outputs, batch.y))
        return (1 - self.share) * cross + self.share * dice_losses(
            scaled, target
        ).mean()
