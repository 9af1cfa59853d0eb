"""Is a difference between two methods real? Paired comparisons.

Two methods that ran with the same seed share the partition, the initial model and the
sampling of clients, so their difference is taken seed by seed. Whether it is real says
the paired t test, corrected by Holm's procedure where several methods are compared with
one; Wilcoxon's signed-rank test, which assumes less and needs more pairs, stands beside
it.

Seeds of one data set say how sure a difference is on that data set. They do not say
whether it would be there on another: what is peculiar to a data set is in all of its
seeds, so that seeds of several taken together for independent pairs find differences
where there are none. Over several data sets a pair is therefore one of these, by the
mean difference of its seeds: Demsar (section 3), whose advice Benavoli et al. follow,
takes one value a method and data set, however often it was measured there. Demsar warns
of the t test over data sets, whose differences need not be comparable or normal: where
the two tests disagree, trust Wilcoxon's.

References
----------
Student, "The Probable Error of a Mean", Biometrika, 1908. F. Wilcoxon, "Individual
Comparisons by Ranking Methods", Biometrics Bulletin, 1945. S. Holm, "A Simple
Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics,
1979. B. Efron, "Better Bootstrap Confidence Intervals", Journal of the American
Statistical Association, 1987. J. Demsar, "Statistical Comparisons of Classifiers over
Multiple Data Sets", Journal of Machine Learning Research, 2006. A. Benavoli, G. Corani,
J. Demsar, M. Zaffalon, "Time for a Change: a Tutorial for Comparing Multiple
Classifiers Through Bayesian Analysis", Journal of Machine Learning Research, 2017.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..core.errors import ConfigurationError, check_range
from ..core.rng import Purpose, generator

LEVEL = 0.05

# Resamples of a bootstrap interval.
RESAMPLES = 10_000

# Values that differ by less than this share of them are the same, but for rounding.
_SAME = 1e-12

_Array = npt.NDArray[np.float64]
Verdict = Literal["better", "worse", "same", "undecided", "cannot reach"]


@dataclass(frozen=True)
class Paired:
    """What two methods' values, pair by pair, say of their difference.

    Attributes
    ----------
    pairs : int
        How many seeds, or data sets, both have a value for.
    difference : float
        The mean difference, second minus first; NaN without pairs.
    low, high : float
        Its t interval at 1 - level; NaN with fewer than 2 pairs. Not corrected for the
        number of comparisons.
    bootstrap_low, bootstrap_high : float
        Its bootstrap interval, bias-corrected and accelerated (BCa), likewise.
    effect_size : float
        The mean difference over the standard deviation of the differences (Cohen's d
        of pairs); NaN where all pairs differ alike.
    p : float
        Of the two-sided paired t test; NaN with fewer than 2 pairs, or where all pairs
        differ alike, of which that test knows nothing.
    wilcoxon_p : float
        Of the two-sided signed-rank test, exact, ties included. Pairs without a
        difference are left out of it.
    p_holm, wilcoxon_p_holm : float
        Corrected for all comparisons that were made together.
    wilcoxon_verdict : str
        As ``verdict``, by ``wilcoxon_p_holm``; ``"cannot reach"`` where the signed-rank
        test could not have found anything: with n pairs that differ its least p is
        2^(1 - n), which few pairs do not bring below the level.
    verdict : str
        By ``p_holm``: ``"better"`` or ``"worse"``, which the second is, or
        ``"undecided"``; ``"same"`` where no pair differs.
    sentence : str
        The verdict with its numbers.
    """

    pairs: int
    difference: float
    low: float
    high: float
    bootstrap_low: float
    bootstrap_high: float
    effect_size: float
    p: float
    wilcoxon_p: float
    p_holm: float
    wilcoxon_p_holm: float
    wilcoxon_verdict: Verdict
    verdict: Verdict
    sentence: str


def compare_pairs(
    first: Sequence[float],
    others: Mapping[str, Sequence[float]],
    *,
    less_is_better: bool = False,
    level: float = LEVEL,
    seed: int = 0,
    pair: str = "pair",
) -> dict[str, Paired]:
    """Compare methods with a first one, pair by pair, as one family of tests.

    Parameters
    ----------
    first : Sequence[float]
        The first method's values, one a seed, or one a data set: its mean over the
        seeds. NaN where there is none. Pairs are to be independent, which several seeds
        of several data sets together are not.
    others : Mapping[str, Sequence[float]]
        The other methods' by their names, in the same order.
    less_is_better : bool
        As of a loss; it turns what is called better, and no number.
    level : float
        Claims that are false are to be no more than this share, in (0, 1).
    seed : int
        Of the bootstrap's draws.
    pair : str
        What the sentences call a pair, such as ``"data set"``.

    Returns
    -------
    dict[str, Paired]
        By the names of the others.

    Examples
    --------
    >>> found = compare_pairs([0.90, 0.91, 0.92], {"ida": [0.93, 0.95, 0.94]})
    >>> found["ida"].verdict, round(found["ida"].p, 3), found["ida"].wilcoxon_verdict
    ('better', 0.035, 'cannot reach')
    """
    check_range("level", level, 0, 1, low_open=True, high_open=True)
    ours = np.asarray(first, np.float64)
    differences: dict[str, _Array] = {}
    for name, values in others.items():
        theirs = np.asarray(values, np.float64)
        if theirs.shape != ours.shape or ours.ndim != 1:
            raise ConfigurationError(
                f"{name} must have one value a {pair}, as the first has, shape "
                f"{ours.shape}, got shape {theirs.shape}. Give NaN where there is none."
            )
        both = np.isfinite(ours) & np.isfinite(theirs)
        differences[name] = settled(ours[both], theirs[both])
    t_tests = {name: float(t_test(d)) for name, d in differences.items()}
    ranks = {name: wilcoxon(d) for name, d in differences.items()}
    least = [_least_p(int(np.count_nonzero(d))) for d in differences.values()]
    corrected = zip(
        differences,
        holm([*t_tests.values()]),
        holm([*ranks.values()]),
        [p <= level for p in holm(least)],
        strict=True,
    )
    found: dict[str, Paired] = {}
    for name, p_holm, wilcoxon_holm, reaches in corrected:
        d = differences[name]
        low, high = t_interval(d, level)
        bootstrap_low, bootstrap_high = bootstrap_interval(d, level, seed=seed)
        mean = float(d.mean()) if len(d) else math.nan
        better = -d if less_is_better else d
        verdict = _verdict(better, p_holm, level)
        found[name] = Paired(
            pairs=len(d),
            difference=mean,
            low=low,
            high=high,
            bootstrap_low=bootstrap_low,
            bootstrap_high=bootstrap_high,
            effect_size=effect_size(d),
            p=t_tests[name],
            wilcoxon_p=ranks[name],
            p_holm=p_holm,
            wilcoxon_p_holm=wilcoxon_holm,
            wilcoxon_verdict=(
                _verdict(better, wilcoxon_holm, level) if reaches else "cannot reach"
            ),
            verdict=verdict,
            sentence=_sentence(
                verdict,
                d,
                (low, high),
                t_tests[name],
                p_holm,
                len(others),
                level,
                pair,
            ),
        )
    return found


def settled(first: _Array, second: _Array) -> _Array:
    """Return second minus first; differences that only rounding makes are 0."""
    d = second - first
    scale = np.maximum(np.abs(first), np.abs(second))
    return np.where(np.abs(d) <= _SAME * scale, 0.0, d)


def _verdict(d: _Array, p: float, level: float) -> Verdict:
    if len(d) and not d.any():
        return "same"
    if not p <= level:
        return "undecided"
    return "better" if d.mean() > 0 else "worse"


def _sentence(
    verdict: Verdict,
    d: _Array,
    interval: tuple[float, float],
    p: float,
    p_holm: float,
    comparisons: int,
    level: float,
    pair: str,
) -> str:
    pairs = f"{len(d)} {pair}{'s' * (len(d) != 1)}"
    if len(d) < 2:
        return f"undecided: {pairs}, and a t test needs 2 or more"
    if verdict == "same":
        return f"same: not one of {pairs} differs"
    if math.isnan(p):
        return (
            f"undecided: all {pairs} differ by the same {d.mean():+.4f}, of which a t "
            "test knows nothing"
        )
    by_itself = (
        f"{1 - level:.0%} interval {interval[0]:+.4f} to {interval[1]:+.4f}"
        f"{',' if comparisons == 1 else ' and'} p = {p:.3g}"
    )
    if comparisons == 1:
        return f"{verdict}: {d.mean():+.4f}, {by_itself} ({pairs})"
    # An interval that leaves out 0 beside "undecided" must not seem to contradict it.
    but = "but" if (p <= level) != (p_holm <= level) else "and"
    return (
        f"{verdict}: {d.mean():+.4f}, by itself {by_itself}, {but} corrected p = "
        f"{p_holm:.3g} ({pairs}, Holm over {comparisons} comparisons)"
    )


# ------------------------------------------------------------------------- intervals


def t_interval(values: Sequence[float] | _Array, level: float = LEVEL) -> Any:
    """Return Student's interval of a mean at 1 - ``level``, as (low, high).

    NaN with fewer than 2 values. It takes them for draws of a normal distribution.

    Examples
    --------
    >>> low, high = t_interval([0.90, 0.91, 0.92])
    >>> round(low, 4), round(high, 4)
    (0.8852, 0.9348)
    """
    from scipy import special

    x = np.asarray(values, np.float64)
    n = len(x)
    if n < 2:
        return math.nan, math.nan
    mean = float(x.mean())
    times = float(special.stdtrit(n - 1, 1 - level / 2))
    half = times * float(x.std(ddof=1)) / math.sqrt(n)
    return mean - half, mean + half


def bootstrap_interval(
    values: Sequence[float] | _Array,
    level: float = LEVEL,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the bootstrap's interval of a mean, as (low, high).

    It is bias-corrected and accelerated (BCa); the draws depend on ``seed`` alone. NaN
    with fewer than 2 values. With few values it is too narrow: resamples have never
    seen what these values have not.
    """
    from scipy import special

    x = np.asarray(values, np.float64)
    n = len(x)
    if n < 2:
        return math.nan, math.nan
    mean = float(x.mean())
    if _alike(x):
        return mean, mean
    rng = generator(seed, Purpose.BOOTSTRAP)
    means = x[rng.integers(0, n, (resamples, n))].mean(axis=1)
    below = np.count_nonzero(means < mean) + np.count_nonzero(means <= mean)
    bias = special.ndtri(below / (2 * resamples))
    # The acceleration, by the jackknife; of a mean it is the values' skewness.
    apart = x - mean
    skew = (apart**3).sum() / (apart**2).sum() ** 1.5
    shifted = bias + special.ndtri(np.array([level / 2, 1 - level / 2]))
    shares = special.ndtr(bias + shifted / (1 - skew / 6 * shifted))
    low, high = np.percentile(means, 100 * shares)
    return float(low), float(high)


