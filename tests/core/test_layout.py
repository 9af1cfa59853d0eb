import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from io import BytesIO
from unittest import mock

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from fedweight.core.errors import AggregationError, ClientError, ConfigurationError
from fedweight.core.layout import Base, FlatModel, Layout, as_tensor
from fedweight.core.module import FlatModule
from fedweight.messages.arrays import (
    FlatRecord,
    complete,
    flatten,
    layout_of,
    leaves_out_base,
    view,
)


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def record_of(module):
    return ArrayRecord(module.state_dict())


def plain(**arrays):
    return ArrayRecord({n: Array(np.asarray(a)) for n, a in arrays.items()})


def flat_record():
    record = record_of(net())
    return FlatRecord(flatten(record, layout_of(record))), record


def same(a, b):
    assert list(a) == list(b)
    for name in b:
        assert a[name].dtype == b[name].dtype
        assert a[name].shape == b[name].shape
        np.testing.assert_array_equal(a[name].numpy(), b[name].numpy())


# Layouts and vectors.


def test_the_layout_of_a_record_is_that_of_its_module():
    module = net()
    layout = layout_of(record_of(module))
    assert layout == Layout.of_module(module)
    kinds = {e.name: e.kind for e in layout.entries}
    assert kinds["1.running_mean"] == kinds["1.running_var"] == "buffer"
    assert kinds["1.num_batches_tracked"] == "integer"
    assert kinds["1.weight"] == "parameter"
    assert layout.num_parameters == sum(p.numel() for p in module.parameters())
    assert layout.num_buffers == 8
    assert layout.offsets == (0, 12, 16, 20, 24, 32, 34)
    assert layout.dtype == torch.float32


def test_buffers_may_be_named():
    record = plain(w=np.zeros(2, np.float32), mean=np.zeros(3, np.float32))
    assert layout_of(record).num_parameters == 5
    layout = layout_of(record, buffers=["mean"])
    assert (layout.num_parameters, layout.num_buffers) == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip(dtype):
    module = net().to(dtype)
    module(torch.randn(8, 3, dtype=dtype))
    record = record_of(module)
    flat = flatten(record, layout_of(record))
    assert flat.parameters.dtype == dtype
    same(FlatRecord(flat), record)
    other = net().to(dtype)
    other.load_state_dict(flat.state_dict())
    for name, tensor in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


arrays = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.bool_]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
    elements=st.integers(0, 1),
)


@given(st.dictionaries(st.text("abc.", min_size=1, max_size=4), arrays, min_size=1))
def test_round_trip_of_any_arrays(named):
    """No dimension, no values, any kind of number, any order in memory."""
    record = ArrayRecord({n: Array(np.asfortranarray(a)) for n, a in named.items()})
    layout = layout_of(record)
    flat = flatten(record, layout)
    rebuilt = FlatRecord(flat)
    same(rebuilt, record)
    same(FlatRecord(flatten(rebuilt.plain(), layout)), record)


def test_the_order_of_a_reply_does_not_matter():
    layout = layout_of(plain(a=np.zeros(1), b=np.zeros(2)))
    flat = flatten(plain(b=np.ones(2), a=np.zeros(1)), layout)
    assert flat.parameters.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"a": np.zeros(2)}, "missing 'n'"),
        ({"a": np.zeros(2), "n": 1, "b": 0.0}, "unexpected 'b'"),
        ({"a": np.zeros(3), "n": 1}, "'a' has shape [3] in the record, and [2] in"),
        ({"a": np.zeros((2, 1)), "n": 1}, "'a' has shape [2, 1]"),
        ({"a": np.zeros(2, complex), "n": 1}, "'a' has dtype complex128"),
        ({"a": np.array(["x", "y"]), "n": 1}, "'a' has dtype <U1"),
        ({"a": np.zeros(2), "n": 1.5}, "'n' has dtype float64 in the record, and int"),
    ],
)
def test_what_does_not_fit_is_named(reply, message):
    layout = layout_of(plain(a=np.zeros(2), n=np.int64(1)))
    with pytest.raises(AggregationError) as caught:
        flatten(plain(**reply), layout)
    assert message in str(caught.value)


def test_values_beyond_float32_become_infinite_without_a_warning():
    layout = layout_of(plain(a=np.zeros(1, np.float32)))
    assert flatten(plain(a=[1e300]), layout).parameters.isinf().all()


