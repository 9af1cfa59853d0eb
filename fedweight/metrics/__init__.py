"""What is measured: sums over examples, how clients are served, what each contributes.

A task says what a model's outputs mean; :class:`Statistics` adds up what is measured of
them. The summaries over clients are of one value a client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.lazy import lazy_exports
from ..data.tasks import TASKS, LearningTask, task_named
from .contribution import (
    Contribution,
    collaborative_fairness,
    contribution_cost,
    leave_one_out,
    shapley,
)
from .spread import (
    best10,
    client_spread,
    deviation,
    entropy,
    gini,
    jain,
    mean,
    minimum,
    spread_measures,
    uniform_cosine,
    variance,
    worst10,
)

if TYPE_CHECKING:
    from .additive import Statistics
    from .groups import Groups, equity_scaled
    from .sums import Sums

__all__ = [
    "TASKS",
    "Contribution",
    "Groups",
    "LearningTask",
    "Statistics",
    "Sums",
    "best10",
    "client_spread",
    "collaborative_fairness",
    "contribution_cost",
    "deviation",
    "entropy",
    "equity_scaled",
    "gini",
    "jain",
    "leave_one_out",
    "mean",
    "minimum",
    "shapley",
    "spread_measures",
    "task_named",
    "uniform_cosine",
    "variance",
    "worst10",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Statistics": ".additive",
        "Groups": ".groups",
        "equity_scaled": ".groups",
        "Sums": ".sums",
    },
)
