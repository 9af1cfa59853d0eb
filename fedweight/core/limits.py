"""Errors that say that too much was asked for at once."""

from __future__ import annotations

from .pytorch import is_imported, torch

# What PyTorch and CUDA's libraries say, in errors without a class of their own, where
# tensors are larger than their kernels can count, or where there is no memory.
SAYINGS = (
    "canUse32BitIndexMath",
    "CUDA out of memory",
    "STATUS_ALLOC_FAILED",
    "can't allocate memory",
)


def is_too_large(error: BaseException) -> bool:
    """Tell whether less at once might do: no memory was left, or indices overflowed.

    Examples
    --------
    >>> is_too_large(MemoryError())
    True
    >>> is_too_large(RuntimeError("Expected canUse32BitIndexMath(input) to be true"))
    True
    >>> is_too_large(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    False
    """
    if isinstance(error, MemoryError):
        return True
    if is_imported() and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error) for s in SAYINGS)
