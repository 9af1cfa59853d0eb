"""Fair incentives: who contributes more is drawn more often, and so gets newer models.

Xiaoqiang Lin, Xinyi Xu, See-Kiong Ng, Chuan-Sheng Foo and Bryan Kian Hsiang Low, "Fair
yet Asymptotically Equal Collaborative Learning", ICML 2023. All clients train while
their contributions are estimated; when the estimates have settled, few of them train in
each round, drawn by what they contribute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from ..core.errors import AggregationError, ConfigurationError
from ..core.rng import Purpose, generator
from ..server.sampling import Draw
from .base import WeightingStrategy
from .round import Round, Selection

_Array = npt.NDArray[np.float64]

# A sum of updates is nothing where its square is less than this share of its parts'.
NOTHING = 1e-12


# Of so many clients the contributions in a round take about a minute.
MOST_EXPLORED = 2000


class FairIncentive(WeightingStrategy):
    """Draw clients in proportion to ``exp(beta * psi)``, once their ``psi`` is known.

    ``psi_i`` is how much client i's update turns a sum of updates towards the whole
    one, ``G = sum_j p_j D_j`` with ``p_j`` the shares of the data: the mean over sizes
    s = 0, ..., K - 1, with a random set S of s other clients for each, of

    ``cos(G, sum_{S and i} p_j D_j) - cos(G, sum_S p_j D_j)``,

    and then the mean over the rounds so far. In those all clients train. They end where
    Hotelling's T² test finds no difference between the mean of the last ``window``
    rounds and that of all before (``p > settled``). From then on a share
    ``fraction_train`` of the clients trains in each round, drawn without replacement in
    proportion to ``exp(beta * psi)``. Whoever trains counts by its data.

    Parameters
    ----------
    beta : float
        0 or more; how much more often those who contribute more are drawn. At 0 all are
        as likely as another, and what remains is FedAvg; with a large one nearly always
        the same clients are drawn.
    settled : float
        In (0, 1); the p-value above which the estimates count as settled. Near 1 they
        never are, and all clients train in all rounds, as in FedAvg.
    window : int
        2 or more; how many of the last rounds are tested. Exploring takes one round
        more at least.
    tested : int
        1 or more; the contributions of so many clients are tested, drawn anew for each
        test, but of one less than ``window`` at most: fewer rounds say nothing of more.
    explore_at_most : int, optional
        1 or more; exploring ends after so many rounds whatever the test says. By
        default only the test ends it.
    fraction_train : float
        Share of the clients that train in a round, in [0, 1], once exploring has ended.

    Notes
    -----
    The weights sum to one over the clients that train. The authors' code leaves the
    shares of all data, by which steps shrink to about ``fraction_train`` of what the
    updates say.

    The sets S of one client and round are the beginnings of one random order of the
    others, so that all of it takes ``K^3`` operations on the Gram matrix of the
    updates; each is a random set of its size all the same. More than 2000 clients are
    refused.

    A client that was not there to be explored is drawn as one whose ``psi`` is the mean
    of all. In the method the clients that are not drawn go on with the model that they
    have; in a simulation they do nothing, and evaluation is of the newest model. What a
    client was given is the record's ``syncs``: how many rounds it took part in.
    """

    beta: Annotated[float, Field(ge=0)] = 150.0
    settled: Annotated[float, Field(gt=0, lt=1)] = 0.7
    window: Annotated[int, Field(ge=2)] = 15
    tested: Annotated[int, Field(ge=1)] = 10
    explore_at_most: Annotated[int, Field(ge=1)] | None = None
    fraction_train: Annotated[float, Field(ge=0, le=1)] = 0.4

    def begin(self) -> dict[str, Any]:
        """Know nobody's contribution.

        ``rounds`` is how many explored; ``before`` has, by client, the sum of its
        contributions in the rounds before the last ones and how many these were;
        ``recent`` the contributions in each of the last ones; ``syncs`` how often each
        client took part.
        """
        return {"exploring": True, "rounds": 0, "before": {}, "recent": [], "syncs": {}}

    def draw(self, selection: Selection) -> Draw:
        """Draw all while exploring; then some, by what they contribute."""
        if selection.state["exploring"]:
            if len(selection.clients) > MOST_EXPLORED:
                raise ConfigurationError(
                    "FairIncentive holds all clients' updates against each other; at "
                    f"most {MOST_EXPLORED} clients fit, and there are "
                    f"{len(selection.clients)}. Choose another strategy, or fewer."
                )
            return Draw(1.0)
        psi = contributions(selection.state)
        usual = math.fsum(psi.values()) / max(len(psi), 1)
        known = np.array([psi.get(one, usual) for one in selection.clients])
        return Draw(self.fraction_train, chances(known, self.beta))

    def weights(self, round: Round) -> tuple[Tensor, dict[str, Any]]:
        """Return the shares of the data; while exploring, measure contributions."""
        state = dict(round.state)
        counts = dict(state["syncs"])
        state["syncs"] = counts | {one: counts.get(one, 0) + 1 for one in round.clients}
        round.log("exploring", float(state["exploring"]))
        if state["exploring"]:
            state |= self._explored(round, state)
        psi = contributions(state)
        known = [psi.get(one, math.nan) for one in round.clients]
        round.log("contribution", torch.tensor(known, dtype=torch.float64))
        syncs = [float(state["syncs"][one]) for one in round.clients]
        round.log("syncs", torch.tensor(syncs, dtype=torch.float64))
        return round.size_weights, state

    def _explored(self, round: Round, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return what changes with the contributions in a round."""
        gram = round.updates.gram().numpy()
        if not np.isfinite(gram).all():
            raise AggregationError(
                "some updates are so long that their products are no numbers; "
                "max_update_norm rejects such updates"
            )
        found = marginal_cosines(
            gram,
            round.size_weights.numpy(),
            lambda k: generator(
                self.seed, Purpose.CONTRIBUTION, round.number, round.clients[k]
            ).permutation(round.num_clients - 1),
        )
        here = dict(zip(round.clients, found.tolist(), strict=True))
        before, recent = state["before"], [*state["recent"], here]
        if len(recent) > self.window:
            before, recent = _merged(before, recent[:1]), recent[1:]
        rounds = state["rounds"] + 1
        over = self._is_settled(round, before, recent)
        if self.explore_at_most is not None:
            over |= rounds >= self.explore_at_most
        if over:
            before, recent = _merged(before, recent), []
        return {
            "exploring": not over,
            "rounds": rounds,
            "before": before,
            "recent": recent,
        }

    def _is_settled(
        self,
        round: Round,
        before: Mapping[int, Sequence[float]],
        recent: Sequence[Mapping[int, float]],
    ) -> bool:
        """Tell whether the last rounds' contributions are as all before."""
        there = [c for c in sorted(before) if all(c in one for one in recent)]
        if len(recent) < self.window or not there:
            return False
        stream = generator(self.seed, Purpose.SERVER, round.number)
        size = min(self.tested, len(there), self.window - 1)
        chosen = [there[k] for k in stream.choice(len(there), size, replace=False)]
        sample = np.array([[one[c] for c in chosen] for one in recent])
        mean = np.array([before[c][0] / before[c][1] for c in chosen])
        p_value = hotelling(sample, mean)
        round.log("p-value", p_value)
        return p_value > self.settled