def effect_size(differences: Sequence[float] | _Array) -> float:
    """Return the mean of differences over their standard deviation.

    Cohen's d of pairs (J. Cohen, "Statistical Power Analysis for the Behavioral
    Sciences", 2nd edition, 1988). NaN with fewer than 2, or where all are alike.
    """
    d = np.asarray(differences, np.float64)
    if len(d) < 2 or _alike(d):
        return math.nan
    return float(d.mean() / d.std(ddof=1))


def _alike(d: _Array) -> bool:
    """Tell whether numbers are the same, but for rounding."""
    return bool(np.ptp(d) <= _SAME * max(float(np.abs(d).max()), 1.0))


# ----------------------------------------------------------------------------- tests


def t_test(differences: Sequence[float] | _Array) -> _Array:
    """Return the p of the two-sided paired t test.

    Parameters
    ----------
    differences : array_like
        ``[..., n]``: of n pairs each.

    Returns
    -------
    numpy.ndarray
        ``[...]``; NaN with fewer than 2 pairs, or where all differ alike.
    """
    from scipy import special

    d = np.asarray(differences, np.float64)
    n = d.shape[-1]
    if n < 2:
        return np.full(d.shape[:-1], math.nan)
    spread = d.std(axis=-1, ddof=1)
    largest = np.maximum(np.abs(d).max(axis=-1), 1.0)
    known = np.ptp(d, axis=-1) > _SAME * largest
    t = d.mean(axis=-1) * math.sqrt(n) / np.where(known, spread, 1.0)
    p = 2 * special.stdtr(n - 1, -np.abs(t))
    return np.where(known, p, math.nan)


