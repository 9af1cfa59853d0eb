"""Data that a user's function gives otherwise than the model takes them."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import MessageType

from fedweight.core.errors import DataError
from fedweight.data import ClientData, Examples


def odd(examples):
    """The same examples, as nobody should keep them."""
    other = np.float64 if examples.x.dtype == np.float32 else np.float32
    x = np.ascontiguousarray(examples.x[::-1]).astype(other)[::-1]
    assert min(x.strides) < 0
    return Examples(x, examples.y.astype(np.int32).tolist())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_data_are_cast_to_what_the_model_is(kit, dtype):
    def model():
        return kit.linear().double() if dtype == np.float64 else kit.linear()

    def usual(context):
        return kit.client_of(context).cast(dtype)

    def given_otherwise(context):
        own = usual(context)
        return ClientData(odd(own.train), odd(own.held_out))

    for kind in (MessageType.TRAIN, MessageType.EVALUATE):
        replies = [
            kit.app(model, data)(kit.message(kit.start(model), kind), kit.context(1))
            for data in (usual, given_otherwise)
        ]
        one, other = (reply.content for reply in replies)
        assert dict(one["metrics"]) == dict(other["metrics"])
        if kind == MessageType.TRAIN:
            vectors = [kit.vector(content["arrays"]) for content in (one, other)]
            np.testing.assert_array_equal(*vectors)


def test_labels_are_counted_whatever_holds_them(kit):
    def data(context):
        own = kit.client_of(context)
        return ClientData(odd(own.train), own.held_out)

    message = kit.message(None, "query.label_counts")
    counted, expected = (
        kit.app(data=source)(message, kit.context(2)).content["profile"]
        for source in (data, kit.client_of)
    )
    assert dict(counted) == dict(expected)


def test_labels_that_are_quantities_are_told(kit):
    def data(context):
        own = kit.client_of(context).train
        part = Examples(own.x, own.y + 0.5)
        return ClientData(part, part)

    with pytest.raises(DataError, match=r"client 1: labels are float64.*regression"):
        kit.app(data=data)(kit.message(kit.start()), kit.context(1))
