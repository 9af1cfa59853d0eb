"""What a codec loses, how many bytes it takes, and that neither depends on others."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedweight.core.errors import AggregationError, ClientError, ConfigurationError
from fedweight.core.layout import FlatModel, Layout
from fedweight.core.rng import Purpose, generator
from fedweight.messages import _flower, keys, shared, wire
from fedweight.messages.arrays import FlatRecord
from fedweight.messages.codecs import (
    CODECS,
    BFloat16,
    Dense,
    LowBits,
    as_read,
    codec,
    num_bytes,
)

SHAPES = {"a": ((3, 5), "float32"), "b": ((7,), "float32"), "mean": ((2,), "float32")}
LAYOUT = Layout.of({**SHAPES, "n": ((), "int64")}, buffers={"mean"})


TOLD = ConfigRecord({keys.ROUND: 1})


def model(seed: int, scale: float = 1.0) -> FlatModel:
    values = np.random.default_rng(seed).normal(size=24).astype(np.float32) * scale
    parameters, buffers = torch.from_numpy(values).split([22, 2])
    return FlatModel(LAYOUT, parameters, buffers, {"n": np.array(seed)})


def draws(clients: int) -> list:
    return [partial(generator, 0, Purpose.CODING, 3, k) for k in range(clients)]


def test_levels_by_hand():
    # 3 bits: L = 3, so the step of max 6 is 2; of 0 everything is 0.
    values = torch.tensor([[6.0, -3.1, 0.9, 1.1], [0.0, 0.0, 0.0, 0.0]])
    read = LowBits(bits=3, rounding="nearest").as_read(values, None)
    assert read.tolist() == [[6.0, -4.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]]
    chance = torch.tensor([[0.9, 0.54, 0.54, 0.46], [0.9] * 4])
    read = LowBits(bits=3).as_read(values, chance)
    # -1.55 + .54 and .45 + .54 stay below the next level; .55 + .46 is above it.
    assert read.tolist() == [[6.0, -4.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]]


@given(
    bits=st.integers(2, 16),
    nearest=st.booleans(),
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
    seed=st.integers(0, 1000),
)
def test_the_error_is_bounded_by_the_step(bits, nearest, values, seed):
    one = LowBits(bits=bits, rounding="nearest" if nearest else "stochastic")
    given_ = torch.tensor([values], dtype=torch.float32)
    chance = torch.from_numpy(np.random.default_rng(seed).random((1, len(values))))
    read = one.as_read(given_, None if nearest else chance.float())
    step = given_.abs().max() / (2 ** (bits - 1) - 1)
    bound = step * (0.5 if nearest else 1.0)
    error = (read - given_).abs().max()
    # Below the smallest normal number a step is no more than a few bits itself.
    least = torch.finfo(torch.float32).tiny
    assert error <= bound * (1 + 1e-4) + 4e-7 * given_.abs().max() + least


def test_rounding_by_chance_is_right_in_the_mean():
    values = torch.tensor([[1.0, 0.3, -0.77, 0.0]])
    one = LowBits(bits=2)
    chance = torch.from_numpy(np.random.default_rng(0).random((20_000, 4))).float()
    mean = one.as_read(values.expand(20_000, 4), chance).mean(0)
    torch.testing.assert_close(mean, values[0], atol=0.015, rtol=0)


@pytest.mark.parametrize("one", [LowBits(bits=4), BFloat16(), Dense()])
def test_many_are_read_as_each_alone(one):
    start, models = model(99), [model(k, 0.1 + k) for k in range(5)]
    together = as_read(one, models, start, draws(5) if one.draws else [])
    for k, own in enumerate(models):
        alone = as_read(one, [own], start, draws(5)[k : k + 1] if one.draws else [])
        assert torch.equal(alone[0].parameters, together[k].parameters)
        assert torch.equal(together[k].buffers, own.buffers)
        assert together[k].integers == own.integers
        assert torch.equal(together[k].parameters, own.parameters) == one.exact


def test_each_tensor_has_a_step_of_its_own():
    start = model(0, 0.0)
    trained = model(1)
    trained.parameters[:15] *= 1000
    [read] = as_read(LowBits(8, "nearest"), [trained], start, [])
    small = trained.parameters[15:].abs().max() / 127
    assert (read.parameters - trained.parameters)[15:].abs().max() <= small / 2 * 1.001


def test_what_training_leaves_alone_stays():
    start = model(0)
    trained = FlatModel(LAYOUT, start.parameters.clone(), start.buffers)
    trained.parameters[3] += 1
    [read] = as_read(LowBits(2), [trained], start, draws(1))
    changed = torch.nonzero(read.parameters != start.parameters).flatten().tolist()
    assert changed == [3]


def test_what_is_not_finite_does_not_become_finite():
    for odd in (float("inf"), float("nan")):
        trained = model(1)
        trained.parameters[2] = odd
        [read] = as_read(LowBits(8), [trained], model(0), draws(1))
        assert not read.parameters.isfinite().all()


def test_bfloat16_is_the_nearest():
    start, trained = model(0), model(1)
    [read] = as_read(BFloat16(), [trained], start, [])
    error = (read.parameters - trained.parameters).abs() / trained.parameters.abs()
    assert 0 < error.max() <= 2**-8
    [again] = as_read(BFloat16(), [read], start, [])
    assert torch.equal(again.parameters, read.parameters)


def test_bytes():
    rest = 2 * 4 + 8  # buffers and the counter
    assert num_bytes(Dense(), LAYOUT) == 22 * 4 + rest == LAYOUT.num_bytes
    assert num_bytes(BFloat16(), LAYOUT) == 22 * 2 + rest
    assert num_bytes(LowBits(bits=8), LAYOUT) == (4 + 15) + (4 + 7) + rest
    assert num_bytes(LowBits(bits=3), LAYOUT) == (4 + 6) + (4 + 3) + rest


def test_a_codec_is_picked_by_name():
    made = {name: codec(name) for name in CODECS.entries}
    assert made["dense"] == Dense()
    with pytest.raises(ConfigurationError, match=r"bits must be .*17"):
        codec("low-bits", bits=17)
    with pytest.raises(ConfigurationError, match="not derived from"):
        codec("builtins:dict")


# What is told of every parameter, and models as they go over a network.


def test_what_is_shared_is_found_by_the_tensors_names():
    server = Layout.of({"a": ((3,), "float32"), "b": ((6,), "float32")}, ())
    mask = torch.tensor([1, 0, 1, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
    weights = torch.arange(9.0, dtype=torch.float64)
    told = {"mask": mask, "weights": weights, "rates": [0.5, 2.0]}
    assert shared.num_bytes(told.values()) == 2 + 9 * 8 + 2 * 8
    content = RecordDict({keys.SHARED: shared.shared_record(told, server)})
    sizes = {"b": 6, "a": 3, "more": 2}
    whole = shared.shared_of(content, sizes, ["a", "b"])
    assert whole["mask"].tolist() == mask.tolist()
    assert torch.equal(whole["weights"], weights)
    assert whole["rates"] == [0.5, 2.0]
    assert torch.equal(shared.mask_of(content, sizes, ["a", "b"]), whole["mask"])
    # A client that trains only one of them, or has them in another order.
    part = shared.shared_of(content, sizes, ["b"])
    assert part["weights"].tolist() == [3, 4, 5, 6, 7, 8]
    turned = shared.shared_of(content, sizes, ["b", "a"])
    assert turned["weights"].tolist() == [3, 4, 5, 6, 7, 8, 0, 1, 2]
    with pytest.raises(ClientError, match="nothing of the model's 'more'"):
        shared.shared_of(content, sizes, ["a", "more"])
    with pytest.raises(ClientError, match="a bit, for each of the model's 4 param"):
        shared.shared_of(content, {"a": 3, "b": 1}, ["a"])
    assert shared.shared_of(RecordDict(), sizes, ["a"]) == {}


def test_lists_alone_name_no_tensors():
    record = shared.shared_record({"rates": [0.5]}, LAYOUT)
    assert dict(record) == {"rates": [0.5]}
    content = RecordDict({keys.SHARED: record})
    assert shared.shared_of(content, {}, ["a"]) == {"rates": [0.5]}
    assert shared.mask_of(content, {}, ["a"]) is None
    odd = RecordDict({keys.SHARED: ConfigRecord({"rates": "fast"})})
    with pytest.raises(ClientError, match="tells 'fast' for 'rates', where only"):
        shared.shared_of(odd, {}, [])


CODEC_KINDS = [Dense(), BFloat16(), LowBits(2), LowBits(5), LowBits(16, "nearest")]


@pytest.mark.parametrize("one", CODEC_KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_read_is_what_a_simulation_takes(one, masked):
    start, trained = model(7), model(8, 2.0)
    mask = torch.arange(22) % 3 == 0 if masked else None
    if mask is not None:
        start.parameters[~mask] = 0
        trained.parameters[~mask] = 0
    draw = draws(1)[0] if one.draws else None
    record = wire.written(one, trained, start, draw, mask)
    assert list(record) == [*SHAPES, "n"]
    assert all(record[n].shape == shape for n, (shape, _) in SHAPES.items())
    found = wire.read(one, record, LAYOUT, start, mask)
    few = draws(1) if one.draws else []
    [expected] = as_read(one, [trained], start, few, mask)
    assert torch.equal(found.parameters, expected.parameters)
    assert torch.equal(found.buffers, trained.buffers)
    assert found.integers == trained.integers
    data = sum(len(record[name].data) for name in ("a", "b"))
    rest = 2 * 4 + 8
    assert data == num_bytes(one, LAYOUT, mask) - rest


@given(st.binary(max_size=40), st.sampled_from(CODEC_KINDS))
def test_whatever_bytes_come_are_read_or_refused(data, one):
    start = model(7)
    draw = draws(1)[0] if one.draws else None
    record = wire.written(one, model(8), start, draw)
    array = record["a"]
    record["a"] = Array(array.dtype, array.shape, array.stype, data)
    if len(data) != len(array.data):
        with pytest.raises(AggregationError, match="'a' has"):
            wire.read(one, record, LAYOUT, start)
    else:
        assert wire.read(one, record, LAYOUT, start).parameters.shape == (22,)


def test_a_wire_keeps_what_a_node_was_sent_until_it_has_answered():
    carried, trained = wire.Wire(BFloat16()), model(8)
    with _flower.task_identity(1):
        content = RecordDict({keys.ARRAYS: FlatRecord(model(7)), "config": TOLD})
        (sent,) = carried.write([Message(content, 1000, "train")])
        gone = weakref.ref(sent.content[keys.ARRAYS].flat)
        asked = Message(RecordDict(), 1000, "query.identity")
        carried.read([Message(RecordDict(), reply_to=asked)])
        own = wire.written(BFloat16(), trained, model(7))
        reply = Message(RecordDict({keys.ARRAYS: own}), reply_to=sent)
        (found,) = carried.read([reply])
    expected = trained.parameters.bfloat16().float()
    assert torch.equal(found.content[keys.ARRAYS].flat.parameters, expected)
    del content, sent, asked, reply
    gc.collect()
    assert gone() is None


def test_what_another_codec_wrote_is_refused():
    record = wire.written(BFloat16(), model(8), model(7))
    with pytest.raises(AggregationError, match="is not written by LowBits"):
        wire.read(LowBits(), record, LAYOUT, model(7))
