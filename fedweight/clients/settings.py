"""How a client trains: epochs, batches, optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ..core.options import MOST, checked_fields


@checked_fields
@dataclass(frozen=True)
class TrainingSettings:
    """How a client trains.

    Parameters
    ----------
    epochs : int
        Passes over the client's data in a round, 1 or more.
    batch_size : int
        Examples in a step, 1 or more; the last step of a pass takes what is left. One
        that is left alone joins the step before, for a model that needs two.
    optimizer : {"sgd", "adam"}
        Fresh in every round.
    learning_rate : float
        0 or more.
    learning_rate_decay : float
        In (0, 1]; round t trains with ``learning_rate * decay ** (t - 1)``.
    momentum : float
        In [0, 1); for ``sgd``.
    weight_decay : float
        0 or more; the strength of the L2 term, in the gradient.
    """

    epochs: Annotated[
        int, Field(ge=1, le=MOST, description="passes over a client's data in a round")
    ] = 1
    batch_size: Annotated[
        int, Field(ge=1, le=MOST, description="examples in a step")
    ] = 32
    optimizer: Annotated[
        Literal["sgd", "adam"], Field(description="the client's optimiser")
    ] = "sgd"
    learning_rate: Annotated[
        float, Field(ge=0, description="of the client's optimiser")
    ] = 0.1
    learning_rate_decay: Annotated[
        float, Field(gt=0, le=1, description="factor on the rate after every round")
    ] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1, description="of sgd")] = 0.0
    weight_decay: Annotated[
        float, Field(ge=0, description="strength of the L2 term")
    ] = 0.0

    def learning_rate_in(self, round: int) -> float:
        """Return the learning rate of a round, which count from 1."""
        return float(self.learning_rate * self.learning_rate_decay ** (round - 1))

    @property
    def diverging_mu(self) -> float:
        """From which ``mu`` on a proximal term alone makes training diverge.

        A step of SGD multiplies the distance from the received model by ``1 -
        learning_rate * mu``, so it grows from ``2 / learning_rate`` on; with momentum
        from ``2 * (1 + momentum) / learning_rate`` on. Adam's steps do not grow.

        Examples
        --------
        >>> TrainingSettings(learning_rate=0.1).diverging_mu
        20.0
        """
        if self.optimizer != "sgd" or not self.learning_rate:
            return math.inf
        return 2 * (1 + self.momentum) / self.learning_rate
