"""The server's own optimiser: from the aggregated update to the model's step.

Sashank Reddi et al., "Adaptive Federated Optimization", ICLR 2021, treat the
aggregated update d as a descent direction. Any weighting composes with any of these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigurationError, check_range
from . import SERVER_OPTIMIZERS


class ServerOptimizer(ABC):
    """Turns an aggregated update ``[P]`` into the step of the global model ``[P]``."""

    @abstractmethod
    def step(self, update: Tensor) -> Tensor:
        """Return the step, and remember what the next one needs."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what is remembered between rounds."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` returned."""


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

    def __init__(
        self, learning_rate: float = 1.0, beta: float = 0.9, dampening: float = 0.0
    ) -> None:
        check_range("learning_rate", learning_rate, 0, low_open=True)
        check_range("beta", beta, 0, 1, high_open=True)
        check_range("dampening", dampening, 0, 1)
        self.learning_rate = learning_rate
        self.beta = beta
        self.dampening = dampening
        self.velocity: Tensor | None = None

    def step(self, update: Tensor) -> Tensor:  # noqa: D102
        fresh = (1 - self.dampening) * update
        before = self.velocity
        self.velocity = fresh if before is None else self.beta * before + fresh
        return self.learning_rate * self.velocity

    def state(self) -> dict[str, Any]:  # noqa: D102
        return {"velocity": self.velocity}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self.velocity = state["velocity"]


class ServerAdam(ServerOptimizer):
    """FedAdam: ``m <- b1 m + (1 - b1) d``, ``v <- b2 v + (1 - b2) d^2``.

    The step is ``lr * m / (sqrt(v) + tau)``, without bias correction, as in the paper
    (Algorithm 2, FedAdam; ``v`` starts at ``tau^2``).

    Parameters
    ----------
    learning_rate : float
        Above 0.
    beta_1, beta_2 : float
        In [0, 1).
    tau : float
        Above 0; the degree of adaptivity. Where it is far above the update's
        coordinates nothing is adapted: the step is ``learning_rate / tau`` times the
        momentum, over ``1 + beta_2^(t / 2)`` in round t.
    """

    def __init__(
        self,
        learning_rate: float = 0.01,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
    ) -> None:
        check_range("learning_rate", learning_rate, 0, low_open=True)
        check_range("beta_1", beta_1, 0, 1, high_open=True)
        check_range("beta_2", beta_2, 0, 1, high_open=True)
        check_range("tau", tau, 0, low_open=True)
        self.learning_rate = learning_rate
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.tau = tau
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def step(self, update: Tensor) -> Tensor:  # noqa: D102
        if self.first is None or self.second is None:
            self.first = torch.zeros_like(update)
            self.second = torch.full_like(update, self.tau**2)
        self.first = self.beta_1 * self.first + (1 - self.beta_1) * update
        self.second = self.beta_2 * self.second + (1 - self.beta_2) * update.square()
        return self.learning_rate * self.first / (self.second.sqrt() + self.tau)

    def state(self) -> dict[str, Any]:  # noqa: D102
        return {"first": self.first, "second": self.second}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self.first, self.second = state["first"], state["second"]


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
