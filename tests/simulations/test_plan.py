"""The plan: how a cohort is cut, and what that changes."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedweight.core.errors import ConfigurationError
from fedweight.messages.dispatch import Cohort
from fedweight.simulations.plan import (
    EVALUATION_CHUNK,
    EVALUATION_LISTS,
    LONGEST_EVALUATION,
    LONGEST_LOOP,
    LOOP_LISTS,
    Plan,
    sizes_of,
)


def cohort_of(count: int, kind: str = "train") -> Cohort:
    content = RecordDict({"config": ConfigRecord()})
    return Cohort(content, range(1000, 1000 + count), kind)


@given(st.integers(0, 300), st.integers(1, 50), st.booleans(), st.booleans())
def test_every_node_is_in_one_list_and_the_lists_are_balanced(
    count: int, chunk: int, train: bool, known: bool
) -> None:
    cohort = cohort_of(count, "train" if train else "evaluate")
    sizes = [k * 7919 % 101 for k in range(count)] if known else None
    lists = Plan(chunk).cut(cohort, sizes)
    assert sorted(node for part in lists for node in part) == cohort.nodes
    lengths = [len(part) for part in lists]
    assert not lengths or max(lengths) - min(lengths) <= 1
    assert Plan(chunk).cut(cohort, sizes) == lists


@given(st.integers(2, 500), st.integers(2, 60))
def test_nobody_trains_alone_where_clients_train_at_once(
    count: int, chunk: int
) -> None:
    lengths = [len(part) for part in Plan(chunk).cut(cohort_of(count), None)]
    assert min(lengths) >= 2
    assert max(lengths) <= max(chunk, 3)
    if chunk == 2:  # Of an odd number three go together.
        assert lengths.count(3) == count % 2


@pytest.mark.parametrize("chunk", [1, 4])
def test_the_largest_come_first_with_their_like(chunk: int) -> None:
    sizes = [3, 50, 3, 7, 100, 50, 1, 7, 3, 2]
    lists = Plan(chunk).cut(cohort_of(10), sizes)
    in_order = [sizes[node - 1000] for part in lists for node in part]
    assert in_order == sorted(sizes, reverse=True)
    # Among equals the order is the cohort's.
    assert [n for part in lists for n in part if sizes[n - 1000] == 3] == [
        1000,
        1002,
        1008,
    ]


def test_without_sizes_and_for_evaluation_the_order_is_the_cohorts() -> None:
    cohort = cohort_of(70, "evaluate")
    sizes = list(range(70))
    lists = Plan().cut(cohort, sizes)
    assert [node for part in lists for node in part] == cohort.nodes
    assert max(map(len, lists)) <= EVALUATION_CHUNK
    for count, number in ((1000, EVALUATION_LISTS), (10_000, 40)):
        lists = Plan().cut(cohort_of(count, "evaluate"), None)
        assert len(lists) == number
        assert max(map(len, lists)) <= LONGEST_EVALUATION
    lists = Plan(8).cut(cohort_of(70), None)
    assert [node for part in lists for node in part] == cohort.nodes


def test_clients_of_a_loop_are_handed_out_in_lists_neither_many_nor_long() -> None:
    assert len(Plan().cut(cohort_of(10), None)) == 10
    assert len(Plan().cut(cohort_of(700), None)) <= LOOP_LISTS
    assert max(map(len, Plan().cut(cohort_of(10_000), None))) <= LONGEST_LOOP


def test_sizes_are_the_apps_where_it_knows() -> None:
    class App:
        sizes = np.array([5, 6, 7])

    assert sizes_of(App(), [2, 0]) == [7, 5]
    assert sizes_of(object(), [2, 0]) is None


def test_a_chunk_is_of_one_client_at_least() -> None:
    with pytest.raises(ConfigurationError, match=r"chunk must be in \[1, inf\), got 0"):
        Plan(0)


@pytest.mark.parametrize("plan", [Plan(), Plan(2), Plan(20)])
def test_a_plan_is_written_as_it_is_read(plan: Plan) -> None:
    assert Plan.parse(str(plan)) == plan


@pytest.mark.parametrize("text", ["batched", "batched-1", "batched--2", "Loop", ""])
def test_a_plan_that_cannot_be_read_says_what_is_allowed(text: str) -> None:
    with pytest.raises(ConfigurationError, match="'auto', 'loop' or 'batched-N'"):
        Plan.parse(text)
    assert Plan.parse("auto") is None
