"""AFL: clients count as in the mixture of them that the model serves worst.

Mehryar Mohri, Gary Sivek and Ananda Theertha Suresh, "Agnostic Federated Learning",
ICML 2019: ``min_w max_lambda sum_k lambda_k F_k(w)`` over all mixtures ``lambda`` of
the N clients, by steps down in ``w`` and up in ``lambda``.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..messages import keys
from ..server.admission import check_not_negative
from .base import WeightingStrategy
from .round import Report, Round
from .weights import normalise

# A larger rise would do no more: this one takes all of the mixture.
LARGEST_RISE = 1e200


class AFL(WeightingStrategy):
    """Weigh clients by a mixture that rises where the loss is high.

    Each round the participants count as ``lambda``, ``1 / N`` each at first, made to
    sum to one over them. With ``F_k`` the loss of the received model on client k's
    training data, it then changes for the next round:

    * ``projected``: to the mixture that is nearest to ``lambda + step * F``;
    * ``exponentiated``: to one in proportion to ``lambda * exp(step * F)``.

    Parameters
    ----------
    update : {"projected", "exponentiated"}
        How ``lambda`` changes. Projected, entries become 0 and come back;
        exponentiated, they shrink by factors.
    step : float
        Above 0; the learning rate of ``lambda``. Near 0 all clients count alike; a
        large one leaves the client with the largest loss alone.

    Notes
    -----
    What the paper proves, it proves of the average of all rounds' models; the global
    model here is the last one. With partial participation only the participants'
    entries rise before all ``N`` are made a mixture again; where all participants have
    0 they count by data size. Both are this library's choice.
    """

    request = (keys.LOSS_BEFORE,)

    update: Literal["projected", "exponentiated"] = "projected"
    step: Annotated[float, Field(gt=0)] = 0.1

    def begin(self) -> dict[str, Any]:
        """Have seen nobody; who was not seen has the entry ``unseen``, or 1 / N."""
        return {"seen": {}, "unseen": None}

    def admit(self, report: Report) -> None:
        """Reject a loss below 0."""
        check_not_negative(report.metrics, keys.LOSS_BEFORE)

    def weights(self, round: Round) -> tuple[Tensor, dict[str, Any]]:
        """Return the participants' ``lambda``; the next one is remembered."""
        column = partial(torch.tensor, dtype=torch.float64)
        unseen = round.state["unseen"]
        unseen = 1 / round.population if unseen is None else unseen
        seen = {**dict.fromkeys(round.clients, unseen), **round.state["seen"]}
        own = column([seen[client] for client in round.clients])
        round.log("lambda", own)
        rise = (self.step * round.metric(keys.LOSS_BEFORE)).clamp(max=LARGEST_RISE)
        rises = dict(zip(round.clients, rise.tolist(), strict=True))
        # The last entry is that of each client that was never seen.
        others = max(round.population - len(seen), 0)
        update = projected if self.update == "projected" else exponentiated
        *after, rest = update(
            column([*seen.values(), unseen]),
            column([*(rises.get(client, 0.0) for client in seen), 0.0]),
            column([*[1.0] * len(seen), others]),
        ).tolist()
        return normalise(own, round.size_weights), {
            "seen": dict(zip(seen, after, strict=True)),
            "unseen": rest if others else None,
        }


def projected(entries: Tensor, rise: Tensor, counts: Tensor) -> Tensor:
    """Return the mixture nearest to ``entries + rise``, of ``counts`` equals each.

    Examples
    --------
    >>> third, losses = torch.full((3,), 1 / 3), torch.tensor([2.0, 1.0, 0.5])
    >>> projected(third, 2.0 * losses, torch.ones(3)).tolist()
    [1.0, 0.0, 0.0]
    """
    # What all have in common changes nothing; without it no digits are lost.
    raised = entries + rise
    raised = raised - raised[counts > 0].max()
    order = raised.argsort(descending=True)
    high, number = raised[order], counts[order]
    members = number.cumsum(0)
    spare = (1 - (number * high).cumsum(0)) / members.clamp(min=1)
    last = int(((high + spare > 0) & (members > 0)).nonzero().max())
    return (raised + spare[last]).clamp(min=0)


def exponentiated(entries: Tensor, rise: Tensor, counts: Tensor) -> Tensor:
    """Return a mixture in proportion to ``entries * exp(rise)``, likewise."""
    powers = entries.clamp(min=1e-300).log() + rise
    raised = (powers - powers[counts > 0].max()).exp()
    return raised / (raised * counts)[counts > 0].sum()
