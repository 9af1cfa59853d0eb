"""Balanced softmax: the softmax of logits to which the log of class counts is added.

Jiawei Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS
2020, equation 4; with an exponent, Aditya Menon et al., "Long-Tail Learning via Logit
Adjustment", ICLR 2021, equation 10.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...core.options import checked_fields
from .base import Batch, Fact, Facts, Objective


@checked_fields
@dataclass(frozen=True, eq=False)
class BalancedSoftmax(Objective):
    """Cross-entropy of ``z_c + tau * log n_c``; the model predicts with ``z``.

    Parameters
    ----------
    tau : float
        0 or more; 0 is the cross-entropy, 1 the balanced softmax. This is logit
        adjustment in training, at any value.
    counts : {"all", "own"}
        Whose examples of each class ``n_c`` counts. Of all clients, the model is
        balanced over a federation in which some classes are rare; the clients tell
        their counts once, and are told the sum. Of its own, each client trains as if
        all classes were as frequent.

    Notes
    -----
    A class without examples counts as if it had one.
    """

    tau: Annotated[float, Field(ge=0)] = 1.0
    counts: Literal["all", "own"] = "all"

    @property
    def wants(self) -> frozenset[Fact]:  # type: ignore[override]
        """The counts."""
        return frozenset({"class-totals" if self.counts == "all" else "class-counts"})

    def example_losses(self, outputs: Tensor, batch: Batch, facts: Facts) -> Tensor:
        """Return ``-log softmax(z + tau * log n)[y]``."""
        n = facts.class_counts if self.counts == "own" else facts.class_totals
        adjusted = outputs + self.tau * n.clamp(min=1).log()
        return F.cross_entropy(adjusted, batch.y, reduction="none")
