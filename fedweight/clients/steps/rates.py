"""The learning rates of a chunk of clients, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..optimizers import Rate
from ..settings import TrainingSettings

# A learning rate of all clients, or one of each.
Rates = float | Sequence[float]


@dataclass(frozen=True)
class LearningRates:
    """The learning rates of a chunk.

    Attributes
    ----------
    settings : TrainingSettings
        Has their schedule over steps.
    own : list[float]
        ``[C]``: each client's in this round.
    same : bool
        Whether they are equal.
    """

    settings: TrainingSettings
    own: list[float]
    same: bool

    @classmethod
    def of(
        cls, settings: TrainingSettings, given: Rates, clients: int
    ) -> LearningRates:
        """Take what was given for some clients."""
        if isinstance(given, int | float):
            return cls(settings, [given] * clients, True)
        own = list(given)
        return cls(settings, own, len(set(own)) == 1)

    @property
    def first(self) -> float:
        """The first client's."""
        return self.own[0]

    def every(
        self, steps: npt.NDArray[np.int64], like: Tensor
    ) -> Callable[[int], Rate] | None:
        """Return what tells a step's rate; ``None`` where it is the first, always.

        A tensor, ``[C]``, where those who make the step differ; as ``like`` is.
        """
        if not self.settings.rate_schedule.over_steps:
            if self.same:
                return None
            rates = torch.tensor(self.own, dtype=like.dtype, device=like.device)
            return lambda step: rates
        at, counts = self.settings.learning_rate_at, steps.tolist()

        def rate(step: int) -> Rate:
            pairs = zip(self.own, counts, strict=True)
            now = [at(own, step, n) if step < n else math.nan for own, n in pairs]
            busy = {value for value in now if value == value}
            if len(busy) == 1:
                return busy.pop()
            # Of those who are done nothing is kept any more.
            return torch.tensor(now, dtype=like.dtype, device=like.device).nan_to_num_()

        return rate
