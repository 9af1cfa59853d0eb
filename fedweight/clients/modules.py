"""The model's modules: built anew, or prepared and lent to one thread at a time."""

from __future__ import annotations

import copy
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..core.layout import Base
from ..core.module import FlatModule
from ..core.precision import Precision, gpu_arithmetic
from .noise import own_streams

# What is not taken along to another process.
OF_A_PROCESS = {"_idle", "_building", "_built", "_base"}


class Modules:
    """The modules that clients train and evaluate with.

    Parameters
    ----------
    model : Callable[[], nn.Module]
        Makes the architecture.
    device : str
        Where prepared modules are.
    precision : {"fp32", "tf32", "bf16"}
        In which they compute.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        device: str,
        precision: Precision = "fp32",
    ) -> None:
        self.model = model
        self.device = device
        self.precision = precision
        self._forget()

    def _forget(self) -> None:
        """Start without modules: each process makes its own."""
        self._idle: queue.SimpleQueue[FlatModule] = queue.SimpleQueue()
        self._building = threading.Lock()
        self._base: Base | None = None
        self._built: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to this process."""
        return {k: v for k, v in self.__dict__.items() if k not in OF_A_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over how modules are made."""
        self.__dict__.update(state)
        self._forget()

    @contextmanager
    def lend(self) -> Iterator[FlatModule]:
        """Lend a prepared module: each thread works with its own.

        Meanwhile a GPU computes as the precision says.
        """
        try:
            module = self._idle.get_nowait()
        except queue.Empty:
            module = self.new()
        try:
            with gpu_arithmetic(self.precision, self.device):
                yield module
        finally:
            self._idle.put(module)

    def new(self) -> FlatModule:
        """Prepare one anew; what that draws reaches no client that trains meanwhile."""
        with (
            own_streams(0, torch.device(self.device)),
            torch.inference_mode(False),  # It will be written to outside of it.
        ):
            module = FlatModule(self.architecture(), self.device, self.precision)
            if self._base is None:  # Later ones are built alike.
                self._base = module.copy_base()
            return module

    @property
    def base(self) -> Base:
        """What of the model no round changes, as it was built."""
        if self._base is None:
            with self.lend():
                pass
        assert self._base is not None
        return self._base

    def architecture(self) -> nn.Module:
        """Build the model; what it has of an earlier one is copied.

        Two threads never work with one module, whatever ``model`` returns.
        """
        with self._building:
            module = self.model()
            if not self._built.isdisjoint(module.modules()):
                module = copy.deepcopy(module)
            self._built.update(module.modules())
        return module
