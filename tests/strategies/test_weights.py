"""From measurements to weights: what is promised of every one of them."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedweight.core.errors import AggregationError
from fedweight.strategies.weights import effective_clients, normalise, size_weights

sizes = st.lists(st.floats(0, 1e308), min_size=1, max_size=12)
weights = st.lists(st.floats(0, 1e300), min_size=1, max_size=12)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@given(sizes)
def test_size_weights_are_shares_of_one(values):
    found = size_weights(tensor(values))
    assert (found >= 0).all()
    assert float(found.sum()) == pytest.approx(1)
    if not any(values):
        assert found.tolist() == [1 / len(values)] * len(values)


@given(weights)
def test_effective_clients_are_from_one_to_all(values):
    found = effective_clients(tensor(values))
    if any(values):
        assert 1 - 1e-9 <= found <= len(values) + 1e-9
    else:
        assert found == 0


@given(st.integers(1, 40), st.floats(1e-300, 1e300))
def test_equal_weights_are_so_many_clients_and_one_alone_is_one(k, weight):
    assert effective_clients(tensor([weight] * k)) == pytest.approx(k)
    assert effective_clients(tensor([weight] + [0.0] * k)) == pytest.approx(1)


@given(st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=12))
def test_normalised_weights_sum_to_one_and_none_is_negative(raw):
    fallback = torch.full((len(raw),), 1 / len(raw), dtype=torch.float64)
    found = normalise(tensor(raw), fallback)
    assert (found >= 0).all()
    assert float(found.sum()) == pytest.approx(1)
    positive = tensor(raw).clamp(min=0)
    expected = positive / positive.sum() if positive.any() else fallback
    torch.testing.assert_close(found, expected)


def test_one_client_has_all_the_weight_whatever_was_measured():
    assert normalise(tensor([-3.0]), tensor([0.2])).tolist() == [1.0]


def test_a_fallback_is_said(caplog):
    with caplog.at_level(logging.WARNING, logger="fedweight"):
        normalise(tensor([0.0, -1.0]), tensor([0.5, 0.5]))
    assert "falling back to data size" in caplog.text


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_no_number_is_an_error(odd):
    with pytest.raises(AggregationError, match="not finite"):
        normalise(tensor([1.0, odd]), tensor([0.5, 0.5]))
