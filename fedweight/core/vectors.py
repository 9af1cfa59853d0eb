"""Vectors as the kernels take them, and large ones in memory that is used again."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .pytorch import torch

if TYPE_CHECKING:
    from torch import Tensor

# The memory of vectors of at least so many bytes is used again: in each thread one of
# each of so many sizes.
LARGE_BYTES = 1 << 20
KEPT_SIZES = 4

_NO_VALUES: dict[int, npt.NDArray[Any]] = {
    4: np.empty(0, np.float32),
    8: np.empty(0, np.float64),
}


def no_values(dtype: torch.dtype) -> npt.NDArray[Any]:
    """Return what the kernels are given where there is no vector."""
    return _NO_VALUES[dtype.itemsize]


def check_shape(name: str, given: Tensor, size: int, what: str) -> None:
    """Check that a vector has so many values: the kernels would read on."""
    if given.shape != (size,):
        raise ValueError(
            f"{name} must have shape [{size}], a value a {what}, got "
            f"{list(given.shape)}"
        )


def plain(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values as the kernels take them; without a copy, if they are so."""
    # Asking is quicker than three calls that have nothing to do.
    if values.dtype == dtype and values.is_cpu and values.is_contiguous():
        return values.detach() if values.requires_grad else values
    return values.detach().to("cpu", dtype).contiguous()


def empty(size: int, dtype: torch.dtype) -> Tensor:
    """Return a new vector of any content, where a cache line begins as PyTorch's do.

    A large one is NumPy's memory, because NumPy asks the system for huge pages; and
    that of the last one that was let go, if it fits, because the system would have to
    find and to clear other memory first.
    """
    line, nbytes = 64, size * dtype.itemsize
    if nbytes < LARGE_BYTES:
        return torch.empty(size, dtype=dtype)
    memory = _let_go().pop(nbytes, None)
    if memory is None:
        memory = np.empty(nbytes + line, np.uint8)
    lent = memory[-memory.ctypes.data % line :][:nbytes]
    weakref.finalize(lent, _keep, memory, nbytes).atexit = False
    return torch.from_numpy(lent).view(dtype)


_local = threading.local()


def _let_go() -> dict[Any, npt.NDArray[np.uint8]]:
    """Return the memory that this thread let go of last, by size."""
    kept: dict[Any, npt.NDArray[np.uint8]] = vars(_local)
    return kept


def _keep(memory: npt.NDArray[np.uint8], nbytes: int) -> None:
    kept = _let_go()
    kept[nbytes] = memory
    if len(kept) > KEPT_SIZES:
        del kept[next(iter(kept))]