def test_objects_are_never_unpickled():
    array = Array(np.zeros(1))
    data = BytesIO()
    np.lib.format.write_array(data, np.array([print], dtype=object), allow_pickle=True)
    array = Array("object", (1,), "numpy.ndarray", data.getvalue())
    with pytest.raises(AggregationError, match="Python objects"):
        view(array)
    for junk in (b"", b"junk", data.getvalue()[:20]):
        with pytest.raises(AggregationError, match="cannot be read"):
            view(Array("float32", (1,), "numpy.ndarray", junk))


NUMBERS = st.one_of(
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"),
    hnp.boolean_dtypes(),
)


@given(hnp.arrays(NUMBERS, hnp.array_shapes(min_dims=0, min_side=0)), st.booleans())
def test_numbers_are_read_as_numpy_reads_them_without_pythons_parser(values, fortran):
    # In CPython before 3.11.8 two threads in the parser at once can fail.
    array = Array(np.asarray(values, order="F" if fortran else "C"))
    expected = array.numpy()
    with mock.patch("ast.parse", side_effect=AssertionError("the parser was asked")):
        read = view(array)
    assert read.dtype == expected.dtype
    assert read.shape == expected.shape
    assert read.flags.f_contiguous == expected.flags.f_contiguous
    assert read.tobytes() == expected.tobytes()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_other_versions_of_numpys_format_are_read(version):
    data = BytesIO()
    np.lib.format.write_array(data, np.arange(6).reshape(2, 3), version)
    array = Array("int64", (2, 3), "numpy.ndarray", data.getvalue())
    assert view(array).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_truncated_array_is_an_error():
    array = Array(np.zeros(10))
    short = Array("float64", (10,), "numpy.ndarray", array.data[:-8])
    with pytest.raises(AggregationError, match="cannot be read"):
        view(short)


def test_view_does_not_copy_and_may_not_be_written():
    array = Array(np.arange(4.0))
    assert not view(array).flags.writeable
    assert view(array).tolist() == [0, 1, 2, 3]


def test_read_only_memory_becomes_a_tensor_without_a_copy():
    array = np.arange(4.0)
    shared = array[:]
    shared.flags.writeable = False
    tensor = as_tensor(shared)
    array[0] = 9
    assert tensor[0] == 9


def test_with_parameters_keeps_the_rest():
    record = record_of(net())
    flat = flatten(record, layout_of(record))
    new = flat.with_parameters(torch.zeros(flat.layout.num_parameters).double())
    assert new.parameters.dtype == torch.float32
    assert new.buffers is flat.buffers
    assert new.integers is flat.integers


# FlatRecord is an ArrayRecord.


def test_reads_as_an_ordinary_record():
    for look in (
        lambda r: list(r),
        lambda r: list(r.keys()),
        len,
        lambda r: "0.weight" in r,
        lambda r: "nothing" in r,
        lambda r: [a.dtype for a in r.values()],
        lambda r: [(n, a.shape) for n, a in r.items()],
        lambda r: r["0.bias"].numpy().tolist(),
        lambda r: r.get("nothing"),
        lambda r: r.count_bytes(),
        repr,
        lambda r: [a.tolist() for a in r.to_numpy_ndarrays()],
        lambda r: sorted(r.children),
        lambda r: r.object_id,
        lambda r: r.deflate(),
        bool,
    ):
        flat, ordinary = flat_record()
        assert look(flat) == look(ArrayRecord(dict(FlatRecord(flat.flat).items()))), (
            "another answer than an ordinary record"
        )
        assert flat.flat is not None
    flat, ordinary = flat_record()
    same(flat, ordinary)
    state = flat.to_torch_state_dict()
    assert torch.equal(state["0.weight"], ordinary.to_torch_state_dict()["0.weight"])


def test_equality():
    flat, ordinary = flat_record()
    assert flat == FlatRecord(flat.flat)
    assert flat == flat.plain()
    assert flat.plain() == flat or flat == flat.plain()
    assert flat != ArrayRecord()
    assert len(ordinary) == len(flat)


