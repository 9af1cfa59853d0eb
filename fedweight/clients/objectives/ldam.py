"""LDAM: margins that are wider for rare classes, and weights late in training.

Kaidi Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin
Loss", NeurIPS 2019: the loss of Section 3.2, and Algorithm 1 (deferred reweighting).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...core.options import MOST, checked_fields
from ..batchable import one_hot
from .base import Batch, Fact, Facts, Objective
from .class_balanced import class_balanced


def margins(counts: Tensor, largest: float) -> Tensor:
    """Return each class's margin, ``[C]``: in proportion to ``n ** (-1 / 4)``.

    The rarest class that has examples gets the largest one; a class without examples,
    0.

    Examples
    --------
    >>> margins(torch.tensor([100.0, 10.0, 1.0]), 0.5)
    tensor([0.1581, 0.2812, 0.5000])
    """
    present = counts > 0
    raw = torch.where(present, counts.clamp(min=1) ** -0.25, 0)
    return largest * raw / raw.max().clamp(min=1e-12)


@checked_fields
@dataclass(frozen=True, eq=False)
class LDAM(Objective):
    """Cross-entropy after a margin is taken from the logit of an example's own class.

    ``-log softmax(z - scale * m_y * [c = y])[y]``; the model predicts with ``z``. From
    a round on, classes count by their inverse effective number, too, with a mean of 1
    in every batch.

    Parameters
    ----------
    margin : float
        0 or more: the margin of the rarest class; with 0 and no weights this is the
        cross-entropy.
    scale : float
        Above 0: by what the margins are multiplied. It is the ``scale`` of a model
        with ``head = "cosine"``, whose logits are that times a cosine, as the method
        is meant; the authors multiply in the loss instead, which is the same. For a
        linear head take 1.
    counts : {"all", "own"}
        Whose examples of each class ``n_c`` counts: of all clients, who tell their
        counts once and are told the sum, or of its own.
    reweight_from : int
        The round from which classes have weights, 0 or more; 0 is never. The authors
        begin when 80% of training is done.
    beta : float
        In [0, 1), of the effective number; see
        :class:`~fedweight.clients.objectives.ClassBalanced`.
    """

    margin: Annotated[float, Field(ge=0)] = 0.5
    scale: Annotated[float, Field(gt=0)] = 30.0
    counts: Literal["all", "own"] = "all"
    reweight_from: Annotated[int, Field(ge=0, le=MOST)] = 0
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9999

    @property
    def wants(self) -> frozenset[Fact]:  # type: ignore[override]
        """The counts, and the round where it matters."""
        counts: Fact = "class-totals" if self.counts == "all" else "class-counts"
        return frozenset({counts, "round"} if self.reweight_from else {counts})

    def example_losses(self, outputs: Tensor, batch: Batch, facts: Facts) -> Tensor:
        """Return the losses with margins, not weighed yet."""
        own = one_hot(batch.y, outputs.shape[1], outputs.dtype)
        taken = self.scale * margins(self._counts(facts), self.margin)
        return F.cross_entropy(outputs - taken * own, batch.y, reduction="none")

    def batch_loss(self, outputs: Tensor, batch: Batch, facts: Facts) -> Tensor:
        """Return the mean of the examples' losses, weighed from a round on."""
        losses = self.example_losses(outputs, batch, facts)
        if not self.reweight_from:
            return batch.mean(losses)
        weights = class_balanced(self._counts(facts), self.beta).gather(0, batch.y)
        begun = facts.round >= self.reweight_from
        return batch.mean(losses, torch.where(begun, weights, 1))

    def _counts(self, facts: Facts) -> Tensor:
        return facts.class_counts if self.counts == "own" else facts.class_totals
