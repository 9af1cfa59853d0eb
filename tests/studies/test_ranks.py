"""Ranks over data sets: scipy's, and groups that no test tells apart."""

from __future__ import annotations

import itertools
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedweight.core.errors import ConfigurationError
from fedweight.core.rng import Purpose, generator
from fedweight.studies.ranks import (
    Ranking,
    SignedRanks,
    _cliques,
    rank_methods,
    signed_ranks,
)
from fedweight.studies.statistics import LEVEL, mean_ranks

COARSE = st.lists(st.integers(0, 6).map(lambda k: k / 8), min_size=1, max_size=12)


@given(COARSE)
def test_mean_ranks_are_scipys(values: list[float]) -> None:
    assert mean_ranks(values).tolist() == stats.rankdata(values).tolist()


def test_rounding_makes_no_ranks() -> None:
    assert mean_ranks([0.3 - 0.2, 0.2 - 0.1, 0.5]).tolist() == [1.5, 1.5, 3]
    assert mean_ranks([]).tolist() == []


@settings(max_examples=50)
@given(st.integers(2, 5), st.integers(1, 9), st.integers(0, 2**31), st.booleans())
def test_average_ranks_and_p_values_are_scipys(
    k: int, n: int, seed: int, less: bool
) -> None:
    values = np.random.default_rng(seed).random((k, n))
    names = [f"m{m}" for m in range(k)]
    found = rank_methods(
        dict(zip(names, values.tolist(), strict=True)), less_is_better=less
    )
    expected = stats.rankdata(values if less else -values, axis=0).mean(axis=1)
    for name, rank in zip(names, expected, strict=True):
        assert found.average_ranks[name] == pytest.approx(rank)
    assert [*found.average_ranks.values()] == sorted(found.average_ranks.values())
    p = {
        frozenset((names[a], names[b])): stats.wilcoxon(values[a], values[b]).pvalue
        for a, b in itertools.combinations(range(k), 2)
    }
    steps = np.sort([*p.values()]) * np.arange(len(p), 0, -1)
    corrected = np.minimum(np.maximum.accumulate(steps), 1)
    assert sorted(found.p_holm.values()) == pytest.approx(corrected.tolist())
    # Groups: nobody in one is told apart, and no other could join it.
    apart = {frozenset(pair) for pair, value in found.p_holm.items() if value <= LEVEL}
    brute = {
        group
        for size in range(2, k + 1)
        for group in itertools.combinations([*found.average_ranks], size)
        if not any(
            frozenset(pair) in apart for pair in itertools.combinations(group, 2)
        )
    }
    largest = {g for g in brute if not any(set(g) < set(other) for other in brute)}
    assert set(found.cliques) == largest


def test_a_chain_is_two_groups() -> None:
    names = ["a", "b", "c", "d"]
    apart = {frozenset("ac"), frozenset("ad"), frozenset("bd")}
    assert _cliques(names, apart) == (("a", "b"), ("b", "c"), ("c", "d"))
    assert _cliques(["a"], set()) == ()


def _found() -> Ranking:
    rng = np.random.default_rng(3)
    base = rng.random(12)
    return rank_methods(
        {
            "worst": base.tolist(),
            "good": (base + 0.1 + 0.01 * rng.random(12)).tolist(),
            "<as good>": (base + 0.1 + 0.01 * rng.random(12)).tolist(),
        }
    )


def test_a_method_that_is_always_worse_stands_alone() -> None:
    found = _found()
    assert found.average_ranks["worst"] == 3
    assert [set(group) for group in found.cliques] == [{"good", "<as good>"}]
    assert (found.data_sets, found.needed) == (12, 7)
    lines = str(found).splitlines()
    assert "12 data sets" in lines[0]
    assert "Holm over 3 pairs" in lines[0]
    assert [line.endswith("|") for line in lines[1:]] == [True, True, False]
    root = ElementTree.fromstring(found.svg())
    text = "".join(root.itertext())
    assert "worst 3.00" in text
    assert "<as good>" in text
    circles = root.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 2
    assert found._repr_svg_() == found.svg()


def test_too_few_data_sets_tell_nobody_apart() -> None:
    found = rank_methods({"a": [0.1, 0.2], "b": [0.3, 0.4], "c": [0.5, 0.6]})
    assert found.average_ranks == {"c": 1, "b": 2, "a": 3}
    assert found.cliques == (("c", "b", "a"),)
    assert "cannot reach 0.05 with fewer than 7" in found.note


