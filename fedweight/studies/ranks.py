"""Several methods on several data sets: average ranks, and who cannot be told apart.

References
----------
J. Demsar, "Statistical Comparisons of Classifiers over Multiple Data Sets", Journal of
Machine Learning Research, 2006: average ranks and the critical-difference diagram.
A. Benavoli, G. Corani, F. Mangili, "Should We Really Use Post-Hoc Tests Based on
Mean-Ranks?", Journal of Machine Learning Research, 2016: why two methods are told apart
by the signed-rank test of the two alone, and not by their ranks among others.
A. Benavoli, F. Mangili, G. Corani, M. Zaffalon, F. Ruggeri, "A Bayesian Wilcoxon
Signed-Rank Test Based on the Dirichlet Process", ICML 2014; with a region of practical
equivalence A. Benavoli, G. Corani, J. Demsar, M. Zaffalon, "Time for a Change: a
Tutorial for Comparing Multiple Classifiers Through Bayesian Analysis", Journal of
Machine Learning Research, 2017.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from ..core.errors import ConfigurationError, check_range
from ..core.rng import Purpose, generator
from ..core.texts import listed
from .statistics import LEVEL, holm, mean_ranks, pairs_needed, settled, wilcoxon

# Differences up to so much, in the measure's unit, are as good as none: one point of an
# accuracy.
ROPE = 0.01

# How much the prior's one difference of 0 counts, where each data set counts 1.
PRIOR = 0.5

# Draws of the data sets' weights. A probability is off by 0.002 or less, as a rule.
DRAWS = 50_000

# Shares that differ by less are equal, but for rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Ranking:
    """What a critical-difference diagram shows.

    Attributes
    ----------
    average_ranks : dict of str to float
        By method, the best first: from 1, which is the best on every data set, to the
        number of methods; NaN where there is no data set.
    p_holm : dict
        By pairs of methods: of the two-sided signed-rank test over the data sets,
        corrected by Holm over all pairs.
    cliques : tuple of tuple of str
        The largest groups in which no two methods differ at ``level``; groups of one
        are left out. Each is in the order of the ranks.
    data_sets : int
        How many there are that every method has a value for.
    needed : int
        With fewer data sets the signed-rank test can tell nobody apart.
    level : float
        Of the tests.
    """

    average_ranks: dict[str, float]
    p_holm: dict[tuple[str, str], float]
    cliques: tuple[tuple[str, ...], ...]
    data_sets: int
    needed: int
    level: float = LEVEL

    @property
    def note(self) -> str:
        """What a reader must know, in a line."""
        if not self.data_sets:
            return "no ranks: there is no data set on which every method has a value"
        sets = f"{self.data_sets} data set{'s' * (self.data_sets != 1)}"
        on = f"average ranks over {sets}, 1 is best"
        if self.data_sets < self.needed:
            return (
                f"{on}; Wilcoxon's test cannot reach {self.level:g} with fewer than "
                f"{self.needed}"
            )
        pairs = len(self.p_holm)
        over = f", Holm over {pairs} pairs" if pairs > 1 else ""
        return f"{on}; a bar joins whom Wilcoxon's test does not tell apart{over}"

    def __str__(self) -> str:
        """Return the diagram as text: a line a method, a column a group."""
        if not self.data_sets:
            return self.note
        width = max(map(len, self.average_ranks), default=0)
        lines = []
        for name, rank in self.average_ranks.items():
            bars = " ".join("|" if name in group else " " for group in self.cliques)
            lines.append(f"{rank:6.2f}  {name:<{width}}  {bars}".rstrip())
        return "\n".join([self.note, *lines])

    def svg(self) -> str:
        """Return the diagram as SVG: the ranks' axis, names below, bars between.

        Without a data set it is the axis alone.
        """
        names, k = [*self.average_ranks], max(len(self.average_ranks), 2)
        names, groups = (names, self.cliques) if self.data_sets else ([], ())
        left, right, row, axis = 20, 620, 18, 30
        below = axis + 14 + 10 * len(groups)
        height = below + row * (len(names) + 1)

        def x(rank: float) -> str:
            return f"{left + (rank - 1) / (k - 1) * (right - left):.1f}"

        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {height}" '
            'role="img" font-family="sans-serif" font-size="12">',
            f"<title>{escape(self.note)}</title>",
            f'<path d="M{left} {axis}H{right}" stroke="currentColor"/>',
        ]
        for number in range(1, k + 1):
            parts.append(
                f'<path d="M{x(number)} {axis}v-6" stroke="currentColor"/><text '
                f'x="{x(number)}" y="{axis - 10}" text-anchor="middle">{number}</text>'
            )
        for place, group in enumerate(groups):
            ends = [self.average_ranks[name] for name in (group[0], group[-1])]
            y = axis + 10 + 10 * place
            parts.append(
                f'<path d="M{x(ends[0])} {y}H{x(ends[1])}" stroke="currentColor" '
                'stroke-width="4"/>'
            )
            parts += [
                f'<circle cx="{x(self.average_ranks[name])}" cy="{y}" r="4" '
                'fill="currentColor"/>'
                for name in group
            ]
        for place, name in enumerate(names, 1):
            rank, y = self.average_ranks[name], below + row * place
            late = rank > (k + 1) / 2
            anchor, dx = ("end", -4) if late else ("start", 4)
            parts.append(
                f'<path d="M{x(rank)} {axis}V{y}" stroke="currentColor" '
                f'stroke-opacity="0.4"/><text x="{x(rank)}" dx="{dx}" y="{y}" '
                f'text-anchor="{anchor}">{escape(name)} {rank:.2f}</text>'
            )
        return "".join([*parts, "</svg>"])

    def _repr_svg_(self) -> str:
        return self.svg()


def rank_methods(
    values: Mapping[str, Sequence[float]],
    *,
    less_is_better: bool = False,
    level: float = LEVEL,
) -> Ranking:
    """Rank methods over data sets, and find whom the tests do not tell apart.

    Parameters
    ----------
    values : Mapping[str, Sequence[float]]
        By method one value a data set, in the same order; NaN where there is none. A
        data set that one method has no value for is left out for all.
    less_is_better : bool
        As of a loss.
    level : float
        Claims that are false are to be no more than this share, in (0, 1).

    Returns
    -------
    Ranking
        Methods of the same rank stay in the order in which they are given.

    Examples
    --------
    >>> found = rank_methods({"fedavg": [0.8, 0.7], "ida": [0.9, 0.7]})
    >>> found.average_ranks
    {'ida': 1.25, 'fedavg': 1.75}
    >>> found.data_sets, found.needed, found.cliques
    (2, 6, (('ida', 'fedavg'),))
    """
    check_range("level", level, 0, 1, low_open=True, high_open=True)
    names = [*values]
    lengths = {len(several) for several in values.values()}
    if len(lengths) != 1:
        raise ConfigurationError(
            "every method must have one value a data set, got "
            f"{listed(sorted(lengths)) if lengths else 'no method'}. Give NaN where "
            "there is none."
        )
    table = np.array([np.asarray(values[name], np.float64) for name in names])
    table = table[:, np.isfinite(table).all(axis=0)]
    signed = table if less_is_better else -table
    ranks = [mean_ranks(column) for column in signed.T]
    average = np.mean(ranks, axis=0) if ranks else np.full(len(names), math.nan)
    order = np.argsort(average, kind="stable")
    ordered = [names[k] for k in order]
    pairs = [*itertools.combinations(order.tolist(), 2)]
    p_values = holm([wilcoxon(settled(table[a], table[b])) for a, b in pairs])
    p_holm = {
        (names[a], names[b]): p for (a, b), p in zip(pairs, p_values, strict=True)
    }
    apart = {frozenset(pair) for pair, p in p_holm.items() if p <= level}
    return Ranking(
        average_ranks={names[k]: float(average[k]) for k in order},
        p_holm=p_holm,
        cliques=_cliques(ordered, apart),
        data_sets=table.shape[1],
        needed=pairs_needed(max(len(pairs), 1), level),
        level=level,
    )


def _cliques(
    names: Sequence[str], apart: set[frozenset[str]]
) -> tuple[tuple[str, ...], ...]:
    """Return the largest groups no two of which are told apart."""
    found: list[frozenset[str]] = []
    # Bron and Kerbosch's search, "Finding All Cliques of an Undirected Graph", 1973.
    open_: list[tuple[frozenset[str], list[str], list[str]]] = [
        (frozenset(), [*names], [])
    ]
    while open_:
        group, more, done = open_.pop()
        if not more and not done and len(group) > 1:
            found.append(group)
        for name in more:
            joins = [n for n in names if n != name and {n, name} not in apart]
            rest = more[more.index(name) + 1 :]
            before = done + more[: more.index(name)]
            open_.append(
                (
                    group | {name},
                    [n for n in rest if n in joins],
                    [n for n in before if n in joins],
                )
            )
    ordered = [tuple(n for n in names if n in group) for group in found]
    return tuple(sorted(ordered, key=lambda group: [names.index(n) for n in group]))


# ---------------------------------------------------------------- the Bayesian's answer


@dataclass(frozen=True)
class SignedRanks:
    """How probable it is that one method is better than another on a further data set.

    Attributes
    ----------
    better, same, worse : float
        In [0, 1], and 1 together: that the second is better by more than ``rope``, that
        neither is, and that it is worse by more.
    data_sets : int
        Of how many both have a value for. Of few the prior says most.
    rope : float
        Differences up to this are as good as none.
    """

    better: float
    same: float
    worse: float
    data_sets: int
    rope: float


def signed_ranks(
    first: Sequence[float],
    second: Sequence[float],
    *,
    rope: float = ROPE,
    less_is_better: bool = False,
    prior: float = PRIOR,
    draws: int = DRAWS,
    seed: int = 0,
) -> SignedRanks:
    """Compare two methods over data sets by the Bayesian signed-rank test.

    It answers what a p-value does not: how probable it is that the methods are as good
    as alike. Nothing is corrected for the number of comparisons, and no verdict here
    rests on it.

    The data sets' weights are drawn from a Dirichlet distribution, in which each counts
    1 and one difference of 0, the prior, counts ``prior``. With each draw the pairs of
    differences, a pair by the product of its weights, are shared out by whether their
    mean is above ``rope``, below ``-rope`` or between; the probabilities say how often
    each of the three has the largest share (equal ones share it).

    Parameters
    ----------
    first, second : Sequence[float]
        One value a data set, in the same order; NaN where there is none.
    rope : float
        0 or more, in the values' unit.
    less_is_better : bool
        As of a loss.
    prior : float
        Above 0.
    draws : int
        1 or more.
    seed : int
        Of the draws.

    Returns
    -------
    SignedRanks
        NaN where both have a value for no data set.

    Examples
    --------
    >>> found = signed_ranks([0.70, 0.80, 0.75, 0.6], [0.75, 0.84, 0.78, 0.66])
    >>> found.better > 0.95, found.worse, found.data_sets
    (True, 0.0, 4)
    """
    check_range("rope", rope, 0)
    check_range("prior", prior, 0, low_open=True)
    check_range("draws", draws, 1)
    ours, theirs = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if ours.shape != theirs.shape or ours.ndim != 1:
        raise ConfigurationError(
            "both methods must have one value a data set, got shapes "
            f"{ours.shape} and {theirs.shape}. Give NaN where there is none."
        )
    both = np.isfinite(ours) & np.isfinite(theirs)
    d = settled(ours[both], theirs[both])
    if not len(d):
        return SignedRanks(math.nan, math.nan, math.nan, 0, rope)
    z = np.concatenate([[0.0], -d if less_is_better else d])
    means = (z[:, None] + z[None]) / 2
    # A stream beside the bootstrap's: both draw anew what was measured.
    rng = generator(seed, Purpose.BOOTSTRAP, 1)
    weights = rng.dirichlet([prior, *[1.0] * len(d)], draws)
    shares = [
        np.einsum("si,ij,sj->s", weights, one.astype(float), weights, optimize=True)
        for one in (means > rope, abs(means) <= rope, means < -rope)
    ]
    wins = np.stack(shares) >= np.max(shares, axis=0) - _ROUNDING
    better, same, worse = (wins / wins.sum(axis=0)).mean(axis=1).tolist()
    return SignedRanks(better, same, worse, len(d), rope)