def contributions(state: Mapping[str, Any]) -> dict[int, float]:
    """Return each client's mean contribution over the rounds that explored it."""
    total = _merged(state["before"], state["recent"])
    return {client: added / number for client, (added, number) in total.items()}


def _merged(
    before: Mapping[int, Sequence[float]], recent: Sequence[Mapping[int, float]]
) -> dict[int, list[float]]:
    """Add rounds to the sums, and to the numbers, of clients' contributions."""
    total = {client: [*sums] for client, sums in before.items()}
    for one in recent:
        for client, value in one.items():
            added, number = total.get(client, (0.0, 0))
            total[client] = [added + value, number + 1]
    return total


def chances(psi: _Array, beta: float) -> _Array:
    """Return ``softmax(beta * psi)``, ``[N]``; above 0 whatever the numbers.

    Examples
    --------
    >>> chances(np.array([0.10, 0.12, 0.15]), beta=30).round(4).tolist()
    [0.1369, 0.2495, 0.6136]
    """
    powers = np.exp(np.maximum(beta * (psi - psi.max()), -600))
    result: _Array = powers / powers.sum()
    return result


def marginal_cosines(
    gram: _Array, shares: _Array, order_of: Callable[[int], npt.NDArray[np.int64]]
) -> _Array:
    """Return how much each update turns sums of others towards the sum of all.

    Parameters
    ----------
    gram : ndarray
        ``[K, K]``, the inner products of the updates.
    shares : ndarray
        ``[K]``; what updates are multiplied by in a sum.
    order_of : Callable[[int], ndarray]
        Returns, for client k, an order of ``range(K - 1)``, the others in their order.
        The sets are its beginnings.

    Returns
    -------
    ndarray
        ``[K]``, each in [-2, 2]. The cosine with a sum that is zero counts as 0.

    Examples
    --------
    Two updates at right angles: alone each has a cosine of 0.7071 with their sum, which
    is what it adds to nobody; to the other it adds the rest.

    >>> marginal_cosines(
    ...     np.eye(2), np.array([0.5, 0.5]), lambda k: np.array([0])
    ... ).tolist()
    [0.5, 0.5]
    """
    inner = gram * shares[:, None] * shares
    inner = inner / max(inner.diagonal().max(), np.finfo(np.float64).tiny)
    toward, squares = inner.sum(1), inner.diagonal()
    whole, parts = toward.sum(), squares.sum()
    result = np.zeros(len(shares))
    for k in range(len(shares)):
        order = np.delete(np.arange(len(shares)), k)[order_of(k)]
        among = inner[np.ix_(order, order)]
        # Beginning with nobody, one more of the others each.
        dots = _sums(toward[order])
        lengths = _sums(2 * np.tril(among, -1).sum(1) + squares[order])
        theirs = _sums(squares[order])
        before = _cosines(dots, lengths, theirs, whole, parts)
        lengths = lengths + 2 * _sums(inner[k, order]) + squares[k]
        after = _cosines(dots + toward[k], lengths, theirs + squares[k], whole, parts)
        result[k] = (after - before).mean()
    return result


