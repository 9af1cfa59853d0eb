"""What an objective or a model may write for operations that cannot be batched.

Many clients train at once where a step is the same operations for all of them: nothing
may depend on values but by ``torch.where``, and no shape at all. Here are substitutes
for what does, and :func:`instead_of` tells which one.
"""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch
from torch import Tensor


def one_hot(codes: Tensor, number: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``[..., number]``, 1 where a code is and 0 elsewhere; for ``F.one_hot``.

    Parameters
    ----------
    codes : Tensor
        ``[...]``, int64, in ``0 .. number - 1``; another code gives a row of 0.
    number : int
        How many codes there are.
    dtype : dtype, optional
        Of the result; by default PyTorch's own.

    Examples
    --------
    >>> one_hot(torch.tensor([2, 0]), 3)
    tensor([[0., 0., 1.],
            [1., 0., 0.]])
    """
    places = torch.arange(number, device=codes.device)
    return (codes[..., None] == places).to(dtype or torch.get_default_dtype())


def mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean of some values, 0 where there are none; for ``values[chosen]``.

    Parameters
    ----------
    values, chosen : Tensor
        ``[n]``, and whether each is one of them. What is not may be NaN.

    Examples
    --------
    >>> mean_where(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([True, False, True]))
    tensor(2.5000)
    """
    some = torch.where(chosen, values, 0)
    return some.sum() / chosen.sum().clamp(min=1)


def means_by_group(
    values: Tensor, groups: Tensor, number: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return each group's mean and how many values it has, ``[number]`` each.

    A group without values has a mean of 0.

    Parameters
    ----------
    values, groups : Tensor
        ``[n]``, and the group of each, from 0.
    number : int
        How many groups there are.
    mask : Tensor, optional
        ``[n]``: 1 for a value that counts, 0 for one that does not.

    Examples
    --------
    >>> means, counts = means_by_group(
    ...     torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2]), 3
    ... )
    >>> means, counts
    (tensor([2., 0., 5.]), tensor([2., 0., 1.]))
    """
    member = one_hot(groups, number, values.dtype)
    if mask is not None:
        member = member * mask[:, None]
        values = torch.where(mask > 0, values, 0)
    counts = member.sum(0)
    return (member * values[:, None]).sum(0) / counts.clamp(min=1), counts


# What cannot be batched, in the code or in what PyTorch says, and what to write.
_INSTEAD = (
    (r"one_hot", "fedweight.clients.batchable.one_hot"),
    (
        r"dynamic shape|masked_select|nonzero|unique",
        "torch.where, or fedweight.clients.batchable.mean_where",
    ),
    (r"\.item\(\)|control flow", "torch.where for a condition, and no .item()"),
    (r"data pointer", "tensors throughout, and no .numpy() or .tolist()"),
    (r"random operation", "batch.uniform(...)"),
    (r"bincount|depends on values", "comparisons and sums"),
)


def instead_of(error: BaseException) -> str:
    """Return where code could not be batched, and what to write there.

    Parameters
    ----------
    error : BaseException
        What was raised when it was tried.

    Returns
    -------
    str
        Such as ``"own.py, line 7, 'F.one_hot(y, 3)': write ... instead"``; empty where
        nothing is known.
    """
    # Not PyTorch's, and not this library's.
    place, line = place_of(error)
    said = f"{line} {error}"
    for pattern, instead in _INSTEAD:
        if place and re.search(pattern, said):
            return f"{place}: write {instead}"
    return place


def place_of(error: BaseException) -> tuple[str, str]:
    """Return which line of a user's raised an error, in words, and the line itself.

    Both are empty where it was none of a user's.
    """
    # Not PyTorch's, and not this library's.
    ours = Path(__file__).parents[1], Path(torch.__file__).parent
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(Path(frame.filename).is_relative_to(own) for own in ours)
    ]
    if not frames:
        return "", ""
    frame, line = frames[-1], frames[-1].line or ""
    place = f"{Path(frame.filename).name}, line {frame.lineno}"
    return (f"{place}, '{line}'" if line else place), line
