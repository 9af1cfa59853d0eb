"""The server's own optimiser: from the aggregated update to the model's step.

Sashank Reddi et al., "Adaptive Federated Optimization", ICLR 2021, treat the
aggregated update d as a descent direction. Any weighting composes with any of these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ..core.errors import ConfigurationError
from ..core.options import checked_fields
from . import SERVER_OPTIMIZERS


class ServerOptimizer(ABC):
    """Turns an aggregated update ``[P]`` into the step of the global model ``[P]``."""

    @abstractmethod
    def step(self, update: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return the step, and the next state.

        Parameters
        ----------
        update : Tensor
            ``[P]``.
        state : Any
            What was returned last; ``None`` at first.
        """


@checked_fields
@dataclass(frozen=True)
class ServerMomentum(ServerOptimizer):
    """Momentum on the server: ``v <- beta v + (1 - dampening) d``, step ``lr * v``.

    Parameters
    ----------
    learning_rate : float
        Above 0; with ``beta = 0`` and 1.0 it is plain averaging.
    beta : float
        In [0, 1); how much of the last step goes on.
    dampening : float
        In [0, 1]. 0 is FedAvgM (Tzu-Ming Harry Hsu et al., "Measuring the Effects of
        Non-Identical Data Distribution for Federated Visual Classification", 2019);
        ``beta`` itself is the damped form, whose first steps are small.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9
    dampening: Annotated[float, Field(ge=0, le=1)] = 0.0

    def step(self, update: Tensor, state: Any) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: D102
        velocity = (1 - self.dampening) * update
        if state is not None:
            velocity = self.beta * state["velocity"] + velocity
        return self.learning_rate * velocity, {"velocity": velocity}


@checked_fields
@dataclass(frozen=True)
class ServerAdam(ServerOptimizer):
    """FedAdam: ``m <- b1 m + (1 - b1) d``, ``v <- b2 v + (1 - b2) d^2``.

    The step is ``lr * m / (sqrt(v) + tau)``, without bias correction, as in the paper
    (Algorithm 2, FedAdam; ``v`` starts at ``tau^2``).

    Parameters
    ----------
    learning_rate : float
        Above 0.
    beta_1 : float
        In [0, 1); how much of the mean of updates stays in a round.
    beta_2 : float
        In [0, 1); how much of the mean of their squares stays in a round.
    tau : float
        Above 0; the degree of adaptivity. Where it is far above the update's
        coordinates nothing is adapted: the step is ``learning_rate / tau`` times the
        momentum, over ``1 + beta_2^(t / 2)`` in round t.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    beta_1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta_2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3

    def step(self, update: Tensor, state: Any) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: D102
        if state is None:
            state = {
                "first": torch.zeros_like(update),
                "second": torch.full_like(update, self.tau**2),
            }
        first = self.beta_1 * state["first"] + (1 - self.beta_1) * update
        second = self.beta_2 * state["second"] + (1 - self.beta_2) * update.square()
        step = self.learning_rate * first / (second.sqrt() + self.tau)
        return step, {"first": first, "second": second}


def no_optimizer() -> None:
    """Take the aggregated update as the step."""


def server_optimizer(name: str, **options: float) -> ServerOptimizer | None:
    """Make a server optimiser by name, or the user's own by ``"module:Class"``.

    Raises
    ------
    ConfigurationError
        If there is none, or if it is no :class:`ServerOptimizer`.

    Examples
    --------
    >>> server_optimizer("adam", learning_rate=0.1).learning_rate
    0.1
    """
    made = SERVER_OPTIMIZERS.resolve(name)(**options)
    if made is not None and not isinstance(made, ServerOptimizer):
        raise ConfigurationError(
            f"server optimiser '{name}' is {type(made).__name__}, which is not derived "
            "from fedweight.strategies.server_optimizers.ServerOptimizer."
        )
    return made