def test_the_length_needs_no_arrays():
    flat, _ = flat_record()
    assert len(flat) == 9
    assert not flat.__dict__["_data"]


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.__setitem__("0.bias", Array(np.full(4, 7, np.float32))),
        lambda r: r.update({"0.bias": Array(np.full(4, 7, np.float32))}),
        lambda r: r.__delitem__("0.bias"),
        lambda r: r.pop("0.bias"),
        lambda r: r.popitem(),
        lambda r: r.clear(),
        lambda r: r.setdefault("extra", Array(np.zeros(1))),
        lambda r: r.to_numpy_ndarrays(keep_input=False),
    ],
)
def test_a_change_makes_it_an_ordinary_record(change):
    flat, _ = flat_record()
    ordinary = FlatRecord(flat.flat).plain()
    vectors = flat.flat.parameters.clone()
    model = flat.flat
    change(flat)
    change(ordinary)
    assert flat.flat is None
    same(flat, ordinary)
    same(pickle.loads(pickle.dumps(flat)), ordinary)
    same(flat.copy(), ordinary)
    assert torch.equal(model.parameters, vectors)


def test_a_changed_record_is_read_as_changed():
    flat, _ = flat_record()
    layout = flat.flat.layout
    flat["0.bias"] = Array(np.full(4, 7, np.float32))
    read = flatten(flat, layout)
    assert read.parameters[12:16].tolist() == [7] * 4
    assert flatten(FlatRecord(read), layout) is read


def test_copy():
    flat, ordinary = flat_record()
    for looked in (False, True):
        if looked:
            list(flat.items())
        twin = flat.copy()
        assert isinstance(twin, FlatRecord)
        assert twin.flat is flat.flat
        same(twin, ordinary)
        del twin["0.bias"]
        assert "0.bias" in flat
        assert flat.flat is not None


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(protocol):
    flat, ordinary = flat_record()
    again = pickle.loads(pickle.dumps(flat, protocol))
    assert isinstance(again, FlatRecord)
    assert again.flat.layout == flat.flat.layout
    same(again, ordinary)


def test_pickle_over_read_only_memory():
    flat, ordinary = flat_record()
    buffers = []
    data = pickle.dumps(flat, 5, buffer_callback=buffers.append)
    shared = [memoryview(bytes(b.raw())) for b in buffers]
    assert shared
    again = pickle.loads(data, buffers=shared)
    same(again, ordinary)


def test_deflates_to_what_any_node_reads():
    flat, ordinary = flat_record()
    assert flat.deflate() == flat.plain().deflate()
    children = flat.children
    again = ArrayRecord.inflate(flat.deflate(), children)
    assert type(again) is ArrayRecord
    same(again, ordinary)


def test_integers_only():
    record = plain(n=np.arange(3))
    flat = flatten(record, layout_of(record))
    assert flat.parameters.numel() == 0
    same(FlatRecord(flat), record)


# FlatModule: a module over vectors.


def test_a_module_over_vectors():
    torch.manual_seed(0)
    module, twin = net(), net()
    twin.load_state_dict(module.state_dict())
    flat = FlatModule(module)
    x = torch.randn(6, 3)
    for m in (module, twin):
        m(x).square().sum().backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in twin.parameters()])
    assert torch.equal(flat.gradients, gradient)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    optimizer.step()
    flat.parameters -= 0.1 * flat.gradients
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], tensor)


def test_load_and_save():
    source = net()
    source(torch.randn(5, 3))
    record = record_of(source)
    model = flatten(record, layout_of(record))
    flat = FlatModule(net())
    flat.load(model)
    saved = flat.save()
    same(FlatRecord(saved), record)
    flat.parameters.zero_()
    flat.buffers.zero_()
    same(FlatRecord(saved), record)
    assert isinstance(saved, FlatModel)


def test_a_model_without_dimensions():
    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

    flat = FlatModule(Scalar())
    assert flat.parameters.tolist() == [2.0]
    flat.parameters.fill_(3)
    assert flat.module.scale.item() == 3
    assert flat.module.scale.shape == ()


def tied():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    module[0].bias.requires_grad_(False)
    return module