def _sums(values: _Array) -> _Array:
    return np.concatenate([[0.0], np.cumsum(values)])


def _cosines(
    dots: _Array, lengths: _Array, theirs: _Array, whole: float, parts: float
) -> _Array:
    """Return the sums' cosines with the whole; 0 where either is as good as zero."""
    there = lengths > NOTHING * theirs
    if not whole > NOTHING * parts:
        return np.zeros(len(dots))
    result = np.zeros(len(dots))
    result[there] = dots[there] / np.sqrt(lengths[there] * whole)
    return result.clip(-1, 1)


def hotelling(sample: _Array, mean: _Array) -> float:
    """Return the p-value of Hotelling's one-sample T² test.

    Harold Hotelling, "The Generalization of Student's Ratio", Annals of Mathematical
    Statistics 1931: with n rows, ``T² = n (x - m)' S^-1 (x - m)``, and
    ``T² (n - d) / (d (n - 1))`` has the F distribution with d and n - d degrees of
    freedom.

    Parameters
    ----------
    sample : ndarray
        ``[n, d]``, d below n.
    mean : ndarray
        ``[d]``; what the rows' mean is held against.

    Returns
    -------
    float
        In [0, 1]; near 1 the rows' mean is as near as it could be. Where rows differ in
        fewer than d directions, those are tested; along others the mean must be that of
        the rows, or else it is 0.

    Examples
    --------
    With one number a row it is Student's t test.

    >>> round(hotelling(np.array([[1.0], [2.0], [4.0]]), np.array([1.0])), 4)
    0.2697
    """
    from scipy.special import betainc

    n = len(sample)
    away = sample.mean(0) - mean
    _, spread, directions = np.linalg.svd(sample - sample.mean(0), full_matrices=False)
    scale = max(float(np.abs(sample).max()), float(np.abs(mean).max()))
    rank = int((spread > 1e-10 * scale * math.sqrt(n)).sum())
    along = directions[:rank] @ away
    rest = away - along @ directions[:rank]
    if np.linalg.norm(rest) > 1e-9 * scale:
        return 0.0
    if rank == 0:
        return 1.0
    t_squared = n * (n - 1) * float(np.square(along / spread[:rank]).sum())
    f = t_squared * (n - rank) / (rank * (n - 1))
    return float(betainc((n - rank) / 2, rank / 2, (n - rank) / (n - rank + rank * f)))
