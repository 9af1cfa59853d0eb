"""Paired comparisons: as scipy has them, and as many false claims as they promise."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedweight.core.errors import ConfigurationError
from fedweight.core.rng import Purpose, generator
from fedweight.studies.statistics import (
    LEVEL,
    bootstrap_interval,
    compare_pairs,
    effect_size,
    holm,
    pairs_needed,
    t_interval,
    t_test,
    wilcoxon,
)
from fedweight.studies.summarizing import summary_of

NAN = math.nan
VALUES = st.lists(st.floats(-1, 1), min_size=2, max_size=12)
# Accuracies of a few test examples: ties and zeros abound.
COARSE = st.lists(st.integers(-4, 4).map(lambda k: k / 8), min_size=1, max_size=9)


def spread(values: list[float]) -> bool:
    return float(np.ptp(values)) > 1e-6


@given(VALUES.filter(spread))
def test_the_t_test_and_its_interval_are_scipys(values: list[float]) -> None:
    found = stats.ttest_rel(values, np.zeros(len(values)))
    assert float(t_test(values)) == pytest.approx(found.pvalue, rel=1e-9, abs=1e-15)
    low, high = found.confidence_interval(0.95)
    assert t_interval(values) == pytest.approx((low, high), abs=1e-9)
    expected = found.statistic / math.sqrt(len(values))
    assert effect_size(values) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(st.lists(st.floats(1e-3, 1), min_size=1, max_size=12, unique=True), st.data())
def test_the_signed_rank_test_is_scipys(
    sizes: list[float], data: st.DataObject
) -> None:
    sizes = [size + 1e-6 * k for k, size in enumerate(sorted(sizes))]  # No ties.
    signs = data.draw(st.tuples(*[st.sampled_from([-1, 1])] * len(sizes)))
    values = [sign * size for sign, size in zip(signs, sizes, strict=True)]
    assert wilcoxon(values) == pytest.approx(stats.wilcoxon(values).pvalue)


@given(COARSE)
def test_with_ties_it_is_what_all_signs_give(values: list[float]) -> None:
    x = np.array([v for v in values if v])
    if not len(x):
        assert wilcoxon(values) == 1
        return
    ranks = stats.rankdata(np.abs(x))
    sums = [np.dot(s, ranks) for s in itertools.product([0, 1], repeat=len(x))]
    ours = ranks[x > 0].sum()
    low = np.mean([s <= ours + 1e-9 for s in sums])
    high = np.mean([s >= ours - 1e-9 for s in sums])
    assert wilcoxon(values) == pytest.approx(min(1, 2 * min(low, high)))
    assert wilcoxon([-v for v in values]) == wilcoxon(values)


def test_rounding_makes_no_ranks() -> None:
    # 0.3 - 0.2 and 0.2 - 0.1 differ in their last bits, and tie.
    assert 0.3 - 0.2 != 0.2 - 0.1
    assert wilcoxon([0.3 - 0.2, -(0.2 - 0.1), 0.5]) == wilcoxon([0.1, -0.1, 0.5])


@pytest.mark.parametrize("n", [2, 3, 5, 10, 30])
def test_the_bootstrap_is_scipys_of_the_same_draws(n: int) -> None:
    values = np.random.default_rng(n).gamma(2, size=n)
    expected = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=2000,
        method="BCa",
        confidence_level=0.9,
        rng=generator(7, Purpose.BOOTSTRAP),
    ).confidence_interval
    found = bootstrap_interval(values, 0.1, resamples=2000, seed=7)
    assert found == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_the_bootstrap_draws_the_same_each_time() -> None:
    values = np.random.default_rng(1).normal(size=30)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    # A hypothesis falls where every set of hypotheses that holds it falls.
    every = range(len(p_values))
    for one in every:
        sets = [
            s
            for k in range(1, len(p_values) + 1)
            for s in itertools.combinations(every, k)
        ]
        closed = max(len(s) * min(p_values[j] for j in s) for s in sets if one in s)
        assert holm(p_values)[one] == pytest.approx(min(closed, 1))


def test_a_test_that_was_not_made_counts_as_a_comparison() -> None:
    assert holm([0.01, NAN])[0] == 0.02
    assert math.isnan(holm([0.01, NAN])[1])
    assert holm([]) == []


def test_ten_thousand_draws_without_a_difference() -> None:
    rng = np.random.default_rng(14)
    draws = rng.normal(size=(10_000, 10)) - rng.normal(size=(10_000, 10))
    claims = np.mean(t_test(draws) <= LEVEL)
    assert 0.044 <= claims <= 0.056
    signed_ranks = np.mean([wilcoxon(row) <= LEVEL for row in draws])
    assert signed_ranks <= 0.056
    print(f"false claims: t {claims:.2%}, Wilcoxon {signed_ranks:.2%}")
    # What a comparison says is that test's word.
    for row in draws[:40]:
        one = compare_pairs(np.zeros(10).tolist(), {"b": row.tolist()})["b"]
        assert (one.verdict != "undecided") is bool(t_test(row) <= LEVEL)
        assert (one.wilcoxon_verdict != "undecided") is (wilcoxon(row) <= LEVEL)


def test_ten_thousand_families_without_a_difference() -> None:
    rng = np.random.default_rng(15)
    p = t_test(rng.normal(size=(10_000, 5, 10)) - rng.normal(size=(10_000, 1, 10)))
    claims = np.mean([min(holm(row)) <= LEVEL for row in p])
    assert claims <= 0.056


@pytest.mark.parametrize("peculiar", [0.0, 1.0, 3.0])
def test_data_sets_that_differ_make_no_false_claims(peculiar: float) -> None:
    """What is peculiar to a data set is in all of its seeds, of one method or other."""
    rng = np.random.default_rng(17)
    draws, data_sets, seeds = 10_000, 8, 5
    d = rng.normal(0, peculiar, (draws, data_sets, 1))
    d = d + rng.normal(0, 1, (draws, data_sets, seeds))
    p = t_test(d.mean(axis=2))
    claims = np.mean(p <= LEVEL)
    together = np.mean(t_test(d.reshape(draws, -1)) <= LEVEL)
    print(f"{peculiar}: false claims {claims:.2%}, seeds as pairs {together:.2%}")
    assert 0.044 <= claims <= 0.056
    assert bool(together > 0.2) is (peculiar > 0)
    # What a comparison says over all data sets is that test's word.
    for number in range(20):
        row = over_all(0.5 + np.stack([0 * d[number], d[number]]))
        assert row["pairs"] == row["n"] == data_sets
        assert row["p"] == pytest.approx(p[number])
        assert (row["verdict"] != "undecided") is bool(p[number] <= LEVEL)
        expected = stats.wilcoxon(d[number].mean(axis=1)).pvalue
        assert row["wilcoxon_p"] == pytest.approx(expected)


def over_all(values: np.ndarray) -> dict[str, Any]:
    """Return the second strategy's row over all data sets, of ``[2, D, S]`` or NaN."""
    cells = [
        {
            **{"strategy": "ab"[k], "data": f"d{i}", "seed": j, "chosen": 1},
            **{"status": "complete", "failed_rounds": 0, "test_accuracy": value},
        }
        for (k, i, j), value in np.ndenumerate(values)
    ]
    return summary_of(cells)[-1]


