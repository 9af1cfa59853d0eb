"""What the server tells all clients alike and is long: lists, vectors, a mask.

It travels in a config record of its own, so that it stands once beside what is told
each client, and a message has one record of arrays, the model, as Flower's mods and
wrappers expect. A list is a list there; a value of every parameter is bytes.
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

# A list of numbers, or a value of each parameter, ``[P]``.
Long = list[float] | Tensor


def shared_record(told: Mapping[str, Long], layout: Layout) -> ConfigRecord:
    """Return what is told as a record.

    Parameters
    ----------
    told : Mapping[str, list of float or Tensor]
        By name a list of numbers; or of every parameter ``[P]``: bool, which takes a
        bit an element, or floating.
    layout : Layout
        The server's, whose trained tensors the record names where something is of every
        parameter: a client's may differ, where the server was not told what is frozen.
    """
    written: dict[str, Any] = {
        name: _written(one) if isinstance(one, Tensor) else one
        for name, one in told.items()
    }
    if any(isinstance(one, Tensor) for one in told.values()):
        written[keys.TENSORS] = [e.name for e in layout.parameters]
    return ConfigRecord(written)


def shared_of(
    content: RecordDict, sizes: Mapping[str, int], wanted: Iterable[str]
) -> dict[str, Long]:
    """Return what a message tells all clients alike.

    Parameters
    ----------
    content : RecordDict
        The message's.
    sizes : Mapping[str, int]
        How many values the model's tensors have, by name.
    wanted : Iterable[str]
        The tensors that vectors are to be of, in this order.

    Returns
    -------
    dict
        By name a list of numbers; or a tensor of every parameter, float32 or float64.

    Raises
    ------
    ClientError
        If a vector is of other tensors, or of another length.
    """
    record: dict[str, Any] = dict(content.get(keys.SHARED) or {})
    if not record:
        return {}
    named, places, size = record.pop(keys.TENSORS, None), {}, 0
    for name in named if isinstance(named, list) else ():
        places[str(name)] = size
        size += sizes.get(str(name), 0)
    several = list(wanted)
    missing = [name for name in several if name not in places]
    found: dict[str, Long] = {}
    for name, value in record.items():
        if isinstance(value, list):
            found[name] = value
            continue
        if not isinstance(value, bytes):
            raise ClientError(
                f"the server tells {shown(value)} for '{name}', where only lists and "
                "bytes are told"
            )
        if missing:
            raise ClientError(
                f"the server tells nothing of the model's '{missing[0]}' as '{name}'"
            )
        whole = _read(name, value, size)
        parts = [whole[places[n] : places[n] + sizes[n]] for n in several]
        same = list(places) == several
        found[name] = whole if same or not parts else torch.cat(parts)
    return found


def mask_of(
    content: RecordDict, sizes: Mapping[str, int], wanted: Iterable[str]
) -> Tensor | None:
    """Return the mask of a message, if any; the arguments are as there."""
    return mask_among(shared_of(content, sizes, wanted))


def mask_among(told: Mapping[str, Long]) -> Tensor | None:
    """Return the mask of what is told, if any."""
    mask = told.get(keys.MASK)
    return mask if isinstance(mask, Tensor) else None


def sizes_of(layout: Layout) -> dict[str, int]:
    """Return how many values a layout's tensors have, by name."""
    return {e.name: math.prod(e.shape) for e in layout.entries}


def num_bytes(told: Iterable[Any]) -> int:
    """Return how many bytes take what is told, without its names.

    Examples
    --------
    >>> num_bytes([0.5, "sex", [1.0, 2.0], torch.ones(9, dtype=torch.bool), None])
    29
    """
    return sum(map(_num_bytes, told))


def _num_bytes(one: Any) -> int:
    if one is None:
        return 0
    if isinstance(one, str):
        return len(one.encode())
    if not isinstance(one, Tensor):  # A number takes 8, as Flower writes it.
        return 8 * (len(one) if isinstance(one, list) else 1)
    if one.dtype == torch.bool:
        return -(-one.numel() // 8)
    return one.numel() * one.element_size()


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
