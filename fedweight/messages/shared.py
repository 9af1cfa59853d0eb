"""What the server tells all clients of every parameter, such as a mask.

It travels in a config record of its own, so that a message has one record of arrays,
the model, as Flower's mods and wrappers expect.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from ..core.errors import ClientError
from ..core.layout import Layout
from ..core.texts import shown
from . import keys

# The name of a mask: where it is 0, every model of the run is 0, and is not sent.
MASK = "mask"

# Under this name the record has the names of the tensors that the vectors are of.
TENSORS = "tensors"


def shared_record(vectors: Mapping[str, Tensor], layout: Layout) -> ConfigRecord:
    """Return vectors as a record.

    Parameters
    ----------
    vectors : Mapping[str, Tensor]
        By name, ``[P]`` each: bool, which takes a bit an element, or floating.
    layout : Layout
        The server's, whose trained tensors the record names: a client's may differ,
        where the server was not told what is frozen.
    """
    names = [e.name for e in layout.parameters]
    written = {name: _written(one) for name, one in vectors.items()}
    return ConfigRecord({TENSORS: names, **written})


def shared_vectors(
    content: RecordDict, sizes: Mapping[str, int], wanted: Iterable[str]
) -> dict[str, Tensor]:
    """Return the vectors that a message brings, float32 or float64.

    Parameters
    ----------
    content : RecordDict
        The message's.
    sizes : Mapping[str, int]
        How many values the model's tensors have, by name.
    wanted : Iterable[str]
        The tensors that the vectors are to be of, in this order.

    Raises
    ------
    ClientError
        If they are of other tensors, or of another length.
    """
    record: dict[str, Any] = dict(content.get(keys.SHARED) or {})
    if not record:
        return {}
    named, places, size = record.pop(TENSORS, None), {}, 0
    for name in named if isinstance(named, list) else ():
        places[str(name)] = size
        size += sizes.get(str(name), 0)
    several = list(wanted)
    missing = [name for name in several if name not in places]
    if missing:
        raise ClientError(f"the server tells nothing of the model's '{missing[0]}'")
    found = {}
    for name, value in record.items():
        if not isinstance(value, bytes):
            raise ClientError(
                f"the server tells {shown(value)} for '{name}', and no bytes"
            )
        whole = _read(name, value, size)
        parts = [whole[places[n] : places[n] + sizes[n]] for n in several]
        same = list(places) == several
        found[name] = whole if same or not parts else torch.cat(parts)
    return found


def sizes_of(layout: Layout) -> dict[str, int]:
    """Return how many values a layout's tensors have, by name."""
    return {e.name: math.prod(e.shape) for e in layout.entries}


def num_bytes(vectors: Mapping[str, Tensor]) -> int:
    """Return how many bytes vectors take in a message."""
    return sum(
        -(-one.numel() // 8)
        if one.dtype == torch.bool
        else one.numel() * one.element_size()
        for one in vectors.values()
    )


def _written(vector: Tensor) -> bytes:
    values = vector.detach().cpu().numpy()
    if values.dtype == np.bool_:
        return np.packbits(values, bitorder="little").tobytes()
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def _read(name: str, value: bytes, size: int) -> Tensor:
    if len(value) == -(-size // 8):
        bits = np.frombuffer(value, np.uint8)
        kept = np.unpackbits(bits, count=size, bitorder="little")
        return torch.from_numpy(kept).to(torch.float32)
    for dtype in ("<f4", "<f8"):
        if len(value) == size * np.dtype(dtype).itemsize:
            values = np.frombuffer(value, dtype)
            return torch.from_numpy(values.astype(values.dtype.newbyteorder("=")))
    raise ClientError(
        f"the server tells {len(value)} bytes for '{name}', which are not a value, or "
        f"a bit, for each of the model's {size} parameters"
    )
