"""Weights of a file, such as a run's ``model.safetensors``, to start from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..core.digests import digest_of_file
from ..core.errors import DataError
from ..core.layout import CARRIED_AS, Layout
from ..core.paths import clean_path, why_unreadable
from ..core.texts import listed

KEY = "model.weights"


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Give a model the weights of a safetensors file.

    Parameters
    ----------
    module : nn.Module
        Is changed.
    path : str or Path
        Has every tensor of the module's state dict, of the same shape and dtype, and no
        other. Further names of tied tensors may be missing; weights that are bfloat16
        may be float32, as a run writes them.

    Raises
    ------
    DataError
        If it is not so, or a value is not finite; the message names the tensor. The
        module is as it was then.
    """
    given = _read(path)
    own = module.state_dict()
    missing, unexpected = _odd(given, module)
    if missing or unexpected:
        raise DataError(
            f"{KEY}: {path} is of another model: missing "
            f"{listed(map(repr, missing)) or 'none'}, unexpected "
            f"{listed(map(repr, unexpected)) or 'none'}."
        )
    for name, tensor in given.items():
        _check(path, name, tensor, own[name])
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)


def has_tensors_of(path: str | Path, module: nn.Module) -> bool:
    """Tell whether a file has the names of a module, whatever their values."""
    return not any(_odd(_read(path), module))


def digest(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    return digest_of_file(_readable(path))


def _readable(path: str | Path) -> Path:
    place = clean_path(KEY, path)
    reason = why_unreadable(place)
    if reason is not None:
        raise DataError(f"{KEY}: {place} cannot be read: {reason}.")
    return place


def _read(path: str | Path) -> Mapping[str, Tensor]:
    place = _readable(path)
    try:
        return load_file(place)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{KEY}: {place} is no safetensors file: {error}.") from None


def _odd(given: Mapping[str, Tensor], module: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names that are missing in a file, and those that are too many."""
    own = module.state_dict()
    tied = {e.name: e.of for e in Layout.of_module(module).entries if e.of}
    missing = [n for n in own if n not in given and tied.get(n) not in given]
    return missing, sorted(given.keys() - own.keys())


def _check(path: str | Path, name: str, given: Tensor, own: Tensor) -> None:
    if given.shape != own.shape:
        raise DataError(
            f"{KEY}: '{name}' has shape {list(given.shape)} in {path}, and "
            f"{list(own.shape)} in the model."
        )
    dtype, expected = (str(t.dtype).removeprefix("torch.") for t in (given, own))
    if dtype not in (expected, CARRIED_AS.get(expected)):
        raise DataError(
            f"{KEY}: '{name}' is {dtype} in {path}, and {expected} in the model."
        )
    if given.is_floating_point() and not bool(given.isfinite().all()):
        raise DataError(f"{KEY}: '{name}' has NaN or infinite values in {path}.")
