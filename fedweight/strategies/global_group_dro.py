"""Global group DRO: who the model serves badly counts more, over all clients.

Shiori Sagawa, Pang Wei Koh, Tatsunori B. Hashimoto and Percy Liang, "Distributionally
Robust Neural Networks for Group Shifts: On the Importance of Regularization for
Worst-Case Generalization", ICLR 2020: ``min_w max_q sum_g q_g L_g(w)`` by the online
algorithm (Algorithm 1), with the group adjustment ``C / sqrt(n_g)`` (Section 3.3).
Groups are clients, or those of an attribute, across clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ..clients.objectives.base import (
    Around,
    Batch,
    Fact,
    Facts,
    NamedObjective,
    Objective,
)
from ..clients.objectives.checks import check_mean
from ..clients.objectives.plain import Plain
from ..core.errors import AggregationError, ClientError, ConfigurationError
from ..core.options import GIVEN, checked_fields
from ..core.texts import shown
from ..messages import keys
from ..server.admission import check_not_negative
from ..server.phase import Population, Question
from ..server.reported import is_count
from .base import Told, WeightingStrategy
from .round import Report, Round, Selection, Vector
from .weights import normalise

# A larger rise would do no more: this one takes all.
LARGEST_RISE = 1e200

# So many groups have columns of their own in the record.
MOST_LOGGED = 20


class GlobalGroupDRO(WeightingStrategy):
    """Weigh groups, of clients or of examples, by weights that grow with their loss.

    ``q`` is a distribution over groups, uniform at first. In each round, with ``L_g``
    the mean loss of the received model on the group's examples at all the round's
    clients, ``q_g`` is multiplied by ``exp(step * (L_g + adjustment / sqrt(n_g)))`` and
    made to sum to one. Without ``group`` every client is a group, and counts as its
    ``q``. With it each example of group g counts ``n q_g / n_g``, 1 on average over
    all clients' examples: a client is told the weights, scales them to a mean of 1 in
    each batch, and its update counts as the sum of its examples' weights.

    Parameters
    ----------
    group : str
        The attribute of the examples that says which group each is in, such as
        ``"sex"`` of Adult. By default every client is a group.
    step : float
        0 or more; the learning rate of ``q``. At 0 all groups count alike, however
        large they are.
    adjustment : float
        0 or more; C, in units of the loss times the root of a number of examples: a
        small group counts as one with a larger loss, which its few examples hide.
    num_groups : int, optional
        How many groups the attribute has; needed with ``group``. A run of this library
        tells it.

    Notes
    -----
    The weights sum to one. With ``group`` clients train with the ``q`` that the rounds
    before have left, since it must be known before a round's losses are; without, with
    this round's, as in the paper. A group without an example in a round keeps its
    ``q`` but for the scaling; one that nobody has does not count. Clients are asked
    once, before the first round, how many examples of each group they have, and in
    each round for the groups' sums of losses and their numbers of examples.

    It differs from :class:`~fedweight.strategies.AFL` with ``exponentiated``, to which
    it is closest with a group a client, in that a round's losses already count in the
    same round, in the adjustment, and in that ``q`` is made to sum to one over those
    who take part and not over all. It differs from the local objective ``group-dro``,
    where each client has a ``q`` of its own, by its own examples: there no group gains
    because other clients serve it badly.
    """

    request = (keys.LOSS_BEFORE,)

    group: str = ""
    step: Annotated[float, Field(ge=0)] = 0.1
    adjustment: Annotated[float, Field(ge=0)] = 0.0
    num_groups: Annotated[Annotated[int, Field(ge=1)] | None, GIVEN] = None

    def __post_init__(self) -> None:
        """Refuse groups of which it is not known how many there are."""
        super().__post_init__()
        if self.group and self.num_groups is None:
            raise ConfigurationError(
                f"GlobalGroupDRO: with group {shown(self.group)} num_groups must say "
                "how many groups that attribute has."
            )

    @classmethod
    def objective(cls, chosen: Objective, options: Mapping[str, Any]) -> Objective:
        """Weigh the examples of what was chosen by their groups."""
        group = options.get("group", "")
        return GroupWeighted(group, chosen) if group else chosen

    def begin(self) -> dict[str, Any]:
        """Have seen no loss, and no example.

        ``logs`` are the logarithms of ``q``, up to a number that all have in common,
        by group or client; ``counts``, ``[G]``, all clients' examples of each group.
        """
        return {"logs": {}, "counts": [1] * (self.num_groups or 0)}

    def prepare(self, population: Population) -> dict[str, Any]:
        """Ask how many examples of each group there are."""
        if not self.group:
            return self.begin()
        asked = Question({keys.GROUP: self.group})
        answers = population.ask(
            keys.GROUP_COUNTS, dict.fromkeys(population.clients, asked)
        )
        total = torch.zeros(self.num_groups or 0, dtype=torch.int64)
        for client, answer in answers.items():
            own = answer.profile.get(keys.GROUP_COUNTS)
            whole = isinstance(own, list) and all(map(is_count, own))
            if not isinstance(own, list) or not whole or len(own) > len(total):
                why = f"its '{keys.GROUP_COUNTS}' are no {len(total)} counts"
                population.reject(keys.GROUP_COUNTS, client, why)
                continue
            total[: len(own)] += torch.tensor(own)
        if not total.any():
            raise ConfigurationError(
                f"GlobalGroupDRO: no client told how many examples of each group of "
                f"'{self.group}' it has; the log says why."
            )
        return {**self.begin(), "counts": total.tolist()}

    def tell(self, selection: Selection) -> Mapping[str, Told]:
        """Tell what the examples of each group count, and by what they are grouped."""
        if not self.group:
            return {}
        weights = self._example_weights(selection.state)
        return {keys.GROUP: self.group, keys.GROUP_WEIGHTS: Vector(weights)}

    def ask(self, selection: Selection) -> Mapping[str, bool | Sequence[bool]]:
        """Ask for each group's losses, or for the client's loss."""
        if self.group:
            return {keys.GROUP_COUNTS: True, keys.GROUP_LOSSES: True}
        return {keys.LOSS_BEFORE: True}

    def admit(self, report: Report) -> None:
        """Reject losses below 0, and what is not of so many groups."""
        if not self.group:
            check_not_negative(report.metrics, keys.LOSS_BEFORE)
            return
        for name in (keys.GROUP_COUNTS, keys.GROUP_LOSSES):
            given = report.profile.get(name)
            if not isinstance(given, list) or len(given) != self.num_groups:
                raise AggregationError(
                    f"its '{name}' must be {self.num_groups} numbers, one a group, "
                    f"got {shown(given)}"
                )
            if min(given) < 0:
                raise AggregationError(f"its '{name}' are below 0: {min(given):.4g}")
        counts = report.profile[keys.GROUP_COUNTS]
        if sum(counts) != report.metrics.get(keys.NUM_EXAMPLES):
            raise AggregationError(
                f"its '{keys.GROUP_COUNTS}' are {sum(counts):g} examples, and it has "
                f"{shown(report.metrics.get(keys.NUM_EXAMPLES))}"
            )

    def weights(self, round: Round) -> tuple[Tensor, dict[str, Any]]:
        """Return the clients' shares; the groups' next weights are remembered."""
        return self._of_groups(round) if self.group else self._of_clients(round)

    def _of_clients(self, round: Round) -> tuple[Tensor, dict[str, Any]]:
        known = round.state["logs"]
        before = _column([known.get(client, 0.0) for client in round.clients])
        loss = round.metric(keys.LOSS_BEFORE)
        after = before + self._rise(loss, round.num_examples)
        new = dict(zip(round.clients, after.tolist(), strict=True))
        q = after.softmax(0)
        round.log("q", q)
        return q, {**round.state, "logs": {**known, **new}}

    def _of_groups(self, round: Round) -> tuple[Tensor, dict[str, Any]]:
        sums = round.profile(keys.GROUP_LOSSES).sum(0)
        counts = round.profile(keys.GROUP_COUNTS)
        here = counts.sum(0)
        # What the clients' examples counted is what their updates count.
        own = counts @ self._example_weights(round.state)
        loss = sums / here.clamp(min=1)
        known = self._logs(round.state)
        rise = self._rise(loss, _column(round.state["counts"]))
        after = known + torch.where(here > 0, rise, 0)
        q = self._distribution(known, round.state)
        for g in range(min(len(q), MOST_LOGGED)):
            round.log(f"group-{g}-q", float(q[g]))
            if here[g] > 0:
                round.log(f"group-{g}-loss", float(loss[g]))
        logs = dict(enumerate(after.tolist()))
        return normalise(own, round.size_weights), {**round.state, "logs": logs}

    def _rise(self, loss: Tensor, examples: Tensor) -> Tensor:
        adjusted = loss + self.adjustment / examples.clamp(min=1).sqrt()
        return (self.step * adjusted).clamp(max=LARGEST_RISE)

    def _logs(self, state: Mapping[str, Any]) -> Tensor:
        known = state["logs"]
        return _column([known.get(g, 0.0) for g in range(self.num_groups or 0)])

    def _distribution(self, logs: Tensor, state: Mapping[str, Any]) -> Tensor:
        """Return ``q``, ``[G]``: 0 of a group that nobody has."""
        somebody = _column(state["counts"]) > 0
        return torch.where(somebody, logs, -torch.inf).softmax(0)

    def _example_weights(self, state: Mapping[str, Any]) -> Tensor:
        """Return what an example of each group counts, ``[G]``; 1 on average."""
        counts = _column(state["counts"])
        q = self._distribution(self._logs(state), state)
        return counts.sum() * q / counts.clamp(min=1)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@checked_fields
@dataclass(frozen=True, eq=False)
class GroupWeighted(Around):
    """Another objective's losses, weighed as the strategy tells for their groups.

    The client's half of :class:`GlobalGroupDRO`: the mean of a batch's losses, each
    times its group's weight, scaled to a mean weight of 1.

    Parameters
    ----------
    group : str
        The attribute of the examples that says which group each is in.
    inner : Objective
        The other objective, a mean of examples' losses; also by its name, or as a table
        of ``name`` and options.
    """

    group: str = ""
    inner: NamedObjective = field(default_factory=Plain)

    def __post_init__(self) -> None:
        """Refuse an objective that is no mean of examples' losses."""
        check_mean(self.inner)

    @property
    def wants(self) -> frozenset[Fact]:  # type: ignore[override]
        """What the other one wants, and groups."""
        return frozenset({"groups", *self.inner.wants})

    @property
    def hears(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the other one hears, and the groups' weights."""
        return (*self.inner.hears, keys.GROUP_WEIGHTS)

    def unheard(self, x: Tensor, facts: Facts) -> Mapping[str, Tensor]:
        """Return weights between 1 and 2 that grow from group to group."""
        weights = 1 + facts.group_counts.cumsum(0) / facts.group_counts.sum()
        return {**self.inner.unheard(x, facts), keys.GROUP_WEIGHTS: weights}

    def batch_loss(self, outputs: Tensor, batch: Batch, facts: Facts) -> Tensor:
        """Return the weighed mean of the other one's losses."""
        assert batch.groups is not None
        of_group, number = facts.told(keys.GROUP_WEIGHTS), facts.group_counts.shape[0]
        if of_group.shape != facts.group_counts.shape:
            raise ClientError(
                f"the server tells {len(of_group)} weights, and '{self.group}' has "
                f"{number} groups here."
            )
        weights = of_group.gather(0, batch.groups)
        losses = self.inner.example_losses(outputs, batch, facts)
        return batch.mean(losses, weights)
