"""A device that is not there: tensors that carry values, and say that they are on it.

What they are asked is computed by the CPU, but as a device would do it: who mixes
tensors of both is refused, and what crosses from one to the other is counted.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

# A name that PyTorch knows and nothing answers to.
DEVICE = torch.device("lazy:0")

# What brings a value to Python, or has a shape that depends on values.
READING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount")

# These take indices, or values, from the CPU and bring them there.
TAKING = ("index.", "index_put", "copy_", "_index_put_impl_")


class There(Tensor):
    """A tensor on the device; ``held`` is the one that has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        """Wrap a tensor."""
        made: There = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.held = held
        return made

    @property
    def data(self) -> Tensor:
        """The values, without a gradient."""
        return self.detach()

    @data.setter
    def data(self, values: There) -> None:
        self.held = values.held

    def tolist(self) -> Any:
        """Return the values as lists."""
        return self.cpu().tolist()

    def new_tensor(self, values: Any) -> Tensor:
        """Return values of the same kind on the device."""
        return torch.tensor(values, dtype=self.dtype).to(DEVICE)

    def data_ptr(self) -> int:
        """Return where it is."""
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        """Return the memory that it is in."""
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Do what is asked for where nobody counts."""
        return computed(func, args, kwargs or {}, Counter())


def computed(func: Any, args: Any, kwargs: dict[str, Any], seen: Counter[str]) -> Any:
    """Do what is asked for as a device would; count what crosses."""
    name, given = func.__name__, []
    tree_map_only(Tensor, given.append, (args, kwargs))
    wrappers = {id(one.held): one for one in given if isinstance(one, There)}
    wanted = kwargs.get("device")
    if wanted is not None:
        wanted, kwargs = torch.device(wanted), {**kwargs, "device": "cpu"}
    is_copy = name.startswith("_to_copy")
    if is_copy and wanted is not None and (wanted == DEVICE) != bool(wrappers):
        seen["up" if wanted == DEVICE else "down"] += 1
    elif name.startswith(READING) and wrappers:
        seen["read"] += 1
    elif wrappers and any(one.ndim for one in given if not isinstance(one, There)):
        if not name.startswith(TAKING):
            raise RuntimeError(f"{name}: tensors on the device and on the CPU")
        seen["up" if isinstance(given[0], There) else "down"] += 1
    args, kwargs = tree_map_only(There, lambda one: one.held, (args, kwargs))
    with _disable_current_modes():
        found = func(*args, **kwargs)
    leaves = name.startswith("copy_") and not isinstance(given[0], There)
    stays = wanted == DEVICE if wanted is not None else wrappers and not leaves

    def placed(one: Tensor) -> Tensor:
        if id(one) in wrappers:
            return wrappers[id(one)]  # Changed in place.
        return There(one) if stays else one

    return tree_map_only(Tensor, placed, found)


class _Made(TorchFunctionMode):
    """Lets ``torch.tensor`` make a tensor there, of which no dispatch is told."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Do what is asked for."""
        rest = dict(kwargs or {})
        wanted = rest.pop("device", None) if func is torch.tensor else None
        if wanted is None or torch.device(wanted) != DEVICE:
            return func(*args, **(kwargs or {}))
        return func(*args, **rest).to(DEVICE)


class Elsewhere(TorchDispatchMode):
    """The device, in a ``with`` block.

    Attributes
    ----------
    seen : Counter[str]
        How often something was copied ``up`` to the device or ``down`` from it, and how
        often a single value was ``read``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self._made = _Made()

    def __enter__(self) -> Self:
        """Begin to count."""
        self._made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """End it."""
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Do what is asked for."""
        return computed(func, args, kwargs or {}, self.seen)