@settings(max_examples=30)
@given(st.integers(2, 7), st.integers(1, 4), st.integers(0, 2**31))
def test_over_data_sets_means_of_the_same_seeds_are_compared(
    data_sets: int, seeds: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.random((2, data_sets, seeds))
    values[rng.random(values.shape) < 0.2] = NAN
    row = over_all(values)
    pairs = [
        (np.mean(first[both]), np.mean(second[both]))
        for first, second in zip(*values, strict=True)
        if (both := np.isfinite(first) & np.isfinite(second)).any()
    ]
    assert row["pairs"] == len(pairs)
    if len(pairs) > 1:
        first, second = np.array(pairs).T
        assert row["difference"] == pytest.approx(second.mean() - first.mean())
        expected = stats.ttest_rel(second, first)
        interval = expected.confidence_interval()
        assert row["p"] == pytest.approx(expected.pvalue)
        assert row["difference_low"] == pytest.approx(interval.low)
        assert f"({len(pairs)} data sets)" in row["sentence"]
    own = [np.nanmean(of) for of in values[1] if np.isfinite(of).any()]
    assert row["n"] == len(own)
    if own:
        assert row["mean"] == pytest.approx(np.mean(own))


def test_the_power_is_what_the_noncentral_t_says() -> None:
    rng = np.random.default_rng(16)
    found = np.mean(t_test(rng.normal(1.0, 1.0, size=(10_000, 10))) <= LEVEL)
    law = stats.nct(df=9, nc=math.sqrt(10))
    limit = stats.t.ppf(1 - LEVEL / 2, 9)
    expected = law.sf(limit) + law.cdf(-limit)
    print(f"power at one standard deviation: {found:.2%}, by its law {expected:.2%}")
    assert found == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("comparisons", "pairs"), [(1, 6), (5, 8), (7, 9), (15, 10)])
