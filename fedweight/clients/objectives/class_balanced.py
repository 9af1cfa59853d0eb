"""Class-balanced loss: classes count by the inverse of their effective number.

Yin Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019,
Proposition 1 and the softmax loss of Section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...core.options import checked_fields
from .base import Batch, Fact, Facts, Objective


def class_balanced(counts: Tensor, beta: float) -> Tensor:
    """Return how much an example of each class counts, ``[C]``.

    In inverse proportion to the class's effective number of examples
    ``(1 - beta ** n) / (1 - beta)``, and of mean 1 over the classes that have any; a
    class that has none gets 0.

    Parameters
    ----------
    counts : Tensor
        ``[C]``, float: the examples of each class.
    beta : float
        In [0, 1). At 0 all classes count alike, towards 1 by ``1 / n``.

    Examples
    --------
    >>> class_balanced(torch.tensor([100.0, 10.0, 1.0]), 0.999)
    tensor([0.0284, 0.2713, 2.7004])
    """
    present = counts > 0
    if not beta:
        return present.to(counts.dtype)
    # 1 - beta ** n loses most digits where beta is near 1.
    effective = torch.expm1(counts * math.log(beta)) / (beta - 1)
    inverse = torch.where(present, 1 / torch.where(present, effective, 1), 0)
    return inverse * present.sum() / inverse.sum().clamp(min=1e-12)


@checked_fields
@dataclass(frozen=True, eq=False)
class ClassBalanced(Objective):
    """Cross-entropy in which classes count by their inverse effective number.

    The weights are scaled to a mean of 1 in every batch, so that steps are as long as
    without them; a batch of one class, or of one example, is as without them.

    Parameters
    ----------
    beta : float
        In [0, 1); 0 is the cross-entropy, towards 1 a class counts by ``1 / n_c``. The
        authors take 0.9 to 0.9999.
    counts : {"all", "own"}
        Whose examples of each class ``n_c`` counts: of all clients, so that a class
        counts the same everywhere (the clients tell their counts once, and are told
        the sum), or of its own.
    """

    beta: Annotated[float, Field(ge=0, lt=1)] = 0.999
    counts: Literal["all", "own"] = "all"

    @property
    def wants(self) -> frozenset[Fact]:  # type: ignore[override]
        """The counts."""
        return frozenset({"class-totals" if self.counts == "all" else "class-counts"})

    def example_losses(self, outputs: Tensor, batch: Batch, facts: Facts) -> Tensor:
        """Return ``-log softmax(outputs)[y]``, not weighed yet."""
        return F.cross_entropy(outputs, batch.y, reduction="none")

    def batch_loss(self, outputs: Tensor, batch: Batch, facts: Facts) -> Tensor:
        """Return the weighed mean of the examples' losses."""
        n = facts.class_counts if self.counts == "own" else facts.class_totals
        weights = class_balanced(n, self.beta).gather(0, batch.y)
        return batch.mean(self.example_losses(outputs, batch, facts), weights)
