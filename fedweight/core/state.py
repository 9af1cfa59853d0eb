"""What is carried from round to round, as a text and tensors that a file can hold.

A state is a value made of numbers, texts, ``None``, lists, dictionaries, arrays and
tensors. Nothing is executed when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigurationError, DataError

# How what JSON does not have is written: an object with this one key.
_TENSOR, _ARRAY, _SCALAR, _BYTES = "$tensor", "$array", "$scalar", "$bytes"
_TUPLE, _PAIRS = "$tuple", "$pairs"


def pack(state: Any, what: str = "state") -> tuple[str, dict[str, Tensor]]:
    """Return a state as JSON and the tensors that it names.

    Parameters
    ----------
    state : Any
        The state.
    what : str
        What an error calls it.

    Raises
    ------
    ConfigurationError
        If it holds anything else; the message says where.

    Examples
    --------
    >>> text, tensors = pack({"weights": {3: 0.5}, "velocity": torch.ones(2)})
    >>> text
    '{"weights": {"$pairs": [[3, 0.5]]}, "velocity": {"$tensor": "0"}}'
    >>> unpack(text, tensors)["weights"]
    {3: 0.5}
    """
    tensors: dict[str, Tensor] = {}
    try:
        return json.dumps(_packed(state, what, tensors)), tensors
    except RecursionError:
        raise _unfit(what, "nested without end") from None


def _packed(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, np.generic):
        return {_SCALAR: _packed(np.asarray(value), where, tensors)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return {_BYTES: value.hex()}
    if isinstance(value, Tensor | np.ndarray):
        name = str(len(tensors))
        if isinstance(value, np.ndarray):
            native = value.astype(value.dtype.newbyteorder("="), order="C")
            try:
                tensors[name] = torch.from_numpy(native)
            except TypeError:
                raise _unfit(where, f"an array of {value.dtype}") from None
            return {_ARRAY: name}
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {_TENSOR: name}
    if isinstance(value, tuple) and type(value) is not tuple:
        raise _unfit(where, f"{type(value).__name__}, which would become a plain tuple")
    if isinstance(value, list | tuple):
        items = [_packed(v, f"{where}[{k}]", tensors) for k, v in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    if isinstance(value, Mapping):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: _packed(v, f"{where}[{k!r}]", tensors) for k, v in value.items()}
        pairs = [
            [_packed(k, f"a key of {where}", tensors), _packed(v, where, tensors)]
            for k, v in value.items()
        ]
        return {_PAIRS: pairs}
    raise _unfit(where, type(value).__name__)


def _unfit(where: str, kind: str) -> ConfigurationError:
    return ConfigurationError(
        f"{where} is {kind}, which no checkpoint can hold. Carry numbers, texts, "
        "lists, dictionaries, arrays and tensors."
    )


def unpack(text: str, tensors: Mapping[str, Tensor]) -> Any:
    """Return the state that :func:`pack` was given.

    Raises
    ------
    DataError
        If the text is not such a state.
    """
    try:
        return _unpacked(json.loads(text), tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"the state cannot be read: {type(error).__name__}: {error}."
        ) from error


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, content),) = value.items()
        if key == _TENSOR:
            return tensors[content].clone()
        if key == _ARRAY:
            return tensors[content].numpy().copy()
        if key == _SCALAR:
            return _unpacked(content, tensors)[()]
        if key == _BYTES:
            return bytes.fromhex(content)
        if key == _TUPLE:
            return tuple(_unpacked(v, tensors) for v in content)
        if key == _PAIRS:
            return {_unpacked(k, tensors): _unpacked(v, tensors) for k, v in content}
    return {k: _unpacked(v, tensors) for k, v in value.items()}
