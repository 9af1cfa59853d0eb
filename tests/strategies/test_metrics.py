"""The round's metrics: the clients' means, by data size."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedweight.strategies.fedavg import FedAvg

SIZES = st.one_of(st.just(0.0), st.integers(1, 100).map(float))
VALUES = st.one_of(st.just(float("nan")), st.floats(-1e6, 1e6), st.integers(-9, 9))


def mean(sizes: Any, **columns: Any) -> dict[str, Any]:
    good: Any = [
        SimpleNamespace(
            num_examples=size,
            reply=SimpleNamespace(
                metrics={
                    "num-examples": size,
                    **{name: column[k] for name, column in columns.items()},
                }
            ),
        )
        for k, size in enumerate(sizes)
    ]
    return dict(FedAvg()._mean_metrics(good, None))


@given(st.lists(st.tuples(SIZES, VALUES, VALUES), min_size=1, max_size=12))
def test_means_are_over_those_who_know(rows: list[tuple[float, float, float]]) -> None:
    sizes, a, b = map(list, zip(*rows, strict=True))
    found = mean(sizes, a=a, b=b)
    assert "num-examples" not in found
    for name, column in (("a", a), ("b", b)):
        known = ~np.isnan(np.array(column, float))
        values, p = np.array(column, float)[known], np.array(sizes)[known]
        if not len(values):
            assert name not in found
            continue
        expected = np.average(values, weights=p if p.any() else None)
        assert found[name] == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_a_mean_is_the_same_bits_whatever_else_is_reported() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 50, 1000).tolist()
    a, b, c = rng.normal(size=(3, 1000)).tolist()
    alone = mean(sizes, a=a)["a"]
    assert alone == mean(sizes, a=a, b=b)["a"] == mean(sizes, c=c, b=b, a=a)["a"]


def test_what_is_no_number_everywhere_has_no_mean() -> None:
    found = mean([1, 2], a=[1.0, [2.0]], b=[3, 6], c=["x", "y"])
    assert found == {"b": 5.0}
    assert mean([1, 2]) == {}
