"""A state goes through a text and tensors, and comes back as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from fedweight.core.errors import ConfigurationError, DataError
from fedweight.core.state import pack, unpack


def through_a_file(state):
    text, tensors = pack(state)
    return unpack(text, load(save(tensors)))


plain = st.none() | st.booleans() | st.integers() | st.text() | st.binary()
plain |= st.floats(allow_nan=False)
names = st.text() | st.integers() | st.sampled_from(["$tensor", "$pairs", "$array"])
states = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(names, inner, max_size=4)
    ),
    max_leaves=12,
)


@given(states)
def test_plain_values_come_back_with_their_types(state):
    found = through_a_file(state)
    assert found == state
    assert repr(found) == repr(state)


@pytest.mark.parametrize(
    "values",
    [
        torch.randn(3, 2).t(),
        torch.tensor(2.5, dtype=torch.float64),
        torch.zeros(0, 4),
        torch.ones(2, dtype=torch.bfloat16),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(3, dtype=">i4"),
        np.array(True),
        np.float32(0.1),
        np.int64(3),
    ],
)
def test_arrays_and_tensors_come_back_with_their_bits(values):
    found = through_a_file({"a": [values]})["a"][0]
    assert type(found) is type(values)
    if isinstance(values, torch.Tensor):
        assert found.dtype == values.dtype
        assert torch.equal(found, values)
    else:
        assert found.dtype == values.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found, values)


def test_one_tensor_under_two_names_is_written_twice():
    shared = torch.ones(3)
    found = through_a_file({"a": shared, "b": shared[1:]})
    assert found["b"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"lock": object()}, r"state\['lock'\] is object"),
        ([1, {2, 3}], r"state\[1\] is set"),
        (np.array(["a"]), "state is an array of <U1"),
    ],
)
def test_what_no_file_can_hold_is_named_with_its_place(state, said):
    with pytest.raises(ConfigurationError, match=f"{said}, which no checkpoint"):
        pack(state)
    endless: list = []
    endless.append(endless)
    with pytest.raises(ConfigurationError, match="nested without end"):
        pack(endless)


@pytest.mark.parametrize("text", ["", "{", '{"$tensor": "7"}', '{"$pairs": 3}'])
def test_what_is_no_state_is_refused(text):
    with pytest.raises(DataError, match="the state cannot be read"):
        unpack(text, {})
