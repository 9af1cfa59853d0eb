"""What makes the interpreter wait for a device."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Operations that bring a value to Python, or whose result's shape depends on values.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount")


class Waits(TorchDispatchMode):
    """Notes, in a ``with`` block, what would wait for a device, on a CPU as well.

    Attributes
    ----------
    seen : list[str]
        The operations' names; those that move a tensor to a device are among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Do what is asked for."""
        name, kwargs = func.__name__, kwargs or {}
        to = kwargs.get("device")
        moves = name.startswith("_to_copy") and to not in (None, args[0].device)
        if moves or name.startswith(WAITING):
            self.seen.append(name)
        return func(*args, **kwargs)
