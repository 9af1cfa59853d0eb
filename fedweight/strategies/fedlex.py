"""FedLEx: what clients explore before the first round guides their steps.

Christian Internò et al., "Federated Loss Exploration for Improved Convergence on
Non-IID Data", IJCNN 2024. Clients train a common model before the federated rounds. How
far they move each parameter, in the mean square, scaled to [0, 1] in each named tensor,
is the guidance G, by which every local gradient is multiplied from then on. The formula
is the authors'; their public code is no oracle, as its clients send ones in place of
what they have explored. Choices that the abstract leaves open are in the card.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ..clients.objectives.base import Around, Facts, NamedObjective, Objective
from ..clients.objectives.plain import Plain
from ..core.options import checked_fields
from ..core.rng import Purpose, generator
from ..server.phase import Population
from .base import Told
from .fedavg import FedAvg
from .round import PerParameter, Round, Selection

GUIDANCE = "guidance"


@checked_fields
@dataclass(frozen=True, eq=False)
class Guided(Around):
    """Another objective whose gradient is multiplied by the guidance G.

    Parameters
    ----------
    inner : Objective
        The other objective.
    """

    inner: NamedObjective = field(default_factory=Plain)

    @property
    def hears(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the other one hears, and G."""
        return (*self.inner.hears, GUIDANCE)

    def unheard(self, x: Tensor, facts: Facts) -> Mapping[str, Tensor]:
        """Return a G of 0 and 1 in turns."""
        turns = torch.arange(len(facts.received)) % 2
        return {**self.inner.unheard(x, facts), GUIDANCE: turns.float()}

    def gradient(
        self,
        gradient_at: Callable[[Tensor], Tensor],
        parameters: Tensor,
        facts: Facts,
    ) -> Tensor:
        """Return the other one's gradient, times G."""
        gradient = self.inner.gradient(gradient_at, parameters, facts)
        return gradient * facts.told(GUIDANCE)


class FedLEx(FedAvg):
    """FedAvg of clients whose gradients are guided by what clients explored before.

    Before the first round one client, drawn by chance, trains the first model for an
    epoch, which gives ``w_b``; some clients, the explorers, each train from ``w_b``,
    which gives ``w_k``. Of each parameter ``mean_k (w_k - w_b)^2`` is taken, and in
    each named tensor brought to [0, 1] by its least and largest value: the guidance G.
    Clients multiply each gradient by G, element by element, before it is clipped. The
    rounds begin with the first model.

    Parameters
    ----------
    explore_epochs : int
        1 or more; epochs of each explorer.
    explorers : float
        In (0, 1]; the share of the clients that explore, rounded down, one at least.

    Notes
    -----
    In a tensor whose parameters all move alike G is 1. Where G is 0 a parameter never
    learns.
    """

    explore_epochs: Annotated[int, Field(ge=1)] = 150
    explorers: Annotated[float, Field(gt=0, le=1)] = 1.0

    @classmethod
    def objective(cls, chosen: Objective, options: Mapping[str, Any]) -> Objective:
        """Multiply the gradient of what was chosen by G."""
        return Guided(chosen)

    def begin(self) -> dict[str, Any]:
        """Know no guidance."""
        return {GUIDANCE: None}

    def prepare(self, population: Population) -> dict[str, Any]:
        """Let clients explore; keep G."""

        def no_guidance(size: int) -> dict[str, Tensor]:
            return {GUIDANCE: torch.ones(size)}

        explored = explore(population, self.explorers, self.explore_epochs, no_guidance)
        return {GUIDANCE: guidance_of(explored)}

    def tell(self, selection: Selection) -> Mapping[str, Told]:
        """Tell all clients G, once it is known."""
        guidance = selection.state[GUIDANCE]
        return {} if guidance is None else {GUIDANCE: PerParameter(guidance)}


def explore(
    population: Population,
    share: float,
    epochs: int,
    told: Callable[[int], Mapping[str, Tensor]],
) -> Round:
    """Let clients explore the losses around a model that one of them has trained.

    Parameters
    ----------
    population : Population
        All clients.
    share : float
        How many of them explore, rounded down, one at least.
    epochs : int
        How many passes over its data each explorer makes.
    told : Callable
        Returns what clients are told of each of P parameters meanwhile.

    Returns
    -------
    Round
        The explorers': its model is ``w_b``, its updates are ``w_k - w_b``.
    """
    stream = generator(population.seed, Purpose.PHASE)
    clients = population.clients
    first = clients[int(stream.integers(len(clients)))]
    base = population.train([first], epochs=1, told=told)
    start = base.model.parameters + base.updates.combine(torch.ones(1))
    some = stream.choice(len(clients), max(1, int(share * len(clients))), replace=False)
    explorers = [clients[place] for place in sorted(some.tolist())]
    explored: Round = population.train(explorers, epochs=epochs, start=start, told=told)
    return explored


def guidance_of(explored: Round) -> Tensor:
    """Return G, ``[P]``: how far explorers moved, in [0, 1] in each named tensor.

    Parameters
    ----------
    explored : Round
        Of the explorers.
    """
    moved = torch.empty(explored.updates.num_parameters, dtype=torch.float64)
    for columns, sheet in explored.updates.column_blocks():
        moved[columns] = sheet.double().square().mean(0)
    places = zip(explored.updates.offsets, explored.updates.offsets[1:], strict=False)
    for place in places:
        moved[slice(*place)] = scaled(moved[slice(*place)])
    return moved.to(explored.model.layout.dtype)


def scaled(values: Tensor) -> Tensor:
    """Return values of a tensor brought to [0, 1]; 1 where all are the same.

    Examples
    --------
    >>> scaled(torch.tensor([1.0, 3.0, 2.0])).tolist()
    [0.0, 1.0, 0.5]
    >>> scaled(torch.tensor([2.0, 2.0])).tolist()
    [1.0, 1.0]
    """
    if not values.numel():
        return values
    least, most = values.min(), values.max()
    if least == most:
        return torch.ones_like(values)
    return (values - least) / (most - least)
