"""AutoFLIP: what clients explore before the first round says what is pruned.

Christian Internò et al., "Federated Hybrid Model Pruning through Loss Landscape
Exploration", 2024 (arXiv 2405.10271). The model is pruned once, for all clients, by the
guidance of FedLEx (:mod:`~fedweight.strategies.fedlex`): what explorers hardly move is
set to 0, stays 0 on every client and on the server, and is not sent. The formula is the
authors'; their public code is no oracle, as its explorers train one model object after
another and all end as the last one. Choices that the abstract leaves open are in the
card.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..clients.objectives.base import Around, Facts, NamedObjective, Objective
from ..clients.objectives.plain import Plain
from ..core.errors import ConfigurationError
from ..core.options import checked_fields
from ..messages import keys
from ..server.phase import Population
from .fedavg import FedAvg
from .fedlex import explore, guidance_of

log = logging.getLogger("fedweight")


@checked_fields
@dataclass(frozen=True, eq=False)
class Pruned(Around):
    """Another objective for a pruned model: after every step what is pruned is 0.

    Parameters
    ----------
    inner : Objective
        The other objective.
    """

    inner: NamedObjective = field(default_factory=Plain)

    @property
    def hears(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the other one hears, and the mask."""
        return (*self.inner.hears, keys.MASK)

    def unheard(self, x: Tensor, facts: Facts) -> Mapping[str, Tensor]:
        """Return a mask of 0 and 1 in turns."""
        turns = torch.arange(len(facts.received)) % 2
        return {**self.inner.unheard(x, facts), keys.MASK: turns.float()}

    def after_step(self, parameters: Tensor, facts: Facts) -> Tensor:
        """Return what the other one makes of the parameters, times the mask."""
        return self.inner.after_step(parameters, facts) * facts.told(keys.MASK)


class AutoFLIP(FedAvg):
    """FedAvg of a model that is pruned by what clients explored before the rounds.

    Explorers find the guidance G as FedLEx does. Parameters are kept whose G is above
    the quantile ``prune`` of all parameters' G; the others are set to 0, on the server
    and, after every step, on the clients, and do not travel.

    Parameters
    ----------
    prune : float
        In [0, 1); the share of the parameters that is pruned. 0 prunes nothing, which
        is FedAvg after an exploration in vain.
    explore_epochs : int
        1 or more; epochs of each explorer.
    explorers : float
        In (0, 1]; the share of the clients that explore, rounded down, one at least.

    Notes
    -----
    Of parameters of the same G at the quantile none is kept, so that somewhat more than
    ``prune`` may be pruned.
    """

    prune: Annotated[float, Field(ge=0, lt=1)] = 0.5
    explore_epochs: Annotated[int, Field(ge=1)] = 1
    explorers: Annotated[float, Field(gt=0, le=1)] = 0.1

    @classmethod
    def objective(cls, chosen: Objective, options: Mapping[str, Any]) -> Objective:
        """Set to 0 what is pruned after every step of what was chosen."""
        return Pruned(chosen)

    def begin(self) -> dict[str, Any]:
        """Know no mask."""
        return {keys.MASK: None}

    def prepare(self, population: Population) -> dict[str, Any]:
        """Let clients explore; keep the mask."""

        def everything(size: int) -> dict[str, Tensor]:
            return {keys.MASK: torch.ones(size, dtype=torch.bool)}

        explored = explore(population, self.explorers, self.explore_epochs, everything)
        mask = kept(guidance_of(explored), self.prune)
        log.info("AutoFLIP keeps %.4g of the parameters", mask.double().mean())
        return {keys.MASK: mask}

    def mask(self, state: Any) -> Tensor | None:
        """Return the mask, once it is known."""
        mask: Tensor | None = state[keys.MASK]
        return mask


def kept(guidance: Tensor, prune: float) -> Tensor:
    """Return the mask, ``[P]``, bool: where G is above its quantile ``prune``.

    Raises
    ------
    ConfigurationError
        If nothing is.

    Examples
    --------
    >>> kept(torch.tensor([0.1, 1.0, 0.0, 0.4]), 0.5).tolist()
    [False, True, False, True]
    """
    if prune == 0:
        return torch.ones(len(guidance), dtype=torch.bool)
    values = guidance.double()
    mask = values > float(np.quantile(values.numpy(), prune))
    if not mask.any():
        raise ConfigurationError(
            f"AutoFLIP: prune = {prune:g} keeps no parameter: so many of them were "
            "moved most, and alike. Lower it, or let clients explore for more epochs."
        )
    return mask