def test_a_data_set_that_one_lacks_is_left_out() -> None:
    found = rank_methods({"a": [0.1, math.nan, 0.2], "b": [0.2, 0.3, 0.1]})
    assert found.data_sets == 2
    assert found.average_ranks == {"a": 1.5, "b": 1.5}
    one = rank_methods({"a": [0.1, math.nan], "b": [0.2, 0.3]})
    assert one.note.startswith("average ranks over 1 data set, 1 is best")
    nothing = rank_methods({"a": [math.nan], "b": [0.1]})
    assert math.isnan(nothing.average_ranks["a"])
    assert nothing.data_sets == 0
    assert str(nothing) == nothing.note
    assert "no data set on which every method has a value" in nothing.note
    assert "nan" not in nothing.svg()
    ElementTree.fromstring(nothing.svg())


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="must have one value a data set"):
        rank_methods({"a": [0.1], "b": [0.1, 0.2]})
    with pytest.raises(ConfigurationError, match="got no method"):
        rank_methods({})


# ---------------------------------------------------------------- the Bayesian's answer

SIXTEENTHS = st.lists(st.integers(-8, 8).map(lambda k: k / 16), min_size=1, max_size=6)


def shared_out(d: list[float], rope: float, draws: int, seed: int) -> list[float]:
    """Say it pair by pair, as its definition has it."""
    z = [0.0, *d]
    rng = generator(seed, Purpose.BOOTSTRAP, 1)
    wins = np.zeros(3)
    for weights in rng.dirichlet([0.5, *[1.0] * len(d)], draws):
        shares = np.zeros(3)
        for (a, u), (b, v) in itertools.product(zip(z, weights, strict=True), repeat=2):
            at = 0 if a + b > 2 * rope else 2 if a + b < -2 * rope else 1
            shares[at] += u * v
        best = np.isclose(shares, shares.max(), rtol=0, atol=1e-12)
        wins += best / best.sum()
    return (wins / draws).tolist()


@settings(max_examples=30, deadline=None)
@given(SIXTEENTHS, st.sampled_from([0.0, 1 / 16, 0.3]), st.integers(0, 99))
def test_signed_ranks_are_what_every_pair_says(
    d: list[float], rope: float, seed: int
) -> None:
    zeros = [0.0] * len(d)
    found = signed_ranks(zeros, d, rope=rope, draws=40, seed=seed)
    expected = shared_out(d, rope, 40, seed)
    assert [found.better, found.same, found.worse] == pytest.approx(expected)
    assert found.better + found.same + found.worse == pytest.approx(1)
    less = signed_ranks(zeros, d, rope=rope, draws=40, seed=seed, less_is_better=True)
    assert (less.better, less.worse) == (found.worse, found.better)


def test_what_a_known_difference_says() -> None:
    rng = np.random.default_rng(0)
    first = rng.random(20)
    ahead = signed_ranks(first.tolist(), (first + 0.1 + 0.01 * rng.random(20)).tolist())
    assert ahead.better > 0.999
    alike = signed_ranks(first.tolist(), (first + 0.001 * rng.random(20)).tolist())
    assert alike.same > 0.999
    # Without a region of equivalence either side is as probable.
    d = rng.random(10).tolist()
    noise, zeros = [*d, *(-x for x in d)], [0.0] * 20
    even = signed_ranks(zeros, noise, rope=0.0)
    assert even.better == pytest.approx(even.worse, abs=0.02)
    assert even == signed_ranks(zeros, noise, rope=0.0)
    assert even != signed_ranks(zeros, noise, rope=0.0, seed=1)


def test_a_data_set_that_one_lacks_is_no_pair_either() -> None:
    found = signed_ranks([0.1, math.nan, 0.2], [0.5, 0.3, 0.6])
    assert found == signed_ranks([0.1, 0.2], [0.5, 0.6])
    nothing = signed_ranks([math.nan], [0.1])
    assert (nothing.data_sets, math.isnan(nothing.better)) == (0, True)
    assert isinstance(nothing, SignedRanks)


@pytest.mark.parametrize(
    ("more", "said"),
    [({"rope": -0.1}, "rope"), ({"prior": 0.0}, "prior"), ({"draws": 0}, "draws")],
)
def test_signed_ranks_that_cannot_be(more: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        signed_ranks([0.1], [0.2], **more)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="must have one value a data set"):
        signed_ranks([0.1], [0.2, 0.3])
