"""Group DRO inside a client: groups that the model serves badly count more.

Shiori Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", ICLR
2020, Algorithm 1, on each client's own examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...core.options import checked_fields
from ..batchable import means_by_group
from .base import Batch, Facts, Loss, Model, Objective


@checked_fields
@dataclass(frozen=True, eq=False)
class GroupDRO(Objective):
    """The groups' mean losses, weighed by weights that grow with them.

    In each step ``q_g`` is multiplied by ``exp(eta * L_g)`` for the groups in the
    batch, and made to sum to one again. The client takes ``q`` along to its next round.

    Parameters
    ----------
    group : str
        The attribute of the examples that says which group each is in, such as
        ``"sex"`` of Adult.
    eta : float
        0 or more; at 0 every group counts alike.
    """

    wants = frozenset({"groups"})

    group: str = ""
    eta: Annotated[float, Field(ge=0)] = 0.01

    def begin(self, facts: Facts) -> Mapping[str, Tensor]:
        """Return equal weights of all groups."""
        counts = facts.group_counts
        return {"weights": torch.full_like(counts, 1 / len(counts))}

    def loss(self, model: Model, batch: Batch, facts: Facts) -> Loss:
        """Return ``sum q_g L_g / sum q_g`` over the groups in the batch."""
        assert batch.groups is not None
        outputs = model(batch.x)
        losses = F.cross_entropy(outputs, batch.y, reduction="none")
        number = facts.group_counts.shape[0]
        means, counts = means_by_group(losses, batch.groups, number, batch.mask)
        weights = self.weights(facts.carry["weights"], means.detach(), counts > 0)
        of_present = torch.where(counts > 0, weights, 0)
        value = (of_present * means).sum() / of_present.sum().clamp(min=1e-12)
        return Loss(value, outputs, carry={"weights": weights})

    def weights(self, before: Tensor, losses: Tensor, present: Tensor) -> Tensor:
        """Return the groups' next weights, ``[G]``.

        Parameters
        ----------
        before, losses : Tensor
            ``[G]``: the weights so far, and the groups' mean losses.
        present : Tensor
            ``[G]``: which groups are in the batch.
        """
        grown = torch.where(present, before * (self.eta * losses).exp(), before)
        return grown / grown.sum()
