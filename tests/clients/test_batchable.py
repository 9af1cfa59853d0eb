"""Substitutes for what cannot be batched, and what is said where they are needed."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedweight.clients import Objective
from fedweight.clients.batchable import mean_where, means_by_group, one_hot
from fedweight.clients.trying import Findings, try_batched
from fedweight.data import Examples

CODES = st.lists(st.integers(0, 4), min_size=1, max_size=9)


@given(CODES)
def test_one_hot_is_pytorchs(codes):
    codes = torch.tensor(codes)
    assert torch.equal(one_hot(codes, 5, torch.int64), F.one_hot(codes, 5))


@given(CODES)
def test_means_by_group_are_those_of_each_groups_values(codes):
    values = torch.arange(len(codes), dtype=torch.float64) ** 2
    groups = torch.tensor(codes)
    means, counts = means_by_group(values, groups, 5)
    for g in range(5):
        own = values[groups == g]
        assert counts[g] == len(own)
        assert means[g] == pytest.approx(float(own.mean()) if len(own) else 0)
    mask = torch.ones(len(codes) + 1, dtype=torch.float64)
    mask[-1] = 0
    padded = torch.cat([values, torch.tensor([torch.nan], dtype=torch.float64)])
    again = means_by_group(padded, torch.cat([groups, groups[:1]]), 5, mask)
    assert torch.equal(again[0], means)
    assert torch.equal(again[1], counts)


def test_a_mean_of_some_values_sees_no_others():
    values = torch.tensor([1.0, torch.nan, 4.0])
    assert mean_where(values, torch.tensor([True, False, True])) == 2.5
    assert mean_where(values, torch.zeros(3) > 0) == 0


class Own(Objective):
    def __init__(self, value):
        self.value = value

    def batch_loss(self, outputs, batch, facts):
        return self.value(outputs, batch.y)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (lambda z, y: (F.one_hot(y, 3) * z).sum(), "write fedweight.*one_hot"),
        (lambda z, y: z[y > 0].sum(), "write torch.where, or .*mean_where"),
        (lambda z, y: z.sum() * len(y.unique()), "write torch.where, or"),
        (lambda z, y: z.sum() * y.sum().item(), r"and no .item\(\)"),
        (lambda z, y: z.sum() if y.sum() > 0 else z.mean(), "torch.where for a cond"),
        (lambda z, y: z.sum() * y.tolist()[0], r"and no .numpy\(\) or .tolist\(\)"),
        (lambda z, y: z[torch.multinomial(z[:, 0].exp(), 2)].sum(), "batch.uniform"),
    ],
)
def test_the_line_that_cannot_be_batched_is_named_with_a_substitute(value, said):
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    examples = Examples(x, np.array([0, 1, 2, 1]))
    why = try_batched(
        lambda: nn.Linear(5, 3), examples, Own(value), "cpu", Findings(), 4
    )
    number = value.__code__.co_firstlineno
    assert why.startswith(
        f"its step cannot be batched: test_batchable.py, line {number}, '"
    )
    assert re.search(said, why), why
