"""FedDisco: a client counts less the more its label mix differs from the target's.

Rui Ye et al., "FedDisco: Federated Learning with Discrepancy-Aware Collaboration",
ICML 2023. The weights are the paper's discrepancy-aware aggregation weights,
``ReLU(p_k - a d_k + b)`` made to sum to one; the discrepancies d follow the authors'
code, and so does that only the Kullback-Leibler one is rescaled over the cohort.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from ..core.errors import (
    AggregationError,
    ConfigurationError,
    check_choice,
    check_range,
)
from ..core.texts import shown
from ..messages import keys
from ..server.reported import as_number
from .base import StrategyArguments, WeightingStrategy
from .round import Round
from .weights import normalise

Metric = Literal["kl", "l2", "l1", "cosine"]

# More examples of a class than this are not believed.
MOST_EXAMPLES = 1e15

# How many clients took part where the authors tuned a and b.
REFERENCE_COHORT = 10


class FedDisco(WeightingStrategy):
    """Weigh clients by data size, less a discrepancy of their labels.

    With ``p_k`` the share of the cohort's examples and ``d_k`` the discrepancy of
    client k's label distribution from the target, ``weight_k`` is proportional to
    ``max(p_k - a * d_k + b, 0)``. Where that is 0 for all, the weights are ``p``, and
    the log says so.

    Parameters
    ----------
    metric : {"kl", "l2", "l1", "cosine"}
        The discrepancy. ``kl`` is divided by its sum over the round's clients, so it
        depends on who else takes part; the others stand as they are.
    a : float
        0 or more; what a discrepancy costs. ``a = b = 0`` is FedAvg.
    b : float
        0 or more; what everybody gets. Large values make the weights uniform.
    target : sequence of float, optional
        Shape ``[C]``; the label distribution to aim at, uniform by default. It is
        made to sum to one; for ``kl`` every entry must be above 0.
    scale_with_cohort : bool
        ``a = 0.5`` and ``b = 0.1`` were tuned where 10 clients took part. True
        multiplies ``b`` by ``10 / K``, and ``a`` too unless the metric is ``kl``,
        whose rescaled values shrink with K on their own.
    num_classes : int, optional
        C, 1 or more, if there is no target; by default what most clients say. A run of
        this library tells it.
    **arguments
        Those of :class:`~fedweight.strategies.base.WeightingStrategy`.

    Notes
    -----
    Label counts do not change, so each client is asked for them until it has given
    them once, and not again. Counts of another length than C reject the reply.
    """

    request = (keys.LABEL_COUNTS,)

    def __init__(
        self,
        metric: Metric = "kl",
        a: float = 0.5,
        b: float = 0.1,
        target: Sequence[float] | None = None,
        scale_with_cohort: bool = False,
        num_classes: int | None = None,
        **arguments: Unpack[StrategyArguments],
    ) -> None:
        super().__init__(**arguments)
        check_choice("metric", metric, ["kl", "l2", "l1", "cosine"])
        check_range("a", a, 0, high_open=True)
        check_range("b", b, 0, high_open=True)
        self.metric: Metric = metric
        self.a = a
        self.b = b
        self.target = None if target is None else _distribution(target, metric)
        self.scale_with_cohort = scale_with_cohort
        if num_classes is not None:
            check_range("num_classes", num_classes, 1)
        self.num_classes = num_classes
        self.label_counts: dict[int, list[float]] = {}

    def asks(self, round: int, client: int) -> tuple[str, ...]:
        """Ask for label counts where they are not known yet."""
        return () if client in self.label_counts else self.request

    def receive(
        self, client: int, metrics: Mapping[str, Any], profile: Mapping[str, Any]
    ) -> None:
        """Remember a client's label counts; reject what is none."""
        if client in self.label_counts:
            return
        counts = profile.get(keys.LABEL_COUNTS)
        numbers = [as_number(n) for n in counts] if isinstance(counts, list) else []
        usable = [n for n in numbers if n is not None and 0 <= n <= MOST_EXAMPLES]
        if not usable or len(usable) < len(numbers) or not any(usable):
            raise AggregationError(
                f"its '{keys.LABEL_COUNTS}' must be a list of numbers of 0 or more, "
                f"one of them above 0, got {shown(counts)}"
            )
        classes = self.num_classes if self.target is None else len(self.target)
        if classes is not None and len(usable) != classes:
            raise AggregationError(self._odd(len(usable), classes))
        self.label_counts[client] = usable

    def screen(self, clients: Sequence[int]) -> Mapping[int, str]:
        """Reject counts of another length than most clients', if C was not told."""
        if self.num_classes is not None or self.target is not None:
            return {}
        lengths = Counter(map(len, self.label_counts.values()))
        if len(lengths) <= 1:
            return {}
        (classes, most), (other, next_most) = lengths.most_common(2)
        if most == next_most:
            few, many = sorted([classes, other])
            why = f"as many clients count {few} classes as {many}"
            why += "; tell FedDisco num_classes"
            odd = dict.fromkeys(clients, why)
        else:
            counts = {c: len(self.label_counts[c]) for c in clients}
            odd = {c: self._odd(n, classes) for c, n in counts.items() if n != classes}
        for client in odd:
            del self.label_counts[client]
        return odd

    @staticmethod
    def _odd(entries: int, classes: int) -> str:
        return f"its '{keys.LABEL_COUNTS}' has {entries} entries for {classes} classes"

    def weights(self, round: Round) -> Tensor:
        """Return ``ReLU(p - a d + b)``, made to sum to one."""
        counts = torch.tensor(
            [self.label_counts[client] for client in round.clients],
            dtype=torch.float64,
        )
        d = discrepancy(counts, self.metric, self.target)
        round.log("discrepancy", d)
        scale = REFERENCE_COHORT / round.num_clients if self.scale_with_cohort else 1.0
        a = self.a if self.metric == "kl" else self.a * scale
        p = round.size_weights
        return normalise(p - a * d + self.b * scale, p)

    def state(self) -> dict[str, Any]:
        """Return the label counts by client."""
        return {
            **super().state(),
            "clients": list(self.label_counts),
            "label-counts": list(self.label_counts.values()),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        super().load_state(state)
        pairs = zip(state["clients"], state["label-counts"], strict=True)
        self.label_counts = {int(client): list(counts) for client, counts in pairs}


def discrepancy(
    counts: Tensor, metric: Metric = "kl", target: Tensor | None = None
) -> Tensor:
    """Return how far each client's labels are from the target, ``[K]``.

    Parameters
    ----------
    counts : Tensor
        Shape ``[K, C]``; how many examples of each class a client has. A client that
        has none gets the largest discrepancy of the others.
    metric : {"kl", "l2", "l1", "cosine"}
        ``kl`` is divided by its sum over the clients.
    target : Tensor, optional
        Shape ``[C]``, sums to one; uniform by default.

    Examples
    --------
    >>> discrepancy(torch.tensor([[5.0, 5.0], [10.0, 0.0]]), "l1").tolist()
    [0.0, 1.0]
    """
    counts = counts.double()
    totals = counts.sum(1, keepdim=True)
    own = counts / totals.clamp(min=1e-300)
    if target is None:
        target = torch.full_like(own[0], 1 / own.shape[1])
    if metric == "kl":
        ratio = (own / target).clamp(min=1e-300)  # 0 * log 0 is 0
        d = (own * ratio.log()).sum(1).clamp(min=0)
    elif metric == "l2":
        d = (own - target).norm(dim=1)
    elif metric == "l1":
        d = (own - target).abs().sum(1)
    else:
        d = (1 - torch.cosine_similarity(own, target[None], dim=1)).clamp(min=0)
    empty = totals[:, 0] == 0
    if empty.any():
        d[empty] = 0.0
        d[empty] = d.max()
    total = d.sum()
    return d / total if metric == "kl" and total > 0 else d


def _distribution(target: Sequence[float], metric: Metric) -> Tensor:
    values = torch.as_tensor(target, dtype=torch.float64)
    smallest = float(values.min()) if values.numel() else math.nan
    if values.ndim != 1 or not values.isfinite().all() or not smallest >= 0:
        raise ConfigurationError(
            f"target must be a list of finite numbers of 0 or more, one a class, got "
            f"{target!r}."
        )
    if values.sum() <= 0 or (metric == "kl" and smallest == 0):
        raise ConfigurationError(
            f"target must be above 0 {'everywhere' if metric == 'kl' else 'somewhere'} "
            f"for metric {metric!r}, got {target!r}."
        )
    return values / values.sum()