def test_too_few_pairs_cannot_reach(comparisons: int, pairs: int) -> None:
    assert pairs_needed(comparisons) == pairs
    for n, reaches in ((pairs - 1, False), (pairs, True)):
        first = [0.5] * n
        # The strongest that there can be: every pair points the same way.
        others = {
            f"m{m}": [0.6 + 0.01 * k for k in range(n)] for m in range(comparisons)
        }
        for one in compare_pairs(first, others).values():
            assert (one.wilcoxon_verdict == "cannot reach") is not reaches
            assert (one.wilcoxon_p_holm <= LEVEL) is reaches


def test_pairs_without_a_difference_help_no_test_to_reach() -> None:
    first = [0.5] * 6
    found = compare_pairs(first, {"a": [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]})["a"]
    assert (found.pairs, found.wilcoxon_verdict) == (6, "cannot reach")


def test_verdicts() -> None:
    first = [0.90, 0.91, 0.92, 0.93]
    found = compare_pairs(
        first,
        {
            "up": [0.93, 0.95, 0.94, 0.97],
            "down": [0.80, 0.82, 0.82, 0.82],
            "noise": [0.91, 0.90, 0.93, 0.92],
            "none": first,
            "shift": [v + 0.01 for v in first],
        },
    )
    verdicts = {name: one.verdict for name, one in found.items()}
    assert verdicts == {
        "up": "better",
        "down": "worse",
        "noise": "undecided",
        "none": "same",
        "shift": "undecided",
    }
    assert all(one.sentence.startswith(one.verdict) for one in found.values())
    assert "4 pairs, Holm over 5 comparisons" in found["up"].sentence
    assert "not one of 4 pairs differs" in found["none"].sentence
    assert "all 4 pairs differ by the same +0.0100" in found["shift"].sentence
    assert math.isnan(found["shift"].p)
    assert found["shift"].bootstrap_low == found["shift"].bootstrap_high


def test_where_less_is_better_only_the_verdict_turns() -> None:
    losses = {"up": [0.93, 0.95, 0.94, 0.97], "down": [0.80, 0.82, 0.82, 0.82]}
    first = [0.90, 0.91, 0.92, 0.93]
    more, less = (compare_pairs(first, losses, less_is_better=b) for b in (False, True))
    for name, verdicts in (("up", ("better", "worse")), ("down", ("worse", "better"))):
        assert (more[name].verdict, less[name].verdict) == verdicts
        assert less[name].sentence.startswith(f"{verdicts[1]}: ")
        assert (more[name].difference, more[name].p_holm) == (
            less[name].difference,
            less[name].p_holm,
        )


def test_a_seed_that_one_of_them_lacks_is_no_pair() -> None:
    first = [0.90, NAN, 0.92, 0.93, 0.94]
    whole = compare_pairs([0.90, 0.93, 0.94], {"a": [0.93, 0.95, 0.99]})["a"]
    assert compare_pairs(first, {"a": [0.93, 1.0, NAN, 0.95, 0.99]})["a"] == whole
    few = compare_pairs([0.9, NAN], {"a": [0.8, 0.9]})["a"]
    assert (few.pairs, few.verdict) == (1, "undecided")
    assert few.wilcoxon_verdict == "cannot reach"
    assert "1 pair, and a t test needs 2" in few.sentence
    assert math.isnan(compare_pairs([NAN], {"a": [0.8]})["a"].difference)


@settings(max_examples=50)
@given(VALUES.filter(spread), st.data())
def test_who_is_first_turns_the_sign_only(
    values: list[float], data: st.DataObject
) -> None:
    other = data.draw(st.tuples(*[st.floats(-1, 1)] * len(values)).map(list))
    there = compare_pairs(values, {"b": other})["b"]
    back = compare_pairs(other, {"a": values})["a"]
    assert back.difference == -there.difference
    assert back.p == pytest.approx(there.p, nan_ok=True)
    assert back.wilcoxon_p == there.wilcoxon_p
    turned = {"better": "worse", "worse": "better"}
    assert back.verdict == turned.get(there.verdict, there.verdict)


def test_what_does_not_pair_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="ida must have one value a pair"):
        compare_pairs([0.1, 0.2], {"ida": [0.1]})
    with pytest.raises(ConfigurationError, match=r"level must be in \(0, 1\), got 1"):
        compare_pairs([0.1, 0.2], {"ida": [0.1, 0.2]}, level=1.0)
    with pytest.raises(ConfigurationError, match="comparisons must be in"):
        pairs_needed(0)
