"""How much each client adds to what a set of clients is worth together.

What a set of clients is worth is a function of the user's, such as the accuracy of a
model that these clients alone trained; it is called the *value*. It is asked once for
each set. How often it will be asked at most, :func:`contribution_cost` says beforehand.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

import numpy as np

from ..core.errors import ConfigurationError, check_choice
from ..core.rng import Purpose, generator
from ..core.texts import shown
from .spread import Values, vector

log = logging.getLogger("fedweight")

Value = Callable[[frozenset[int]], float]
Method = Literal["leave-one-out", "shapley"]

# Without a number of permutations Shapley values are exact, up to so many clients:
# 1024 sets.
MOST_EXACT = 10

# Sums of values up to here do not overflow.
LARGEST = 1e150


@dataclass(frozen=True)
class Contribution:
    """What each client contributes.

    Attributes
    ----------
    values : dict[int, float]
        By client, in the value's unit; may be negative.
    errors : dict[int, float]
        By client, the standard error of its value: 0 where it is exact, NaN where one
        permutation was drawn, which tells nothing of it.
    evaluations : int
        For how many sets of clients the value was asked.
    """

    values: dict[int, float]
    errors: dict[int, float]
    evaluations: int


def contribution_cost(
    clients: int, method: Method = "shapley", permutations: int | None = None
) -> int:
    """Return for how many sets of clients the value is asked, before it is.

    Parameters
    ----------
    clients : int
        N, 1 or more.
    method : {"leave-one-out", "shapley"}
        What is to be computed.
    permutations : int, optional
        As for :func:`shapley`.

    Returns
    -------
    int
        Exactly so many for ``leave-one-out`` (``N + 1``) and for exact Shapley values
        (``2^N``). With permutations at most so many, ``2 + permutations * (N - 1)``:
        fewer where one is truncated, or begins as another one does.

    Examples
    --------
    >>> contribution_cost(20, "leave-one-out"), contribution_cost(8)
    (21, 256)
    >>> contribution_cost(20, permutations=100)
    1902
    """
    check_choice("method", method, ["leave-one-out", "shapley"])
    clients = _whole("clients", clients, 1)
    if method == "leave-one-out":
        return clients + 1
    if _is_exact(clients, permutations):
        return 1 << clients
    assert permutations is not None
    return 2 + permutations * (clients - 1)


def leave_one_out(clients: Iterable[int], value: Value) -> Contribution:
    """Return what is lost without each client: ``v(N) - v(N without i)``.

    Parameters
    ----------
    clients : Iterable[int]
        Their numbers, each once; 1 or more.
    value : Callable[[frozenset[int]], float]
        What a set of clients is worth, finite; asked ``N + 1`` times.

    Returns
    -------
    Contribution
        0 for a client without which nothing changes. That says little of what it
        holds: of two clients with the same data each has 0, as the other one is there.
        The values do not sum to what all are worth.

    References
    ----------
    R. D. Cook, "Detection of Influential Observation in Linear Regression",
    Technometrics 1977; as a baseline of data valuation in A. Ghorbani, J. Zou, "Data
    Shapley: Equitable Valuation of Data for Machine Learning", ICML 2019.

    Examples
    --------
    >>> leave_one_out([0, 1, 2], lambda some: min(len(some), 2)).values
    {0: 0.0, 1: 0.0, 2: 0.0}
    """
    everybody = _numbers(clients)
    _tell_cost(len(everybody), "leave-one-out", None)
    worth = _Worth(value)
    whole = worth(everybody)
    values = {
        client: whole - worth([one for one in everybody if one != client])
        for client in everybody
    }
    return Contribution(values, dict.fromkeys(everybody, 0.0), worth.asked)


def shapley(
    clients: Iterable[int],
    value: Value,
    permutations: int | None = None,
    *,
    tolerance: float = 0.0,
    seed: int = 0,
) -> Contribution:
    """Return the clients' Shapley values, exactly or by sampling permutations.

    Client i's is the mean, over all orders in which the clients could join, of what it
    adds to those who joined before it, ``v(S and i) - v(S)``. It is the only division
    of ``v(N) - v(nobody)`` that gives all of it away, the same to clients that add the
    same, nothing to one that never adds anything, and the sum of both for the sum of
    two values.

    Parameters
    ----------
    clients : Iterable[int]
        Their numbers, each once; 1 or more. Their order does not matter.
    value : Callable[[frozenset[int]], float]
        What a set of clients is worth, finite; also of nobody, the empty set. It is
        asked once for a set.
    permutations : int, optional
        1 or more orders are drawn. By default, and where that asks for no more sets,
        all ``2^N`` sets are asked for and the result is exact; without a number there
        may be 10 clients at most.
    tolerance : float
        0 or more, in the value's unit: where those who joined are worth as much as all
        are, but for less than this, the rest of that order counts as adding nothing,
        and is not asked for (truncated Monte Carlo). 0 truncates nothing. Of exact
        values it is not used.
    seed : int
        0 or more; draws the orders. More permutations with the same seed begin with the
        same ones.

    Returns
    -------
    Contribution
        The values sum to ``v(N) - v(nobody)``, with a tolerance to within it. Standard
        errors are of the sampling alone: they know neither of the truncation, which
        takes away up to the tolerance, nor of a value that is itself noisy.

    References
    ----------
    L. S. Shapley, "A Value for n-Person Games", Contributions to the Theory of Games
    II, 1953. Sampling: J. Castro, D. Gomez, J. Tejada, "Polynomial Calculation of the
    Shapley Value Based on Sampling", Computers & Operations Research 2009. Truncation:
    A. Ghorbani, J. Zou, "Data Shapley", ICML 2019, Algorithm 1; theirs compares with a
    share of the error of bootstrapping, here it is a number that the user says.

    Examples
    --------
    Of three clients two are needed, and client 0 must be one of them.

    >>> found = shapley(range(3), lambda some: 0 in some and len(some) > 1)
    >>> {client: round(value, 4) for client, value in found.values.items()}
    {0: 0.6667, 1: 0.1667, 2: 0.1667}
    >>> found.evaluations
    8
    """
    everybody = _numbers(clients)
    number: Any = tolerance
    if not isinstance(number, int | float) or not 0 <= number < math.inf:
        raise ConfigurationError(
            f"tolerance must be a number of 0 or more, got {shown(tolerance)}."
        )
    seed = _whole("seed", seed, 0)
    if permutations is not None:
        permutations = _whole("permutations", permutations, 1)
    _tell_cost(len(everybody), "shapley", permutations)
    worth = _Worth(value)
    if _is_exact(len(everybody), permutations):
        values = _exact(everybody, worth)
        return Contribution(values, dict.fromkeys(everybody, 0.0), worth.asked)
    assert permutations is not None
    added = np.zeros((permutations, len(everybody)))
    whole, nobody = worth(everybody), worth([])
    for number in range(permutations):
        # The round of the stream's name numbers the orders.
        stream = generator(seed, Purpose.CONTRIBUTION, number)
        order = stream.permutation(len(everybody)).tolist()
        before, joined = nobody, list[int]()
        for place in order:
            if abs(whole - before) < tolerance:
                break
            joined.append(everybody[place])
            after = worth(joined)
            added[number, place] = after - before
            before = after
    n = len(everybody)
    means = [math.fsum(added[:, place]) / permutations for place in range(n)]
    deviations = added.std(0, ddof=1) if permutations > 1 else np.full(n, math.nan)
    errors = (deviations / math.sqrt(permutations)).tolist()
    return Contribution(
        dict(zip(everybody, means, strict=True)),
        dict(zip(everybody, errors, strict=True)),
        worth.asked,
    )


def collaborative_fairness(contributions: Values, rewards: Values) -> float:
    """Return how far rewards follow contributions: Pearson's correlation.

    Parameters
    ----------
    contributions : Iterable[float]
        One a client: its Shapley value, or the accuracy that it reaches alone.
    rewards : Iterable[float]
        What each client gets, in the same order: the accuracy of its model on its own
        data, or how often it was given the global model. A client of which either is
        NaN is left out.

    Returns
    -------
    float
        In [-1, 1]. 1: rewards are a rising straight line of contributions; 0: they do
        not go together in a line; -1: who contributes more gets less, in a line. NaN
        where there is no such number: with fewer than two clients, or where all
        contribute or get the same. So it says nothing of a method that gives every
        client one and the same model and measures it on the same data.

    References
    ----------
    L. Lyu, X. Xu, Q. Wang, H. Yu, "Collaborative Fairness in Federated Learning",
    Federated Learning, Springer 2020, where it is multiplied by 100.

    Examples
    --------
    >>> round(collaborative_fairness([0.1, 0.2, 0.3], [0.7, 0.8, 0.9]), 12)
    1.0
    >>> collaborative_fairness([0.1, 0.2], [0.8, 0.8])
    nan
    """
    x, y = vector("contributions", contributions), vector("rewards", rewards)
    if len(x) != len(y):
        raise ConfigurationError(
            f"rewards must be as many as contributions, {len(x)}, got {len(y)}. Give "
            "one a client."
        )
    known = ~(np.isnan(x) | np.isnan(y))
    x, y = x[known], y[known]
    for name, values in (("contributions", x), ("rewards", y)):
        if not np.isfinite(values).all():
            raise ConfigurationError(f"{name} must be finite, or NaN for a client.")
    # Before a mean is taken away, which may leave a rounding error of equal numbers.
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    x, y = (z / np.abs(z).max() for z in (x - x.mean(), y - y.mean()))
    found = float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
    return min(max(found, -1.0), 1.0)


@dataclass
class _Worth:
    """A value that is asked once for each set, and checked."""

    value: Value
    known: dict[frozenset[int], float] = field(default_factory=dict)

    def __call__(self, clients: Collection[int]) -> float:
        some = frozenset(clients)
        if some not in self.known:
            given = self.value(some)
            try:
                worth = float(given)
            except (TypeError, ValueError, OverflowError):
                worth = math.nan
            if not abs(worth) <= LARGEST:
                raise ConfigurationError(
                    f"the value of clients {shown(sorted(some))} must be a finite "
                    f"number of at most {LARGEST:g}, got {shown(given)}."
                )
            self.known[some] = worth
        return self.known[some]

    @property
    def asked(self) -> int:
        """For how many sets it was asked."""
        return len(self.known)


def _exact(everybody: list[int], worth: _Worth) -> dict[int, float]:
    """Return Shapley values by their definition over sets."""
    n = len(everybody)
    terms: dict[int, list[float]] = {client: [] for client in everybody}
    for size in range(n):
        share = 1 / (n * math.comb(n - 1, size))
        for some in combinations(everybody, size):
            before = worth(some)
            for client in everybody:
                if client not in some:
                    terms[client].append(share * (worth([*some, client]) - before))
    return {client: math.fsum(several) for client, several in terms.items()}


def _is_exact(clients: int, permutations: int | None) -> bool:
    """Tell whether all sets are asked for; check the number of permutations."""
    if permutations is None:
        if clients > MOST_EXACT:
            raise ConfigurationError(
                f"permutations must be said for more than {MOST_EXACT} clients, got "
                f"{clients} of them: exact Shapley values would ask for 2^{clients} "
                "sets. 'fedweight.metrics.contribution_cost' says what a number costs."
            )
        return True
    permutations = _whole("permutations", permutations, 1)
    return 1 << clients <= 2 + permutations * (clients - 1)


def _tell_cost(clients: int, method: Method, permutations: int | None) -> None:
    cost = contribution_cost(clients, method, permutations)
    log.info("%s of %d clients: the value of %d sets at most", method, clients, cost)


def _numbers(clients: Iterable[int]) -> list[int]:
    given: Any = clients
    try:
        numbers = sorted(map(operator.index, given))
    except TypeError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers):
        raise ConfigurationError(
            "clients must be one or more whole numbers, each of them once, got "
            f"{shown(given)}."
        )
    return numbers


def _whole(name: str, given: Any, least: int) -> int:
    """Return a whole number of Python's or NumPy's."""
    number = -1 if isinstance(given, bool) or not hasattr(given, "__index__") else given
    if operator.index(number) < least:
        raise ConfigurationError(
            f"{name} must be a whole number from {least}, got {shown(given)}."
        )
    return operator.index(number)
