"""Products of adapters, averaged and factored again, held against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedweight.core.layout import FlatModel, Layout
from fedweight.core.products import put_products, refactored
from fedweight.core.updates import StackedUpdates


def nearest(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def federation(out, rank, inputs, clients, seed):
    rng = np.random.default_rng(seed)
    shapes = {"head": ((3,), "float64"), "b": ((out, rank), "float64")}
    layout = Layout.of({**shapes, "a": ((rank, inputs), "float64")}, ())
    rows = rng.normal(size=(clients + 1, layout.num_parameters))
    start = FlatModel(layout, torch.from_numpy(rows[0]), torch.empty(0))
    models = [torch.from_numpy(row) for row in rows[1:]]
    updates = StackedUpdates(models, start.parameters, layout.offsets)
    return start, updates, rows


def factors(row, out, rank, inputs):
    b, a = np.split(row[3:], [out * rank])
    return b.reshape(out, rank), a.reshape(rank, inputs)


@given(
    out=st.integers(1, 9),
    rank=st.integers(1, 4),
    inputs=st.integers(1, 9),
    clients=st.integers(1, 4),
    seed=st.integers(0, 100),
    whole=st.booleans(),
)
def test_the_product_is_that_of_numpy(out, rank, inputs, clients, seed, whole):
    start, updates, rows = federation(out, rank, inputs, clients, seed)
    weights = np.random.default_rng(seed).random(clients) + 0.1
    if whole:
        weights /= weights.sum()
    found = start.parameters + updates.combine(torch.from_numpy(weights))
    head = found[:3].clone()
    put_products(found, start, updates, torch.from_numpy(weights), [("b", "a")])
    products = [b @ a for b, a in (factors(r, out, rank, inputs) for r in rows)]
    expected = products[0] * (1 - weights.sum())
    expected = expected + sum(w * p for w, p in zip(weights, products[1:], strict=True))
    b, a = factors(found.numpy(), out, rank, inputs)
    np.testing.assert_allclose(b @ a, nearest(expected, rank), atol=1e-9)
    assert torch.equal(found[:3], head)


def test_two_clients_by_hand():
    # A = (1, 0), (0, 1) and B alike: the mean of the products is half the identity.
    eye = torch.eye(2, dtype=torch.float64)
    b, a = refactored(0.5 * eye, eye, eye)
    np.testing.assert_allclose(b @ a, 0.5 * eye, atol=1e-12)
    b, a = refactored(0.5 * eye, eye, eye[:1])
    assert torch.linalg.matrix_norm(b @ a) == pytest.approx(0.5)
    assert torch.linalg.matrix_norm(0.5 * eye - b @ a) == pytest.approx(0.5)


def test_rows_keep_their_length_and_can_be_learned_from_where_b_is_0():
    like = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 5)))
    zero = torch.zeros(4, 3, dtype=torch.float64)
    b, a = refactored(zero, like, like)
    assert not b.any()
    length = float(like.norm()) / np.sqrt(3)
    np.testing.assert_allclose(a.norm(dim=1), length)
    np.testing.assert_allclose(a @ a.T, length**2 * np.eye(3), atol=1e-12)


@given(
    lost=st.integers(0, 3),
    rank=st.integers(1, 4),
    seed=st.integers(0, 100),
)
def test_rounding_moves_no_factor(lost, rank, seed):
    # The product has fewer directions than the adapter, as behind a softmax of two.
    rng = np.random.default_rng(seed)
    few = max(rank - lost, 0)
    left, right = rng.normal(size=(6, few)), rng.normal(size=(few, 5))
    like = torch.from_numpy(rng.normal(size=(rank, 5)))
    found = [
        refactored(
            torch.from_numpy(np.hstack([left, noise * rng.normal(size=(6, rank))])),
            torch.cat([torch.from_numpy(right), like]),
            like,
            1e-6 if few else 1.0,
        )
        for noise in (0.0, 1e-10)
    ]
    for mine, other in zip(*found, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)


def test_rows_without_a_direction_are_those_of_before():
    eye = torch.eye(3, dtype=torch.float64)
    b, a = refactored(2 * eye[:, :1], eye[:1], eye)
    assert torch.equal(a, eye)
    np.testing.assert_allclose(b, 2 * eye * eye[0], atol=1e-15)