def test_tied_tensors_are_one_place_in_the_vector():
    module = tied()
    flat = FlatModule(module)
    kinds = {e.name: (e.kind, e.of) for e in flat.layout.entries}
    assert kinds["1.weight"] == ("tied", "0.weight")
    assert flat.layout.num_parameters == 6
    flat.parameters.copy_(torch.arange(6.0))
    assert module[1].weight.tolist() == [[0, 1], [2, 3]]
    whole = flat.save()
    assert list(whole.state_dict()) == list(module.state_dict())
    other = tied()
    other.load_state_dict(whole.state_dict())
    assert other[0].weight.tolist() == other[1].weight.tolist() == [[0, 1], [2, 3]]
    again = FlatModel.of_arrays(dict(whole.named_arrays()), flat.layout)
    assert torch.equal(again.parameters, whole.parameters)


def test_what_travels_is_what_a_round_changes():
    whole = FlatModule(tied()).save()
    part = whole.travelling()
    assert list(FlatRecord(part)) == ["0.weight", "1.bias"]
    assert part.layout.num_bytes == 6 * 4
    assert part.parameters is whole.parameters
    assert part.travelling() is part
    back = complete(FlatRecord(part), whole.base)
    assert back.layout is whole.layout
    assert back.frozen is whole.frozen
    assert whole.laid_out(part.layout).layout == part.layout
    # Whoever writes it as an ordinary record, and whoever sends all of it.
    for record in (FlatRecord(part).plain(), FlatRecord(whole).plain()):
        back = complete(record, whole.base)
        for name, tensor in whole.state_dict().items():
            assert torch.equal(back.state_dict()[name], tensor), name


def test_of_a_model_that_is_trained_whole_all_travels():
    whole = FlatModule(net()).save()
    assert whole.travelling() is whole
    assert whole.layout.travelling is whole.layout
    assert whole.base.digest == ""
    record = FlatRecord(whole)
    assert not leaves_out_base(record, whole.layout)
    assert complete(record, whole.base) is whole


def test_a_part_that_does_not_fit_is_named():
    whole = FlatModule(tied()).save()
    part = dict(FlatRecord(whole.travelling()).items())
    del part["1.bias"]
    with pytest.raises(AggregationError, match=r"missing '1\.bias'"):
        complete(ArrayRecord(part), whole.base)
    part = dict(FlatRecord(whole).items())
    del part["1.bias"]
    with pytest.raises(AggregationError, match=r"missing '1\.bias'"):
        complete(ArrayRecord(part), whole.base)


def test_a_base_is_told_from_any_other_by_its_digest():
    base = FlatModule(tied()).copy_base()
    assert base.digest == Base(base.layout, base.frozen.clone()).digest
    assert len(base.digest) == 64
    moved = torch.nextafter(base.frozen, torch.tensor(9.0))
    assert Base(base.layout, moved).digest != base.digest
    module = tied()
    module[0].bias.requires_grad_(True)
    module[1].bias.requires_grad_(False)
    assert FlatModule(module).copy_base().digest != base.digest
    # By the values' bytes, and what they are called: the same on every machine.
    layout = Layout.of(
        {"w": ((2,), "float32"), "b": ((1,), "float32")}, (), frozen=["w"]
    )
    text = repr(("w", (2,), "float32", "frozen", "")).encode()
    expected = sha256(text + np.array([1, 2], "<f4").tobytes()).hexdigest()
    assert Base(layout, torch.tensor([1.0, 2.0])).digest == expected
    assert list(FlatRecord(base.alone)) == ["0.bias"]


def test_mixed_and_unfit_dtypes_are_refused():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ConfigurationError, match="must share one dtype"):
        FlatModule(module)
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())
    with pytest.raises(ConfigurationError, match="must share one dtype"):
        FlatModule(module)
    with pytest.raises(ConfigurationError, match="float16"):
        FlatModule(nn.Linear(2, 2).half())


def test_bfloat16_is_carried_as_float32_to_the_bit():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).bfloat16()
    module[0].bias.requires_grad_(False)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    flat = FlatModule(module)
    whole = flat.save()
    assert {e.dtype for e in whole.layout.entries} == {"float32", "int64"}
    assert whole.parameters.dtype == whole.frozen.dtype == torch.float32
    assert flat.parameters.dtype == module[0].weight.dtype == torch.bfloat16
    other = FlatModule(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).bfloat16()
    ).module
    other.load_state_dict(whole.state_dict())
    for name, tensor in before.items():
        assert torch.equal(other.state_dict()[name], tensor), name
    # A mean of models need not be bfloat16's: it is rounded to the nearest.
    flat.load(replace(whole, parameters=whole.parameters * (1 + 2**-12)))
    assert torch.equal(flat.save().parameters, whole.parameters)
    outputs = flat.module(torch.ones(2, 3))
    assert outputs.dtype == torch.float32
    outputs.sum().backward()
    assert flat.gradients.dtype == torch.bfloat16
    assert flat.gradients.any()


