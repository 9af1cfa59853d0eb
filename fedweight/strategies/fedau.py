"""FedAU: a client counts by how many rounds it usually stays away.

Shiqiang Wang and Mingyue Ji, "A Lightweight Method for Tackling Unknown Participation
Statistics in Federated Averaging", ICLR 2024. Who takes part rarely counts more when it
does, without anybody knowing how often that is: the mean of its intervals between two
participations estimates the inverse of its probability of taking part.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from .base import WeightingStrategy
from .round import Round


class Intervals(NamedTuple):
    """Of one client: the round of its last cut, its number of intervals, their mean."""

    cut: int = 0
    number: int = 0
    mean: float = 1.0

    def and_also(self, times: int, length: int) -> Intervals:
        """Return these and so many more of this length, cut after the last one."""
        if not times:
            return self
        number = self.number + times
        mean = (self.number * self.mean + times * length) / number
        return Intervals(self.cut + times * length, number, mean)


class FedAU(WeightingStrategy):
    """Weigh clients by the mean of the intervals in which they take part, over N.

    The weights are ``omega_k / N`` with N all clients, also those that are away, and
    ``omega_k`` the mean length of client k's intervals, in rounds, up to the round
    before: 1 until one is complete. An interval ends with the round in which the client
    takes part, or after ``cutoff`` rounds.

    Parameters
    ----------
    cutoff : int, optional
        1 or more; the longest interval, and so the largest ``omega``. By default there
        is none. With one the steps vary less, but who takes part more rarely counts too
        little. 1 gives all the same weight.

    Notes
    -----
    The weights do not sum to one: on average over the rounds they do, and the model of
    a round in which few take part moves less. What is minimised is the mean of all
    clients' losses, whatever their sizes. Where all take part in every round it is the
    plain mean. All clients count as there from round 1 on; a round that failed is one
    in which nobody took part.
    """

    cutoff: Annotated[int, Field(ge=1)] | None = None

    def begin(self) -> dict[int, list[float]]:
        """Know no intervals; who was never there has no entry."""
        return {}

    def weights(self, round: Round) -> tuple[Tensor, dict[int, list[float]]]:
        """Return ``omega / N``; the intervals that end now count from the next on."""
        known = {
            client: self._before(round.number, round.state.get(client))
            for client in round.clients
        }
        omega = torch.tensor([one.mean for one in known.values()], dtype=torch.float64)
        round.log("mean-interval", omega)
        new = {
            client: list(one.and_also(1, round.number - one.cut))
            for client, one in known.items()
        }
        return omega / round.population, {**round.state, **new}

    def _before(self, number: int, entry: list[float] | None) -> Intervals:
        """Return a client's intervals, with those that were cut while it was away."""
        cut, times, mean = entry or Intervals()
        # A strategy may be started again, and counts its rounds from 1 then.
        known = Intervals(min(int(cut), number - 1), int(times), mean)
        if self.cutoff is None:
            return known
        return known.and_also((number - 1 - known.cut) // self.cutoff, self.cutoff)