def wilcoxon(differences: Sequence[float] | _Array) -> float:
    """Return the exact p of the two-sided signed-rank test.

    Over all signs that the differences could have had, whatever their number. Ties
    share their mean rank; differences of 0 are left out, as Wilcoxon did.

    Parameters
    ----------
    differences : array_like
        ``[n]``.

    Returns
    -------
    float
        1 where no pair differs, and without pairs.

    Examples
    --------
    >>> wilcoxon([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]) == 2 / 2**6
    True
    """
    d = np.asarray(differences, np.float64)
    d = d[d != 0]
    if not len(d):
        return 1.0
    doubled = (2 * mean_ranks(np.abs(d))).astype(np.int64)
    positive = int(doubled[d > 0].sum())
    doubled.sort()  # The sums' chances know no order; what is kept is found again.
    chances = _sums_of_ranks(tuple(doubled.tolist()))
    tails = chances[: positive + 1].sum(), chances[positive:].sum()
    return min(1.0, 2 * float(min(tails)))


def mean_ranks(values: Sequence[float] | _Array) -> _Array:
    """Return ranks from 1, the least; ties, also but for rounding, share their mean.

    Examples
    --------
    >>> mean_ranks([0.5, 0.1, 0.5]).tolist()
    [2.5, 1.0, 2.5]
    """
    x = np.asarray(values, np.float64)
    if not len(x):
        return x
    order = np.argsort(x, kind="stable")
    gaps = np.diff(x[order], prepend=x[order[0]])
    groups = np.cumsum(gaps > _SAME * max(float(np.abs(x).max()), 1.0))
    _, group, counts = np.unique(groups, return_inverse=True, return_counts=True)
    ranks = np.empty(len(x))
    ranks[order] = (np.cumsum(counts) - (counts - 1) / 2)[group]
    return ranks


@lru_cache(maxsize=64)
def _sums_of_ranks(ranks: tuple[int, ...]) -> _Array:
    """Return how likely each sum of ranks is whose signs are fair coins."""
    chances = np.zeros(sum(ranks) + 1)
    chances[0] = 1.0
    for rank in ranks:
        with_it = np.zeros_like(chances)
        with_it[rank:] = chances[:-rank]
        chances = (chances + with_it) / 2
    return chances


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for being several, by Holm's procedure.

    A NaN, of a test that could not be made, stays one, and counts as a comparison.

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")  # NaN comes last.
    steps = (len(p) - np.arange(len(p))) * p[order]
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(value) for value in corrected]


def _least_p(pairs: int) -> float:
    return min(1.0, 2.0 ** (1 - pairs))


def pairs_needed(comparisons: int, level: float = LEVEL) -> int:
    """Return how many pairs the signed-rank test needs to find anything at all.

    With fewer, even pairs that all point the same way do not reach the level after
    Holm's correction for so many comparisons.

    Examples
    --------
    >>> [pairs_needed(m) for m in (1, 5, 7, 15)]
    [6, 8, 9, 10]
    """
    check_range("comparisons", comparisons, 1)
    return math.ceil(1 + math.log2(comparisons / level))
