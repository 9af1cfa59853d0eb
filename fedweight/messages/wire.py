"""Models as a codec writes them, between two halves that are both ours.

On a real network a grid of ours writes the models that go out and reads those that come
in, so everything behind it (strategies, Flower's wrappers) sees ordinary records. An
array that is written has the same name, shape and dtype as ever; what it is written by
is its ``stype``. A server that reads such arrays says so in a message's config; without
it clients write none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from ..core.errors import AggregationError, ClientError
from ..core.layout import FlatModel, Layout
from . import keys
from .arrays import FlatRecord, flatten
from .codecs import DENSE, Codec, Draw, to_write
from .records import records_of
from .shared import mask_of, sizes_of

PREFIX = "fedweight."


def written(
    codec: Codec,
    model: FlatModel,
    start: FlatModel,
    draw: Draw | None = None,
    mask: Tensor | None = None,
) -> ArrayRecord:
    """Return a model's record with its parameters written by a codec.

    Parameters
    ----------
    codec : Codec
        What writes.
    model, start : FlatModel
        What is written, and the model that both sides know, for a codec of updates.
    draw : Callable, optional
        What gives random numbers, where the codec needs some.
    mask : Tensor, optional
        ``[P]``; where it is 0 nothing is written.
    """
    draws = [] if draw is None else [draw]
    rows, chance = to_write(codec, [model], start, draws)
    arrays = {name: Array(np.asarray(v)) for name, v in model.named_arrays()}
    for e in model.layout.parameters:
        here = slice(e.start, e.stop)
        values = rows[0, here].to(getattr(torch, e.dtype))
        own = None if chance is None else chance[0, here].to(values)
        if mask is not None:
            keep = mask[here] != 0
            values, own = values[keep], None if own is None else own[keep]
        data = codec.write(values, own)
        arrays[e.name] = Array(e.dtype, e.shape, _stype(codec), data)
    return ArrayRecord(arrays)


def read(
    codec: Codec,
    record: ArrayRecord,
    layout: Layout,
    start: FlatModel | None = None,
    mask: Tensor | None = None,
) -> FlatModel:
    """Return the model that a record is; the other arguments as for :func:`written`.

    Raises
    ------
    AggregationError
        If the record is not what the codec writes of the layout.
    """
    trained = {e.name for e in layout.parameters}
    plain = ArrayRecord({n: a for n, a in record.items() if n not in trained})
    rest = Layout(tuple(e for e in layout.entries if e.kind != "parameter"))
    known = flatten(plain, rest)
    parameters = torch.zeros(layout.num_parameters, dtype=layout.dtype)
    for e in layout.parameters:
        here = slice(e.start, e.stop)
        array = record.get(e.name)
        if array is None or array.stype != _stype(codec) or array.shape != e.shape:
            raise AggregationError(
                f"'{e.name}' is not written by {type(codec).__name__}, as the server's "
                "codec asks. Give clients the run config that the server has."
            )
        keep = None if mask is None else mask[here] != 0
        count = e.stop - e.start if keep is None else int(keep.count_nonzero())
        expected = codec.num_bytes(count, np.dtype(e.dtype).itemsize)
        if len(array.data) != expected:
            raise AggregationError(
                f"'{e.name}' has {len(array.data)} bytes, and {type(codec).__name__} "
                f"writes {expected} of it."
            )
        values = codec.read(array.data, count, getattr(torch, e.dtype))
        if keep is None:
            parameters[here] = values.to(parameters)
        else:
            parameters[here][keep] = values.to(parameters)
    if codec.of_updates:
        assert start is not None
        parameters += start.parameters
    return FlatModel(layout, parameters, known.buffers, known.integers, known.frozen)


def _stype(codec: Codec) -> str:
    return PREFIX + type(codec).__name__


def opened(content: RecordDict) -> RecordDict:
    """Return what a client was sent, with arrays that are not written by any codec.

    Raises
    ------
    ClientError
        If they are not what is left of a model under the mask that comes along.
    """
    [*records] = records_of(content, ArrayRecord).items()
    if not any(_is_written(array) for _, r in records for array in r.values()):
        return content
    [(name, record)] = records
    sizes = {n: math.prod(a.shape) for n, a in record.items() if _is_written(a)}
    every = {n: math.prod(a.shape) for n, a in record.items()}
    mask = mask_of(content, every, sizes)
    if mask is None:
        raise ClientError("the server sends a part of the model, and not which one")
    arrays, begin = dict(record.items()), 0
    for n, size in sizes.items():
        array, keep = record[n], mask[begin : begin + size] != 0
        begin += size
        itemsize, count = np.dtype(array.dtype).itemsize, int(keep.count_nonzero())
        if len(array.data) != count * itemsize:
            raise ClientError(f"'{n}' is not the part of it that the mask keeps")
        values = torch.zeros(size, dtype=getattr(torch, array.dtype))
        values[keep] = DENSE.read(array.data, count, values.dtype)
        arrays[n] = Array(values.numpy().reshape(array.shape))
    return RecordDict({**dict(content), name: ArrayRecord(arrays)})


def _is_written(array: Array) -> bool:
    return array.stype.startswith(PREFIX)


class Wire:
    """Writes models that a server sends, and reads those that clients send back.

    Parameters
    ----------
    codec : Codec
        What clients write with.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        # By node, what it was sent last: the model, and which parameters it keeps.
        self._sent: dict[int, tuple[FlatModel, Tensor | None]] = {}

    def write(self, messages: Iterable[Message]) -> list[Message]:
        """Return messages to clients as they go out; their ids stay their own."""
        several = list(messages)
        done: dict[int, tuple[RecordDict, RecordDict, FlatModel, Tensor | None]] = {}
        for message in several:
            kind = message.metadata.message_type
            content = message.content
            if kind.split(".")[0] not in ("train", "evaluate"):
                continue
            if id(content) not in done:
                made = self._written(content)
                if made is None:
                    continue
                done[id(content)] = content, *made
            _, message.content, model, mask = done[id(content)]
            if kind.startswith("train"):
                self._sent[message.metadata.dst_node_id] = model, mask
        return several

    def _written(
        self, content: RecordDict
    ) -> tuple[RecordDict, FlatModel, Tensor | None] | None:
        """Return content as it goes out; ``None`` where it goes as it is."""
        records = list(records_of(content, ArrayRecord).items())
        if len(records) != 1:
            return None
        [(name, record)] = records
        model = record.flat if isinstance(record, FlatRecord) else None
        if model is None:
            return None
        names = [e.name for e in model.layout.parameters]
        mask = mask_of(content, sizes_of(model.layout), names)
        if mask is None and self.codec.exact:
            return None
        new: dict[str, ArrayRecord | ConfigRecord] = {}
        if mask is not None:
            new[name] = written(DENSE, model, model, mask=mask)
        for key, config in records_of(content, ConfigRecord).items():
            if key != keys.SHARED:
                new[key] = ConfigRecord({**dict(config), keys.WRITTEN: True})
        return RecordDict({**dict(content), **new}), model, mask

    def read(self, replies: Iterable[Message]) -> list[Message]:
        """Return clients' replies with models that are not written by any codec.

        What cannot be read stays, and is rejected by who looks at it.
        """
        return [self._read(reply) for reply in replies]

    def _read(self, reply: Message) -> Message:
        if not reply.metadata.message_type.startswith("train"):
            return reply
        # Once: the models of past rounds are not kept for nodes that rest.
        sent = self._sent.pop(reply.metadata.src_node_id, None)
        if sent is None or reply.has_error():
            return reply
        start, mask = sent
        new = {}
        try:
            for name, record in records_of(reply.content, ArrayRecord).items():
                if any(map(_is_written, record.values())):
                    model = read(self.codec, record, start.layout, start, mask)
                    new[name] = FlatRecord(model)
        except Exception:  # Its bytes are a stranger's.
            return reply
        if new:
            reply.content = RecordDict({**dict(reply.content), **new})
        return reply


def asks_to_write(content: RecordDict) -> bool:
    """Tell whether a server asks for a model that is written by the codec."""
    return any(keys.WRITTEN in c for c in records_of(content, ConfigRecord).values())
