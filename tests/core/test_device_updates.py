"""Updates whose rows lie on a device: what those in memory are, to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedweight.core import device_updates as module
from fedweight.core.device_updates import DeviceUpdates
from fedweight.core.local_models import HeldModels
from fedweight.core.module import FlatModule
from fedweight.core.updates import StackedUpdates

from ..waits import Waits

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def draw(k, p, tensors, seed, device="cpu", dtype=np.float32, **options):
    """Return updates on a device, and in memory in double precision."""
    stream = np.random.default_rng(seed)
    origin = stream.normal(size=p).astype(dtype)
    models = (origin + 0.01 * stream.normal(size=(k, p))).astype(dtype)
    cuts = np.sort(stream.integers(0, p + 1, tensors - 1)) if tensors > 1 else []
    offsets = [0, *map(int, cuts), p]
    rows = [torch.from_numpy(model) for model in models]
    there = [row.to(device) for row in rows]
    origin = torch.from_numpy(origin)
    exact = [row.double() for row in rows]
    return (
        DeviceUpdates(there, origin, offsets, **options),
        StackedUpdates(exact, origin.double(), offsets),
    )


def results(updates, device="cpu"):
    """Return everything that can be asked of updates."""
    stream = torch.Generator().manual_seed(1)

    def some(*shape):
        return torch.rand(shape, generator=stream, dtype=torch.float64).to(device)

    k, p, tensors = updates.num_clients, updates.num_parameters, updates.num_tensors
    w, c, v = some(k), some(k), 0.01 * some(p)
    return [
        updates.combine(w),
        updates.combine(some(k, tensors)),
        updates.dot(v),
        updates.dot(weights=w),
        *updates.dot_rest(v, own=c),
        *updates.dot_rest(weights=w, own=c),
        updates.distances(v, order=1),
        updates.distances(v, order=2, per_tensor=True),
        updates.distances(weights=w, order=1),
        updates.distances(weights=w, order=2, per_tensor=True),
        updates.norms(),
        updates.gram(),
        updates.pairwise_distances(),
        *(sheet for _, sheet in updates.column_blocks()),
    ]


def check(one, other):
    for found, expected in zip(results(one), results(other), strict=True):
        assert found.shape == expected.shape
        # A sum of updates of about 0.01 may be far smaller than they are.
        near = 1e-8 + 3e-6 * float(expected.abs().max()) if expected.numel() else 0.0
        np.testing.assert_allclose(found.cpu(), expected, rtol=3e-6, atol=near)
    assert torch.equal(one.changed, other.changed)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=25)
def test_they_are_what_those_in_memory_are(k, p, tensors, seed):
    check(*draw(k, p, tensors, seed))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kept", [True, False])
def test_many_pieces_and_columns(monkeypatch, device, kept):
    monkeypatch.setattr(module, "PIECE_VALUES", 5 * 3000)
    monkeypatch.setattr(module, "SUMMED_COLUMNS", 700)
    monkeypatch.setattr(module, "SHEET_COLUMNS", 1000)
    monkeypatch.setattr(module, "KEPT_VALUES", 1 << 30 if kept else 0)
    check(*draw(13, 3000, 5, 0, device))


@pytest.mark.parametrize("accumulate", [None, "float64", "float32"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_precision_is_that_of_those_in_memory(accumulate, dtype):
    options = {"dtype": dtype, "accumulate": accumulate}
    updates, _ = draw(4, 20, 1, 0, **options)
    origin = updates.origin
    other = StackedUpdates(updates.models, origin, accumulate=accumulate)
    for found, expected in zip(results(updates), results(other), strict=False):
        assert found.dtype == expected.dtype


def test_tensors_that_nobody_changed_are_told():
    origin = torch.ones(6)
    models = [origin.clone() for _ in range(3)]
    models[2][3] = 2.0
    updates = DeviceUpdates(models, origin, [0, 2, 2, 5, 6])
    assert updates.changed.tolist() == [False, False, True, False]


def test_models_are_read_and_never_changed():
    updates, _ = draw(3, 10, 1, 0)
    before = [model.clone() for model in updates.models]
    results(updates)
    assert all(map(torch.equal, updates.models, before))


@pytest.mark.parametrize("device", DEVICES)
def test_nobody_waits_for_what_is_wanted_there(device):
    updates, _ = draw(12, 300, 3, 0, device)
    w = torch.full((12,), 1 / 12, dtype=torch.float64, device=device)
    v = torch.ones(300, device=device)
    updates.combine(w)  # The differences are made.
    with Waits() as waits:
        mean = updates.combine(w)
        found = [
            mean,
            updates.dot(v),
            *updates.dot_rest(weights=w, own=w),
            updates.distances(mean, per_tensor=True),
        ]
    assert not waits.seen
    assert all(one.device.type == device for one in found)


@pytest.mark.parametrize("device", DEVICES)
def test_an_answer_is_where_what_was_given_is(device):
    updates, _ = draw(3, 10, 1, 0, device)
    here = torch.ones(3)
    assert updates.combine(here).is_cpu
    assert updates.norms().is_cpu
    assert updates.gram().is_cpu
    assert updates.columns(0, 4).is_cpu
    there = StackedUpdates([m.cpu() for m in updates.models], updates.origin)
    assert there.combine(here.to(device)).device.type == device
    assert there.dot(torch.ones(10, device=device)).device.type == device


@pytest.mark.parametrize("device", DEVICES)
def test_models_that_are_held_on_a_device_are_worked_on_there(device):
    start = FlatModule(torch.nn.Linear(2, 1)).save()
    models = {
        k: start.with_parameters((start.parameters + k).to(device)) for k in range(3)
    }
    updates = HeldModels(models).updates([2, 0], start)
    kind = StackedUpdates if device == "cpu" else DeviceUpdates
    assert isinstance(updates, kind)
    np.testing.assert_allclose(updates.norms(), [2 * 3**0.5, 0], rtol=1e-6)


def test_what_does_not_fit_is_refused():
    updates, _ = draw(3, 10, 1, 0)
    with pytest.raises(ValueError, match="a model must have shape"):
        DeviceUpdates([torch.ones(3)], torch.ones(4))
    with pytest.raises(ValueError, match="give either a vector"):
        updates.dot()
    with pytest.raises(ValueError, match="the vector must have shape"):
        updates.dot(torch.ones(3))
    with pytest.raises(ValueError, match="weights must have shape"):
        updates.dot(weights=torch.ones(10))
