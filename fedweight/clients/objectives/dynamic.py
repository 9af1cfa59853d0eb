"""Weights by an example's loss within its batch, anew in every step.

Reweighting by loss as for the pretraining of language models: Daouda Sow et al.,
"Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining",
ICLR 2025, its four shapes of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...core.options import MOST, checked_fields
from .base import Batch, Fact, Facts, Objective

Shape = Literal["linupper", "mid", "extremes", "upper"]


def dynamic_weights(
    losses: Tensor,
    shape: Shape,
    temperature: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the weights of a batch's examples, ``[n]``, of sum 1 and 0 for padding.

    A loss's place ``h`` between the batch's smallest, -1, and largest, 1, has a score,
    and the weights are ``softmax(score / temperature)``. Where all losses are equal so
    are the weights.

    Parameters
    ----------
    losses : Tensor
        ``[n]``.
    shape : {"linupper", "mid", "extremes", "upper"}
        The score of ``h``: ``min(h + 1, 1)``, ``1 - h ** 2``, ``|h|``,
        ``(h + 1) / 2``.
    temperature : float
        Above 0; towards infinity all count alike.
    mask : Tensor, optional
        ``[n]``: 1 for an example, 0 for padding.

    Examples
    --------
    >>> dynamic_weights(torch.tensor([0.1, 0.5, 2.0]), "linupper", 1.0)
    tensor([0.1908, 0.2907, 0.5186])
    """
    low = high = losses
    if mask is not None:
        low = torch.where(mask > 0, losses, torch.inf)
        high = torch.where(mask > 0, losses, -torch.inf)
    lowest, span = low.amin(), high.amax() - low.amin()
    h = 2 * (losses - lowest) / torch.where(span > 0, span, 1) - 1
    score = {
        "linupper": lambda: (h + 1).clamp(max=1),
        "mid": lambda: 1 - h**2,
        "extremes": lambda: h.abs(),
        "upper": lambda: (h + 1) / 2,
    }[shape]()
    if mask is not None:
        score = torch.where(mask > 0, score, -torch.inf)
    return (score / temperature).softmax(0)


@checked_fields
@dataclass(frozen=True, eq=False)
class Dynamic(Objective):
    """Cross-entropy in which examples count by their loss within the batch.

    The weights are no part of the gradient and have a mean of 1 in every batch, so
    that steps are as long as without them. They know no classes and no counts.

    Parameters
    ----------
    shape : {"linupper", "mid", "extremes", "upper"}
        Which losses count more: all but the small ones (the authors' best), the middle
        ones, those at both ends, or the large ones. Whatever favours large losses
        favours wrong labels, too.
    temperature : float
        Above 0. Towards infinity this is the cross-entropy; the smaller, the more the
        favoured losses count.
    start : int
        1 or more: the round from which weights are used; before, it is the
        cross-entropy, as in the first steps of the authors.

    Notes
    -----
    The authors let ``h`` reach from ``-delta`` to ``delta``; here ``delta`` is 1.
    Another one is another temperature, and for ``mid`` changes nothing.
    """

    shape: Shape = "linupper"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    start: Annotated[int, Field(ge=1, le=MOST)] = 1

    @property
    def wants(self) -> frozenset[Fact]:  # type: ignore[override]
        """The round, where it matters."""
        return frozenset({"round"} if self.start > 1 else ())

    def example_losses(self, outputs: Tensor, batch: Batch, facts: Facts) -> Tensor:
        """Return ``-log softmax(outputs)[y]``, not weighed yet."""
        return F.cross_entropy(outputs, batch.y, reduction="none")

    def batch_loss(self, outputs: Tensor, batch: Batch, facts: Facts) -> Tensor:
        """Return the weighed mean of the examples' losses."""
        losses = self.example_losses(outputs, batch, facts)
        weights = dynamic_weights(
            losses.detach(), self.shape, self.temperature, batch.mask
        )
        if self.start > 1:
            weights = torch.where(facts.round >= self.start, weights, 1)
        return batch.mean(losses, weights)