def half_frozen():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    module[0].weight.requires_grad_(False)
    return module


def test_frozen_parameters_are_a_vector_of_their_own():
    module = half_frozen()
    weight = module[0].weight.detach().clone()
    flat = FlatModule(module)
    assert torch.equal(flat.frozen.view(3, 2), weight)
    assert len(flat.parameters) == len(flat.gradients) == 3 + 3 + 3 + 3 + 1
    module(torch.ones(4, 2)).sum().backward()
    assert module[0].weight.grad is None
    assert (flat.gradients != 0).any()
    layout = flat.layout
    assert [e.name for e in layout.entries if e.kind == "frozen"] == ["0.weight"]
    assert (layout.num_frozen, layout.num_parameters, layout.num_buffers) == (6, 13, 6)


def test_a_model_keeps_its_frozen_values_wherever_it_goes():
    flat = FlatModule(half_frozen())
    model = flat.save()
    names = list(flat.module.state_dict())
    assert [name for name, _ in model.named_arrays()] == names
    travelled = pickle.loads(pickle.dumps(model))
    read = flatten(FlatRecord(model).plain(), model.layout)
    other = FlatModule(half_frozen())
    other.load(model)
    for found in (
        travelled,
        read,
        other.save(),
        model.with_parameters(model.parameters),
    ):
        assert torch.equal(found.frozen, model.frozen)
        for a, b in zip(found.named_arrays(), model.named_arrays(), strict=True):
            assert a[0] == b[0]
            np.testing.assert_array_equal(a[1], b[1])
    assert other.save(model).frozen is model.frozen


def test_the_same_tensors_in_another_layout():
    """A server that knows only names takes what is frozen for a parameter."""
    model = FlatModule(half_frozen()).save()
    by_name = layout_of(FlatRecord(model).plain())
    told = layout_of(FlatRecord(model).plain(), frozen={"0.weight"})
    assert told == model.layout
    assert by_name.num_frozen == 0
    moved = model.laid_out(by_name)
    assert moved.parameters.numel() == 13 + 6
    assert moved.frozen.numel() == 0
    back = moved.laid_out(model.layout)
    assert torch.equal(back.parameters, model.parameters)
    assert torch.equal(back.frozen, model.frozen)
    assert torch.equal(back.buffers, model.buffers)
    assert model.laid_out(told) is model


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -2), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, ",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (18446744073709551616,), }",
        b"{'descr': '<f3', 'fortran_order': False, 'shape': (2,), }",
        b"   not a header at all",
        b"(" * 9000,  # beyond what Python's parser recurses into
        b"{'descr': " + b"[" * 90 + b"]" * 90 + b", 'fortran_order': False}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"9" * 5000 + b",)}",
        b"-" * 9000 + b"1",
    ],
)
def test_a_malformed_array_is_refused_as_such(header):
    padded = header.ljust(max(117, len(header))) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded
    array = Array("float32", (2,), "numpy.ndarray", data + bytes(8))
    with pytest.raises(AggregationError, match="an array cannot be read"):
        view(array)


# What a module's own code does to its tensors.


class Assigns(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.ones(2), persistent=False)

    def forward(self, x):
        self.mean = 0.5 * self.mean + x.mean(0)
        self.steps = self.steps + 1
        self.table *= 2
        return self.linear(x * self.table)


