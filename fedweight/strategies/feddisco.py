"""FedDisco: a client counts less the more its label mix differs from the target's.

Rui Ye et al., "FedDisco: Federated Learning with Discrepancy-Aware Collaboration",
ICML 2023. The weights are the paper's discrepancy-aware aggregation weights,
``ReLU(p_k - a d_k + b)`` made to sum to one; the discrepancies d follow the authors'
code, and so does that only the Kullback-Leibler one is rescaled over the cohort.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..core.errors import AggregationError, ConfigurationError
from ..core.options import GIVEN
from ..core.texts import shown
from ..messages import keys
from ..server.reported import as_number
from .base import WeightingStrategy
from .round import Report, Round, Selection
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

    Notes
    -----
    Label counts do not change, so each client is asked for them until it has given
    them once, and not again. Counts of another length than C reject the reply.
    """

    request = (keys.LABEL_COUNTS,)

    metric: Metric = "kl"
    a: Annotated[float, Field(ge=0)] = 0.5
    b: Annotated[float, Field(ge=0)] = 0.1
    target: Sequence[float] | None = None
    scale_with_cohort: bool = False
    num_classes: Annotated[Annotated[int, Field(ge=1)] | None, GIVEN] = None

    def __post_init__(self) -> None:
        """Refuse a target that is no distribution."""
        super().__post_init__()
        self._target()

    def _target(self) -> Tensor | None:
        return None if self.target is None else _distribution(self.target, self.metric)

    def begin(self) -> dict[int, list[float]]:
        """Know nobody's label counts."""
        return {}

    def ask(self, selection: Selection) -> Mapping[str, bool | Sequence[bool]]:
        """Ask for label counts where they are not known yet."""
        unknown = [client not in selection.state for client in selection.clients]
        return {keys.LABEL_COUNTS: unknown}

    def admit(self, report: Report) -> None:
        """Reject label counts that are none."""
        if keys.LABEL_COUNTS not in report.profile:
            return  # They were not asked for.
        counts = report.profile[keys.LABEL_COUNTS]
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

    def screen(self, reports: Sequence[Report], state: Any) -> Mapping[int, str]:
        """Reject counts of another length than most clients', if C was not told."""
        if self.num_classes is not None or self.target is not None:
            return {}
        counts = _joined(state, ((r.client, r.profile) for r in reports))
        lengths = Counter(map(len, counts.values()))
        if len(lengths) <= 1:
            return {}
        (classes, most), (other, next_most) = lengths.most_common(2)
        if most == next_most:
            few, many = sorted([classes, other])
            why = f"as many clients count {few} classes as {many}"
            why += "; tell FedDisco num_classes"
            return dict.fromkeys((report.client for report in reports), why)
        own = {report.client: len(counts[report.client]) for report in reports}
        return {c: self._odd(n, classes) for c, n in own.items() if n != classes}

    @staticmethod
    def _odd(entries: int, classes: int) -> str:
        return f"its '{keys.LABEL_COUNTS}' has {entries} entries for {classes} classes"

    def weights(self, round: Round) -> tuple[Tensor, dict[int, list[float]]]:
        """Return ``ReLU(p - a d + b)``, made to sum to one."""
        known = _joined(round.state, zip(round.clients, round.profiles, strict=True))
        counts = torch.tensor(
            [known[client] for client in round.clients], dtype=torch.float64
        )
        d = discrepancy(counts, self.metric, self._target())
        round.log("discrepancy", d)
        scale = REFERENCE_COHORT / round.num_clients if self.scale_with_cohort else 1.0
        a = self.a if self.metric == "kl" else self.a * scale
        p = round.size_weights
        return normalise(p - a * d + self.b * scale, p), known


def _joined(
    known: Mapping[int, list[float]],
    reported: Iterable[tuple[int, Mapping[str, Any]]],
) -> dict[int, list[float]]:
    """Return the known label counts by client, and those of who is new."""
    new = {
        client: [float(n) for n in profile[keys.LABEL_COUNTS]]
        for client, profile in reported
        if client not in known and keys.LABEL_COUNTS in profile
    }
    return {**known, **new}


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
