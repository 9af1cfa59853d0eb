"""Models that lie as rows on a device: read there, and brought together."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedweight.core import model_rows
from fedweight.core.device_updates import DeviceUpdates
from fedweight.core.errors import AggregationError
from fedweight.core.local_models import HeldModels, JoinedModels, moved
from fedweight.core.model_rows import ModelRow, ModelRows
from fedweight.core.module import FlatModule
from fedweight.core.rows import changed_tensors
from fedweight.core.updates import StackedUpdates
from fedweight.messages.arrays import FlatRecord
from fedweight.messages.codecs import DENSE, as_read
from fedweight.messages.dispatch import Answers, Cohort, Gathered, Reply
from fedweight.server.admission import check_model
from fedweight.simulations.workers.worker import _parted

from ..elsewhere import DEVICE, Elsewhere

START = FlatModule(
    nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
).save()
CLIENTS = 7


def rows_on(device, clients=CLIENTS):
    """Models that differ from the one that they began with, all but a tensor."""
    stream = torch.Generator().manual_seed(0)
    parameters = START.parameters.repeat(clients, 1)
    parameters[:, 8:] += torch.rand(parameters[:, 8:].shape, generator=stream)
    buffers = torch.rand(clients, len(START.buffers), generator=stream)
    integers = {name: np.arange(clients) for name in START.integers}
    where = parameters.to(device), buffers.to(device)
    return ModelRows(START.layout, *where, integers, START.frozen)


@pytest.fixture(params=["elsewhere", pytest.param("cuda", marks=pytest.mark.gpu)])
def there(request):
    """A device, and what counts copies from it where that can be."""
    elsewhere = request.param == "elsewhere"
    with Elsewhere() if elsewhere else nullcontext() as mode:
        device = DEVICE if elsewhere else torch.device("cuda")
        seen = mode.seen if elsewhere else Counter()
        yield SimpleNamespace(device=device, seen=seen, counts=elsewhere)


def same(one, other):
    assert torch.equal(one.parameters, other.parameters)
    assert torch.equal(one.buffers, other.buffers)
    assert one.integers == other.integers


def test_all_are_brought_when_one_is_looked_at(there):
    here, rows = rows_on("cpu"), rows_on(there.device)
    before = Counter(there.seen)
    part = rows.travelling()
    for models in (rows, part):
        for k, row in enumerate(models.there()):
            same(row(), here[k])
            assert row().parameters.is_cpu
            assert row.parameters.device.type == there.device.type
    assert not there.counts or there.seen["down"] - before["down"] == 2


@pytest.mark.parametrize("part", ["parameters", "buffers"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found_in_one_go(there, part, value):
    rows = rows_on(there.device)
    getattr(rows, part)[3, -1] = value
    before = there.seen["down"] + there.seen["read"]
    replies = [Reply(k, model) for k, model in enumerate(rows.there())]
    assert [r.is_finite() for r in replies] == [k != 3 for k in range(CLIENTS)]
    with pytest.raises(AggregationError, match="NaN or infinite values"):
        check_model(replies[3], "arrays")
    check_model(replies[2], "arrays")
    assert there.seen["down"] + there.seen["read"] - before <= 1


def test_a_negative_variance_is_found_where_it_lies(there):
    rows, [entry] = rows_on(there.device), START.layout.variances
    rows.buffers[2, entry.start] = -0.5
    replies = [Reply(k, model) for k, model in enumerate(rows.there())]
    for k, reply in enumerate(replies):
        if k == 2:
            with pytest.raises(AggregationError, match=r"'1\.running_var', a variance"):
                check_model(reply, "arrays")
            with pytest.raises(AggregationError, match=r"'1\.running_var', a variance"):
                check_model(Reply(k, rows[k]), "arrays")
        else:
            check_model(reply, "arrays")


@given(
    st.sets(st.tuples(st.integers(0, 3), st.integers(0, 9))), st.sets(st.integers(0, 3))
)
@settings(max_examples=40)
def test_changed_tensors_are_those_of_models_in_memory(changes, places):
    start, offsets = torch.arange(10.0), [0, 2, 2, 5, 9, 10]
    models = start.repeat(4, 1)
    for k, column in changes:
        models[k, column] = torch.nan if column == 4 else -1.0
    good = sorted(places) or [0]
    expected = changed_tensors([models[k] for k in good], start, offsets)
    with Elsewhere():
        rows = ModelRows(
            START.layout, models.to(DEVICE), models[:, :0], {}, START.frozen
        )
        found = rows.changed(good, start, offsets)
    assert found.tolist() == expected.tolist()


def test_updates_are_made_where_all_rows_are(there):
    rows, nodes = rows_on(there.device), [5, 0, 3]
    weights = torch.tensor([0.5, 0.3, 0.2])
    held = HeldModels(dict(enumerate(rows.there())))
    here = HeldModels(dict(enumerate(rows_on("cpu"))))
    for of in ("updates", "buffers"):
        found, expected = (getattr(m, of)(nodes, START) for m in (held, here))
        assert isinstance(found, DeviceUpdates)
        assert isinstance(expected, StackedUpdates)
        torch.testing.assert_close(found.combine(weights), expected.combine(weights))
        torch.testing.assert_close(found.norms(), expected.norms())
    assert held.integers(nodes) == here.integers(nodes)


def test_rows_in_several_places_are_brought_at_once(there):
    rows = rows_on(there.device)
    here = dict(enumerate(rows_on("cpu")))
    mixed = {k: here[k] if k % 2 else row for k, row in enumerate(rows.there())}
    before = there.seen["down"]
    found = HeldModels(mixed).updates(range(CLIENTS), START)
    assert isinstance(found, StackedUpdates)
    assert not there.counts or there.seen["down"] - before == 1
    for row, model in zip(found.models, here.values(), strict=True):
        assert torch.equal(row, model.parameters)


def test_rows_of_several_starts_are_joined_where_they_lie(there):
    rows, here = rows_on(there.device).there(), [*rows_on("cpu")]
    weights = torch.linspace(0.1, 1, CLIENTS)
    some = [*range(3)], [*range(3, CLIENTS)]
    found, expected = (
        JoinedModels([(own, HeldModels({k: models[k] for k in own})) for own in some])
        for models in (rows, here)
    )
    for of in ("updates", "buffers"):
        one, other = (getattr(m, of)(range(CLIENTS), START) for m in (found, expected))
        assert isinstance(one, DeviceUpdates)
        torch.testing.assert_close(one.combine(weights), other.combine(weights))
    starts = [START, START.with_parameters(START.parameters + 0.25)]
    one, other = (
        moved(
            [m.updates(own, s) for own, s in zip(some, starts, strict=True)],
            some,
            START,
        )
        for m in (found, expected)
    )
    assert isinstance(one, DeviceUpdates)
    torch.testing.assert_close(one.combine(weights), other.combine(weights))


def test_what_a_mask_leaves_out_is_left_out_where_the_rows_lie(there):
    mask = torch.arange(len(START.parameters)) % 3 == 0
    found, expected = (
        as_read(DENSE, models, START, [], mask)
        for models in (rows_on(there.device), [*rows_on("cpu")])
    )
    assert isinstance(found, ModelRows)
    assert found.parameters.device.type == there.device.type
    for one, other in zip(found, expected, strict=True):
        same(one, other)


def test_what_goes_to_another_process_is_brought(there):
    replies = [Reply(k, row) for k, row in enumerate(rows_on(there.device).there())]
    before = there.seen["down"]
    side, found = _parted(replies)
    assert not there.counts or there.seen["down"] - before == 2
    assert all(reply.model is None for reply in replies)
    for k, model in enumerate(rows_on("cpu")):
        np.testing.assert_array_equal(found[k], model.parameters)
        np.testing.assert_array_equal(side.buffers[k], model.buffers)


def test_rows_stay_where_they_leave_room(there, monkeypatch):
    model = START.parameters.nbytes + START.buffers.nbytes
    cohort = Cohort(RecordDict({"arrays": FlatRecord(START)}), range(100), "train")
    for memory, stays in [(None, True), (800 * model, True), (799 * model, False)]:
        monkeypatch.setattr(model_rows, "device_memory", lambda _, m=memory: m)
        gathered = Gathered(cohort, [cohort.nodes])
        rows = rows_on(there.device)
        answers = Answers([Reply(k) for k in range(CLIENTS)], models=rows)
        answers.hand_out()
        gathered.add(answers)
        kinds = {type(reply.model) for reply in answers.replies}
        assert kinds == {ModelRow if stays else type(START)}
        gathered.make_room()
        for k, reply in enumerate(answers.replies):
            same(reply.model, rows[k])


def test_the_device_that_is_not_there_refuses_what_a_device_does():
    with Elsewhere() as mode:
        one = torch.arange(3.0).to(DEVICE)
        with pytest.raises(RuntimeError, match="on the device and on the CPU"):
            one + torch.ones(3)
        with pytest.raises(RuntimeError, match="numpy"):
            one.numpy()
        assert (one + torch.tensor(1.0)).tolist() == [1.0, 2.0, 3.0]
        assert mode.seen == {"up": 1, "down": 1}
        assert float(one.sum()) == 3.0
        there = torch.zeros(3, device=DEVICE)
        there[:2].add_(one[1:])
        torch.zeros(3).copy_(there)
    assert mode.seen == {"up": 1, "down": 2, "read": 1}
    assert there.tolist() == [1.0, 2.0, 0.0]


@pytest.mark.parametrize("places", [[0, 1, 2], [1, 3, 4], [2, 3, 5]])
def test_those_who_did_not_train_stand_among_the_others(there, places):
    others = [START.with_parameters(START.parameters * k) for k in range(6)]
    others = [replace(m, integers=rows_on("cpu")[0].integers) for m in others]
    found = rows_on(there.device, 3).among(places, others)
    expected = dict(zip(places, rows_on("cpu", 3), strict=True))
    assert found.parameters.device.type == there.device.type
    assert len(found) == 6
    for k, model in enumerate(found):
        same(model, expected.get(k, others[k]))
