"""Losses that are robust to the distribution of labels: LDR-KL and ALDR-KL.

Dixian Zhu et al., "Label Distributionally Robust Losses for Multi-class
Classification: Consistency, Robustness and Adaptivity", ICML 2023, equations 3 and 8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...core.options import checked_fields
from ..batchable import one_hot
from .base import Batch, Facts, Loss, Model, Objective

# Added to probabilities, so that none is 0.
SMALL = 1e-5


def ldr(logits: Tensor, labels: Tensor, temperature: Tensor, margin: float) -> Tensor:
    """Return the LDR-KL loss of each example, ``[n]``.

    ``lambda * log mean_c exp((m [c != y] + z_c - z_y) / lambda)``

    Parameters
    ----------
    logits, labels : Tensor
        ``[n, C]`` and ``[n]``.
    temperature : Tensor
        ``[n]``, or 0-d: lambda, above 0. Towards 0 the loss is the largest term of the
        mean, a hinge; towards infinity it is the mean of the terms.
    margin : float
        m.
    """
    others = 1 - one_hot(labels, logits.shape[1], logits.dtype)
    own = logits.gather(1, labels[:, None])
    scale = temperature.expand(len(labels))
    terms = (margin * others + logits - own) / scale[:, None]
    return scale * (terms.logsumexp(1) - math.log(logits.shape[-1]))


@checked_fields
@dataclass(frozen=True, eq=False)
class LDR(Objective):
    """The largest expected margin over distributions of labels near the uniform one.

    Parameters
    ----------
    temperature : float
        Lambda, above 0. Towards 0 this is the hinge of Crammer and Singer, towards
        infinity the mean margin; with 1 and no margin, the cross-entropy less log C.
    margin : float
        0 or more.
    normalise : bool
        Whether logits are made positive and of mean 1 first (softplus), as the
        authors' code does.
    """

    temperature: Annotated[float, Field(gt=0)] = 1.0
    margin: Annotated[float, Field(ge=0)] = 0.1
    normalise: bool = True

    def example_losses(self, outputs: Tensor, batch: Batch, facts: Facts) -> Tensor:
        """Return the loss of each example; it may be below 0."""
        logits = outputs
        if self.normalise:
            logits = F.softplus(logits)
            logits = logits / logits.mean(1, keepdim=True)
        temperature = torch.tensor(self.temperature, dtype=logits.dtype)
        return ldr(logits, batch.y, temperature.to(logits.device), self.margin)


@checked_fields
@dataclass(frozen=True, eq=False)
class ALDR(Objective):
    """LDR-KL with a temperature of each example's own, which the client keeps.

    Examples that the model is sure of get a lower temperature, down to ``(1 - 1 / a)``
    of the first one; those that it is not sure of, perhaps wrongly labelled, keep it.

    Parameters
    ----------
    temperature : float
        Lambda at first, above 0.
    a : float
        Above 1; towards infinity this is LDR-KL.
    margin : float
        0 or more.
    normalise : bool
        Whether logits are divided by their mean size first, as the authors' code does.
    """

    temperature: Annotated[float, Field(gt=0)] = 1.0
    a: Annotated[float, Field(gt=1)] = 2.0
    margin: Annotated[float, Field(ge=0)] = 0.1
    normalise: bool = True

    @property
    def per_example(self) -> dict[str, float]:  # type: ignore[override]
        """The temperature of each training example."""
        return {"temperature": self.temperature}

    def loss(self, model: Model, batch: Batch, facts: Facts) -> Loss:
        """Return the mean loss, and the examples' new temperatures."""
        outputs = logits = model(batch.x)
        if self.normalise:
            size = logits.abs().mean(1, keepdim=True)
            # Logits that are all 0, as of a model that begins with zeros, stay so.
            logits = logits / torch.where(size > 0, size, 1)
        new = self.temperatures(logits.detach(), batch.state["temperature"])
        return Loss(
            batch.mean(self.losses(logits, batch.y, new)),
            outputs,
            state={"temperature": new},
        )

    def temperatures(self, logits: Tensor, before: Tensor) -> Tensor:
        """Return what the examples' temperatures become, ``[n]``."""
        classes = logits.shape[1]
        likely = (logits / before[:, None]).softmax(1) + SMALL
        likely = likely / likely.sum(1, keepdim=True)
        divergence = (likely * (likely * classes).log()).sum(1)
        return self.temperature * (1 - divergence / (self.a * math.log(classes)))

    def losses(self, logits: Tensor, labels: Tensor, temperature: Tensor) -> Tensor:
        """Return the loss of each example at its temperature, ``[n]``."""
        away = (temperature - self.temperature) ** 2 / self.temperature
        price = 0.5 * self.a * math.log(logits.shape[1]) * away
        return ldr(logits, labels, temperature, self.margin) - price