def test_assigned_buffers_are_saved_and_left_behind():
    module = FlatModule(Assigns())
    start = module.save()
    x = torch.ones(3, 2)
    outputs = []
    for _ in range(2):  # Nothing is left of a model once another is loaded.
        module.load(start)
        module.module(x)
        outputs.append(module.module(x))
        saved = module.save()
        assert saved.buffers.tolist() == [1.5, 1.5]
        assert saved.integers["steps"] == 2
    assert torch.equal(*outputs)
    assert not start.buffers.any()
    # Nor of one that failed halfway.
    module.module(x)
    module.load(start)
    assert module.save().buffers.tolist() == [0, 0]
    assert module.module.table.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(3), "torch.float32 of shape [3]"),
        (torch.zeros(2).double(), "torch.float64 of shape [2]"),
        (None, "NoneType"),
    ],
)
def test_a_buffer_keeps_its_kind(value, said):
    module = FlatModule(Assigns())
    start = module.save()
    module.module.mean = value
    with pytest.raises(ClientError, match=re.escape(f"assigned {said} to the buffer")):
        module.save()
    module.load(start)
    module.save()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda net: setattr(net[0].weight, "data", net[0].weight.data * 2),
            "gave '0.weight' other memory",
        ),
        (lambda net: setattr(net[0].weight, "grad", None), "gave '0.weight' other"),
        (
            lambda net: setattr(net[0], "weight", nn.Parameter(torch.zeros(2, 2))),
            "makes, replaces or removes '0.weight'",
        ),
        (
            lambda net: net[0].register_parameter("more", nn.Parameter(torch.ones(1))),
            "makes, replaces or removes '0.more'",
        ),
        (lambda net: delattr(net[0], "bias"), "makes, replaces or removes '0.bias'"),
        (
            lambda net: setattr(net, "late", nn.Linear(2, 2)),
            "makes, replaces or removes 'late'",
        ),
        (
            lambda net: net.register_buffer("late", torch.ones(1)),
            "makes, replaces or removes 'late'",
        ),
    ],
)
def test_what_training_would_not_reach_is_refused(change, said):
    module = FlatModule(nn.Sequential(nn.Linear(2, 2)))
    start = module.save()
    change(module.module)
    with pytest.raises(ClientError, match=re.escape(said)):
        module.save()
    module.load(start)
    assert torch.equal(module.save().parameters, start.parameters)
    module.module(torch.ones(1, 2)).sum().backward()
    assert module.gradients.abs().min() > 0


def test_a_cache_that_no_model_has_may_be_made_anew():
    net = nn.Sequential(nn.Linear(2, 2))
    net.register_buffer("cache", torch.ones(1), persistent=False)
    module = FlatModule(net)
    start = module.save()
    net.register_buffer("cache", torch.ones(5), persistent=False)
    net.register_buffer("another", torch.ones(1), persistent=False)
    module.save()
    module.load(start)
    assert dict(net.named_buffers()).keys() == {"cache"}
    assert net.cache.tolist() == [1]


class Remembers(nn.Linear):
    """Keeps in attributes what it has met, and stops training."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        if not hasattr(self, "scale"):
            self.scale = x.detach().abs().max()
        self.training = False
        return super().forward(x / self.scale * self.calls)


def test_attributes_are_as_they_were_for_every_model():
    module = FlatModule(Remembers(2, 2))
    start = module.save()
    outputs = []
    for factor in (1, 5, 1):
        module.load(start)
        module.train()
        assert module.module.training
        outputs.append(module.module(factor * torch.ones(1, 2)))
        assert module.module.calls == 1
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_which_parameters_have_had_a_gradient():
    module = FlatModule(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    first, second = module.module
    first(torch.ones(1, 2)).sum().backward()
    assert module.fresh_gradients() == [True, True, False, False]
    module.gradients.zero_()
    assert module.fresh_gradients() == [False] * 4
    (0 * second(torch.ones(1, 2))).sum().backward()  # A gradient of 0 is one.
    assert module.fresh_gradients() == [False, False, True, True]
    assert not module.gradients.any()


@pytest.mark.parametrize("dtype", ["float16", "complex64"])
def test_weights_of_other_dtypes_are_refused_by_name(dtype):
    layer = nn.Linear(2, 2, dtype=getattr(torch, dtype))
    with pytest.raises(ConfigurationError, match=f"'weight' is {dtype}"):
        FlatModule(layer)


def test_threads_that_look_first_at_once_see_all_arrays(monkeypatch):
    def slow(values):
        time.sleep(0.005)
        return Array(values)

    monkeypatch.setattr("fedweight.messages.arrays.Array", slow)
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            record = FlatRecord(FlatModule(module).save())
            found = list(pool.map(lambda k: sorted(record), range(4)))  # noqa: B023
            assert found == [sorted(module.state_dict())] * 4
