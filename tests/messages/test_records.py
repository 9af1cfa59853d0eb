"""Which numbers a client may report, alike in messages and without them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given
from hypothesis import strategies as st

from fedweight.core.errors import AggregationError
from fedweight.messages import records
from fedweight.messages.records import as_measured, check_side_data

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)


@given(ANYTHING)
def test_what_is_measured_can_be_sent(value: Any) -> None:
    found = as_measured(value)
    if found is None:
        return
    sent = RecordDict(
        {"m": MetricRecord({"a": found}), "p": ConfigRecord({"a": found})}
    )
    back = recorddict_from_proto(recorddict_to_proto(sent))
    np.testing.assert_array_equal(np.asarray(back["m"]["a"]), np.asarray(found))  # type: ignore[index]
    np.testing.assert_array_equal(np.asarray(back["p"]["a"]), np.asarray(found))  # type: ignore[index]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor([1.0, 2.0]), [1.0, 2.0]),
        (torch.tensor(3), 3),
        (np.uint8(3), 3),
        (np.array([2**63 - 1], np.uint64), [2**63 - 1]),
        (np.array([2**63], np.uint64), None),
        (np.ones((2, 2)), None),
        ([[1], [1, 2]], None),
        (["a"], None),
        (1j, None),
        ({}, None),
        ([], []),
    ],
)
def test_what_a_probe_may_return(value: Any, expected: Any) -> None:
    found = as_measured(value)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    "value",
    [7, "many", b"\0", ["a"], [1.0, math.nan], [math.inf], [10**400], [[1], [2]], None],
)
def test_side_data_are_finite_numbers(value: Any) -> None:
    with pytest.raises(AggregationError, match="its 'v' must be a list of at most 1,0"):
        check_side_data("v", value)


def test_side_data_have_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    check_side_data("v", [0.0, 1, -3])
    check_side_data("v", [])
    monkeypatch.setattr(records, "MOST_NUMBERS", 3)
    check_side_data("v", [1, 2, 3])
    assert as_measured([1, 2, 3]) == [1, 2, 3]
    assert as_measured([1, 2, 3, 4]) is None
    with pytest.raises(AggregationError, match="at most 3 finite"):
        check_side_data("v", [1, 2, 3, 4])
