"""IDA: a client counts by how near its model is to the cohort's mean.

Yousef Yeganeh et al., "Inverse Distance Aggregation for Federated Learning with
Non-IID Data", DART workshop at MICCAI 2020. No official code was found: the formulas
are ours, from knowledge of the paper and unverified, so what is unsure is a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..core.errors import AggregationError
from ..messages import keys
from ..server.admission import check_fraction
from .base import WeightingStrategy
from .round import Report, Round, Selection

# Such an epsilon only stands in for distances of 0; a larger one is part of the rule.
NEGLIGIBLE = 1e-8


class IDA(WeightingStrategy):
    """Weigh clients by the inverse distance of their model from the mean.

    ``weight_k`` is proportional to ``1 / (||mean - w_k|| + epsilon)``, times ``n_k``
    with ``fedavg``, times ``1 / max(floor, accuracy_k)`` with ``intrac``.

    Parameters
    ----------
    distance : {"l1", "l2"}
        The norm, over trainable parameters only.
    base : {"uniform", "sample", "previous"}
        What the distance is measured from: the clients' mean, their mean by data
        size (by which a claim of much data takes all weight), or the global model
        they started from (which favours clients that took few steps).
    fedavg : bool
        Also weigh by data size (the paper's IDA + FedAvg).
    intrac : bool
        Also weigh by inverse training accuracy: what a client already fits counts
        less. Asks the clients for the accuracy on their own training data.
    intrac_floor : "clients" or float
        Accuracies below it count as it; in (0, 1]. ``"clients"`` is 1 / K; the chance
        level, one over the number of classes, is the sensible alternative.
    per_tensor : bool
        Distances and weights for each named tensor on its own. The weight log then
        holds a client's mean over the tensors.
    epsilon : float
        0 or more; large values make the weights uniform. Up to its default it only
        keeps a distance of 0 from an infinite weight: where one is as good as 0 (up
        to ``epsilon`` times the largest), 1e-8 of the mean distance takes its place.

    Notes
    -----
    Two clients are equally far from their mean, so with ``base="uniform"`` the method
    needs three or more to say anything. If all distances are 0 they count alike.
    """

    distance: Literal["l1", "l2"] = "l1"
    base: Literal["uniform", "sample", "previous"] = "uniform"
    fedavg: bool = False
    intrac: bool = False
    intrac_floor: Annotated[float, Field(gt=0, le=1)] | Literal["clients"] = "clients"
    per_tensor: bool = False
    epsilon: Annotated[float, Field(ge=0)] = 1e-8

    @property
    def of_scores(self) -> bool:
        """Whether accuracies count."""
        return self.intrac

    def ask(self, selection: Selection) -> Mapping[str, bool | Sequence[bool]]:
        """Ask for the training accuracy where it counts."""
        return {keys.ACCURACY_AFTER: self.intrac}

    def admit(self, report: Report) -> None:
        """Reject an accuracy outside [0, 1]."""
        if self.intrac:
            check_fraction(report.metrics, keys.ACCURACY_AFTER)

    def weights(self, round: Round) -> Tensor:
        """Return the product of the factors, made to sum to one; per tensor if so."""
        distances = self._distances(round)
        if not distances.isfinite().all():
            raise AggregationError("the updates are too large to measure")
        if distances.ndim == 1:
            round.log("distance", distances)
        if round.num_clients <= 2 and self.base == "uniform":
            distances = torch.zeros_like(distances)  # equal, but for rounding
        raw = inverse(distances, self.epsilon)
        factor = torch.ones(round.num_clients, dtype=torch.float64)
        if self.fedavg:
            factor = factor * round.size_weights
        if self.intrac:
            floor = self.intrac_floor
            least = 1 / round.num_clients if floor == "clients" else float(floor)
            factor = factor / round.metric(keys.ACCURACY_AFTER).clamp(min=least)
        raw = raw * (factor if raw.ndim == 1 else factor[:, None])
        return raw / raw.sum(0)

    def _distances(self, round: Round) -> Tensor:
        weights = None
        if self.base == "uniform":
            k = round.num_clients
            weights = torch.full((k,), 1 / k, dtype=torch.float64)
        elif self.base == "sample":
            weights = round.size_weights
        distances = round.updates.distances(
            weights=weights,
            order=1 if self.distance == "l1" else 2,
            per_tensor=self.per_tensor,
        )
        # Of equal models only the rounding of their mean would be measured.
        return torch.where(distances > self._rounding(round), distances, 0.0)

    def _rounding(self, round: Round) -> Tensor:
        """Return how far rounding may move a mean of models, as distances are."""
        order = 1 if self.distance == "l1" else 2
        places = round.updates.offsets if self.per_tensor else (0, None)
        start = round.model.parameters.double()
        lengths = [
            torch.linalg.vector_norm(start[first:last], order)
            for first, last in pairwise(places)
        ]
        rounding = torch.stack(lengths) * 4 * torch.finfo(round.updates.dtype).eps
        return rounding if self.per_tensor else rounding[0]


def inverse(distances: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Return ``1 / (distances + epsilon)`` along the first axis, 1 for the nearest.

    Parameters
    ----------
    distances : Tensor
        Shape ``[K]`` or ``[K, T]``, 0 or more.
    epsilon : float
        0 or more; see :class:`IDA`.

    Examples
    --------
    >>> inverse(torch.tensor([1.0, 2.0, 4.0]), epsilon=0).tolist()
    [1.0, 0.5, 0.25]
    >>> inverse(torch.zeros(3)).tolist()
    [1.0, 1.0, 1.0]
    """
    distances = distances.double()
    largest = distances.amax(0)
    # Relative to the largest, so that nothing overflows; below the smallest normal
    # number there is nothing to tell apart.
    apart = largest >= torch.finfo(torch.float64).tiny
    scale = torch.where(apart, largest, 1.0)
    relative = distances / scale
    added = (epsilon / scale).clamp(max=1e300)
    if epsilon <= NEGLIGIBLE:
        nothing = (relative <= epsilon).any(0)
        added = torch.where(nothing, NEGLIGIBLE * relative.mean(0), added)
    nearest = relative.amin(0) + added
    return torch.where(apart, nearest / (relative + added), 1.0)
