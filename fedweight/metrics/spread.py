"""How a measure, such as accuracy, is spread over clients.

All are functions of one value a client. NaN stands for a client that has none: it is
left out, with its size, and where nobody is left the result is NaN. The order of the
clients does not matter, not even to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ..core.errors import ConfigurationError
from ..core.texts import shown

Values = Iterable[float]
_Array = npt.NDArray[np.float64]


def mean(values: Values, sizes: Values | None = None) -> float:
    """Return the mean over clients.

    Parameters
    ----------
    values : Iterable[float]
        One a client.
    sizes : Iterable[float], optional
        How much each client counts, 0 or more, such as its number of examples. Without
        them every client counts once.

    Returns
    -------
    float
        Between the least and the greatest value; NaN also where all sizes are 0.

    Examples
    --------
    >>> mean([0.5, 1.0]), mean([0.5, 1.0], sizes=[3, 1])
    (0.75, 0.625)
    """
    return _mean(*_known(values, sizes))


def variance(values: Values, sizes: Values | None = None) -> float:
    """Return the mean squared difference from the mean, over clients.

    It is the population's: the clients are all that there are, so its divisor is K (or
    the sum of the sizes), not K - 1.

    Parameters
    ----------
    values : Iterable[float]
        One a client.
    sizes : Iterable[float], optional
        How much each client counts, as :func:`mean` takes them; then the mean, too, is
        the weighted one.

    Returns
    -------
    float
        0 where all clients have the same value; of accuracies at most 1/4, where half
        of them have 0 and half 1.

    References
    ----------
    As a measure of fairness in federated learning: T. Li, M. Sanjabi, A. Beirami,
    V. Smith, "Fair Resource Allocation in Federated Learning", ICLR 2020.

    Examples
    --------
    >>> variance([0.0, 1.0]), variance([0.5, 0.5, 0.5])
    (0.25, 0.0)
    """
    known, weights = _known(values, sizes)
    if weights is None:
        return float(known.var()) if len(known) else math.nan
    return _mean((known - _mean(known, weights)) ** 2, weights)


def deviation(values: Values, sizes: Values | None = None) -> float:
    """Return the standard deviation over clients, the root of :func:`variance`.

    Parameters
    ----------
    values : Iterable[float]
        One a client.
    sizes : Iterable[float], optional
        How much each client counts, as :func:`mean` takes them.

    Returns
    -------
    float
        In the values' unit: 0 where all clients have the same; of accuracies at most
        1/2.

    Examples
    --------
    >>> deviation([0.0, 1.0])
    0.5
    """
    return math.sqrt(variance(values, sizes))


def worst10(values: Values) -> float:
    """Return the mean over the tenth of the clients with the lowest values.

    A tenth is rounded up to whole clients: of 1 to 10 clients it is the worst one, of
    11 to 20 the two worst. Of clients with the same value it does not matter which are
    taken. Each client counts once, whatever its size.

    Parameters
    ----------
    values : Iterable[float]
        One a client; more is better.

    Returns
    -------
    float
        Between the minimum and the mean; the mean where all have the same value. Of
        accuracies 0 says that a tenth of the clients is never right.

    Examples
    --------
    >>> worst10([0.5, 0.7, 0.9, float("nan")])
    0.5
    """
    known, _ = _known(values)
    return float(known[: _tenth(known)].mean()) if len(known) else math.nan


def best10(values: Values) -> float:
    """Return the mean over the tenth of the clients with the highest values.

    A tenth is as :func:`worst10` has it.

    Parameters
    ----------
    values : Iterable[float]
        One a client; more is better.

    Returns
    -------
    float
        Between the mean and the maximum.

    Examples
    --------
    >>> best10([0.5, 0.7, 0.9])
    0.9
    """
    known, _ = _known(values)
    return float(known[-_tenth(known) :].mean()) if len(known) else math.nan


def minimum(values: Values) -> float:
    """Return the lowest value that a client has.

    Parameters
    ----------
    values : Iterable[float]
        One a client.

    Returns
    -------
    float
        Of accuracies 0 says that some client is never right, 1 that all always are.

    References
    ----------
    What agnostic federated learning raises: M. Mohri, G. Sivek, A. T. Suresh,
    "Agnostic Federated Learning", ICML 2019.

    Examples
    --------
    >>> minimum([0.5, 0.7, float("nan")])
    0.5
    """
    known, _ = _known(values)
    return float(known[0]) if len(known) else math.nan


def jain(values: Values) -> float:
    """Return Jain's index, (sum x)^2 / (K sum x^2).

    Parameters
    ----------
    values : Iterable[float]
        One a client, 0 or more.

    Returns
    -------
    float
        In [1/K, 1]: 1 where all K clients have the same, 1/K where one client has
        everything, m/K where m clients have the same and the others nothing. Where
        nobody has anything, all have the same: 1. It does not change with the unit.

    References
    ----------
    R. Jain, D.-M. Chiu, W. Hawe, "A Quantitative Measure of Fairness and
    Discrimination for Resource Allocation in Shared Computer Systems", DEC Research
    Report TR-301, 1984.

    Examples
    --------
    >>> jain([1, 1, 1, 1]), jain([1, 0, 0, 0]), jain([1, 1, 0, 0])
    (1.0, 0.25, 0.5)
    """
    x = _amounts("jain", values)
    if not len(x):
        return math.nan
    return min(float(x.sum() ** 2 / (len(x) * (x**2).sum())), 1.0)


def gini(values: Values) -> float:
    """Return the Gini coefficient, sum_ij |x_i - x_j| / (2 K sum x).

    Parameters
    ----------
    values : Iterable[float]
        One a client, 0 or more.

    Returns
    -------
    float
        In [0, 1 - 1/K]: 0 where all K clients have the same (also where nobody has
        anything), 1 - 1/K where one client has everything; 1 is never reached. It does
        not change with the unit.

    References
    ----------
    C. Gini, "Variabilità e mutabilità", 1912.

    Examples
    --------
    >>> gini([1, 1, 1, 1]), gini([1, 0, 0, 0])
    (0.0, 0.75)
    """
    x = _amounts("gini", values)
    count = len(x)
    if not count:
        return math.nan
    # x is sorted, so |x_i - x_j| is the later minus the earlier one.
    places = 2.0 * np.arange(1, count + 1) - count - 1
    return max(0.0, float((places * x).sum() / (count * x.sum())))


def entropy(values: Values) -> float:
    """Return the entropy of the clients' shares, -sum p log p / log K, p = x / sum x.

    Parameters
    ----------
    values : Iterable[float]
        One a client, 0 or more.

    Returns
    -------
    float
        In [0, 1]: 1 where all K clients have the same (also where nobody has anything,
        and for one client alone), 0 where one client has everything. It does not change
        with the unit.

    References
    ----------
    C. E. Shannon, "A Mathematical Theory of Communication", Bell System Technical
    Journal, 1948. Of accuracies, without the division by log K: T. Li et al., "Fair
    Resource Allocation in Federated Learning", ICLR 2020.

    Examples
    --------
    >>> entropy([1, 1, 1, 1]), entropy([1, 0, 0, 0]), entropy([1, 1, 0, 0])
    (1.0, 0.0, 0.5)
    """
    x = _amounts("entropy", values)
    if not len(x):
        return math.nan
    if len(x) == 1:
        return 1.0
    shares = x / x.sum()
    shares = shares[shares > 0]
    found = -float((shares * np.log(shares)).sum()) / math.log(len(x))
    return min(max(0.0, found), 1.0)


def uniform_cosine(values: Values) -> float:
    """Return the cosine between the clients' values and the uniform vector.

    It is sum x / (sqrt(K) |x|), the root of :func:`jain`.

    Parameters
    ----------
    values : Iterable[float]
        One a client, 0 or more.

    Returns
    -------
    float
        In [1/sqrt(K), 1]: 1 where all K clients have the same (also where nobody has
        anything), 1/sqrt(K) where one client has everything; 0 is never reached. It
        does not change with the unit.

    References
    ----------
    T. Li et al., "Fair Resource Allocation in Federated Learning", ICLR 2020.

    Examples
    --------
    >>> uniform_cosine([1, 1, 1, 1]), uniform_cosine([1, 0, 0, 0])
    (1.0, 0.5)
    """
    return math.sqrt(jain(values))


def client_spread(values: Values) -> dict[str, float]:
    """Summarise a measure, such as accuracy, that every client has.

    Parameters
    ----------
    values : Iterable[float]
        One a client.

    Returns
    -------
    dict[str, float]
        :func:`mean` and ``std`` (:func:`deviation`), each client counting once;
        :func:`worst10` and :func:`best10`. All NaN where no client has a value.

    Examples
    --------
    >>> client_spread([0.5, 0.7, 0.9, float("nan")])["worst10"]
    0.5
    """
    several = list(values)
    return {
        "mean": mean(several),
        "std": deviation(several),
        "worst10": worst10(several),
        "best10": best10(several),
    }


def spread_measures(values: Values, sizes: Values | None = None) -> dict[str, float]:
    """Return all that this module has of a measure that every client has.

    Parameters
    ----------
    values : Iterable[float]
        One a client; more is better.
    sizes : Iterable[float], optional
        How much each client counts in what is weighted, as :func:`mean` takes them.

    Returns
    -------
    dict[str, float]
        ``mean``, ``variance``, ``deviation``, ``worst10``, ``best10``, ``minimum``,
        ``jain``, ``gini``, ``entropy`` and ``uniform_cosine`` are what the functions of
        these names return, each client counting once; with sizes ``weighted_mean``,
        ``weighted_variance`` and ``weighted_deviation``, too. The four of how an amount
        is shared out are NaN where a value is below 0 or infinite: then there is none.

    Examples
    --------
    >>> found = spread_measures([0.5, 1.0], sizes=[3, 1])
    >>> found["mean"], found["weighted_mean"], found["jain"]
    (0.75, 0.625, 0.9)
    """
    several = list(values)
    weights = None if sizes is None else list(sizes)
    found = {
        "mean": mean(several),
        "variance": variance(several),
        "deviation": deviation(several),
    }
    if weights is not None:
        found["weighted_mean"] = mean(several, weights)
        found["weighted_variance"] = variance(several, weights)
        found["weighted_deviation"] = deviation(several, weights)
    found |= {f.__name__: f(several) for f in (worst10, best10, minimum)}
    known, _ = _known(several)
    amounts = bool((np.isfinite(known) & (known >= 0)).all())
    shared_out = (jain, gini, entropy, uniform_cosine)
    found |= {f.__name__: f(several) if amounts else math.nan for f in shared_out}
    return found


def _known(values: Values, sizes: Values | None = None) -> tuple[_Array, _Array | None]:
    """Return the values that there are, sorted, and their sizes."""
    x = vector("values", values)
    if sizes is None:
        return np.sort(x[~np.isnan(x)]), None
    weights = vector("sizes", sizes)
    if len(weights) != len(x):
        raise ConfigurationError(
            f"sizes must be as many as values, {len(x)}, got {len(weights)}. Give one "
            "a client."
        )
    weights = weights[~np.isnan(x)]
    bad = weights[~(np.isfinite(weights) & (weights >= 0))]
    if len(bad):
        raise ConfigurationError(
            f"sizes must be finite and 0 or more, got {shown(bad[0])}."
        )
    x = x[~np.isnan(x)]
    order = np.lexsort((weights, x))
    return x[order], weights[order]


def vector(name: str, values: Values) -> _Array:
    """Return one number a client, checked, as float64."""
    try:
        x = np.asarray(
            values if isinstance(values, np.ndarray) else [*values], np.float64
        )
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"{name} must be a list of numbers, one a client, got {shown(values)}."
        ) from None
    if x.ndim != 1:
        raise ConfigurationError(
            f"{name} must be a list of numbers, one a client, got an array of shape "
            f"{x.shape}."
        )
    return x


def _mean(known: _Array, weights: _Array | None) -> float:
    if weights is None:
        return float(known.mean()) if len(known) else math.nan
    total = float(weights.sum())
    return float((weights * known).sum() / total) if total > 0 else math.nan


def _tenth(known: _Array) -> int:
    return math.ceil(len(known) / 10)


def _amounts(what: str, values: Values) -> _Array:
    """Return what is shared out, sorted, in a unit in which the most is 1."""
    known, _ = _known(values)
    bad = known[~(np.isfinite(known) & (known >= 0))]
    if len(bad):
        raise ConfigurationError(
            f"{what}: values must be finite and 0 or more, got {shown(bad[0])}. It "
            "measures how an amount is shared out; accuracies are fine, logits are not."
        )
    if not len(known):
        return known
    return known / known[-1] if known[-1] > 0 else np.ones(len(known))
