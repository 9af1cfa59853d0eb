"""The round's metrics: the clients' means, by data size."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedweight.core.records import ClientRecord
from fedweight.messages.dispatch import Reply
from fedweight.server.reported import (
    OWN_METRICS,
    AcceptedReply,
    OwnMetrics,
    mean_metrics,
    recorded_metrics,
    sort_metrics,
)

SIZES = st.one_of(st.just(0.0), st.integers(1, 100).map(float))
VALUES = st.one_of(st.just(float("nan")), st.floats(-1e6, 1e6), st.integers(-9, 9))


def mean(sizes: Any, **columns: Any) -> dict[str, Any]:
    good = []
    for k, size in enumerate(sizes):
        metrics = {name: column[k] for name, column in columns.items()}
        sorted_ones = sort_metrics({"num-examples": size, **metrics})
        good.append(AcceptedReply(k, Reply(k), size, *sorted_ones))
    entries = [ClientRecord(one.client, "ok", own_metrics=one.own) for one in good]
    return dict(mean_metrics(good, "num-examples", OwnMetrics().limit(entries)))


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


def test_who_reports_no_number_takes_no_mean_away() -> None:
    found = mean([1, 2], a=[1.0, [2.0]], b=[3, 6], c=["x", "y"])
    assert found == {"a": 1.0, "b": 5.0}
    assert mean([1, 2]) == {}


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan, 10**400])
def test_what_is_not_finite_has_no_share_in_a_mean(odd: float) -> None:
    assert mean([1, 2, 1], a=[3.0, 6.0, odd]) == {"a": 5.0}


def test_large_values_and_sizes_have_a_mean() -> None:
    assert mean([4, 4], a=[1.5e308, 1.3e308]) == {"a": pytest.approx(1.4e308)}
    assert mean([1e308, 1e308, 0], a=[2.0, 4.0, 9.0]) == {"a": 3.0}


def test_names_of_one_client_do_not_crowd_out_others() -> None:
    nothing = [math.nan] * 3
    own = {f"{n:05}": [1.0, *nothing[1:]] for n in range(30_000)}
    found = mean([1, 1, 1], **own, z=[math.nan, 2.0, 4.0], zz=nothing)
    assert "z" not in found  # It is not among the first of every client.
    found = mean([1, 1, 1], **{"0": [math.nan, 2.0, 4.0]}, **own)
    assert found["0"] == 3.0
    assert len(found) == OWN_METRICS


def test_a_run_records_so_many_metrics_of_clients_own_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    limit = OwnMetrics()
    for number in range(40):
        entries = [
            ClientRecord(k, "ok", own_metrics={f"m{number}-{k}": 1.0, "f1": 0.5})
            for k in range(3)
        ]
        names = limit.limit(entries)
        assert all("f1" in entry.own_metrics for entry in entries)
        assert {n for e in entries for n in e.own_metrics} <= names
    assert len(names) == OWN_METRICS
    (line,) = [r.message for r in caplog.records]
    assert line.startswith("clients report more than 32 metrics of their own; m")


def test_no_value_out_of_range_takes_the_place_of_the_servers_mean() -> None:
    found = mean([1, 1, 1], **{"train-accuracy": [0.5, 87.5, 0.7]})
    assert found == {"train-accuracy": pytest.approx(0.6)}
    assert mean([1], **{"train-accuracy": [87.5]}) == {}


def test_a_known_name_out_of_its_range_is_a_number_of_the_clients_own() -> None:
    known, own = sort_metrics(
        {"train-accuracy": 87.5, "num-steps": -1, "train-loss": -2.0, "f1": [1.0]}
    )
    assert known == {"train-loss": -2.0}
    assert own == {"train-accuracy": 87.5, "num-steps": -1.0}
    known, own = sort_metrics({"accuracy": math.nan, "loss": math.inf})
    assert set(known) == {"accuracy", "loss"}
    assert not own


def test_the_record_tells_whose_a_metric_is() -> None:
    found = recorded_metrics({"train-loss": 1.0, "weight": 7, "note": [1.0]})
    assert found == {"train-loss": 1.0, "own-weight": 7.0}
