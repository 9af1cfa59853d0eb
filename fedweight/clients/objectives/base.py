"""What a local objective is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Examples of one client for one step.

    Attributes
    ----------
    x : Tensor
        Inputs, ``[n, ...]``.
    y : Tensor
        Labels, ``[n]``, int64.
    mask : Tensor, optional
        ``[n]``, 1 for an example and 0 for padding; ``None`` where nothing is padded.
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None = None

    def mean(self, values: Tensor) -> Tensor:
        """Average a value of each example, ``[n]``, over the real examples."""
        if self.mask is None:
            return values.mean()
        # Chosen, not multiplied: 0 times infinity is not 0.
        real = torch.where(self.mask > 0, values, 0)
        return real.sum() / self.mask.sum().clamp(min=1)


class Objective(ABC):
    """What is minimised on a batch.

    An objective is a value without state: the same object serves every client.
    """

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the batch's loss, a scalar that autograd can follow.

        Parameters
        ----------
        outputs : Tensor
            The model's logits, ``[n, C]``.
        batch : Batch
            The examples. Average with ``batch.mean``, so that padding does not count.
        """

    def penalty_gradient(self, parameters: Tensor, start: Tensor) -> Tensor | None:
        """Return what a penalty on the parameters adds to the gradient, ``[P]``.

        Parameters
        ----------
        parameters : Tensor
            The local model now, ``[P]``.
        start : Tensor
            The global model that the client received, ``[P]``.
        """
        return None
