"""In which precision models are computed, and that a GPU does so alike each time."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

from .errors import ConfigurationError, check_choice
from .pytorch import torch

log = logging.getLogger("fedweight")

# What each changes is told in clients/README.md.
Precision = Literal["fp32", "tf32", "bf16"]


def check_precision(name: str, precision: str, device: torch.device | str) -> None:
    """Raise ``ConfigurationError`` unless it is a precision; say if it has no effect.

    Examples
    --------
    >>> check_precision("precision", "bf16", "cpu")
    >>> check_precision("precision", "fp64", "cpu")
    Traceback (most recent call last):
    fedweight.core.errors.ConfigurationError: precision must be one of 'fp32', 'tf32', \
'bf16', got 'fp64'.
    """
    check_choice(name, precision, get_args(Precision))
    if precision == "tf32":
        _say_if_idle(name, torch.device(device).type)


# What is no CUDA device and was told so.
_IDLE: set[str] = set()


def _say_if_idle(name: str, kind: str) -> None:
    """Say, once in a process, that there is nothing that TF32 changes."""
    if kind != "cuda" and kind not in _IDLE:
        _IDLE.add(kind)
        log.warning(
            "%s = 'tf32' changes nothing on a %s: only NVIDIA's GPUs multiply so.",
            name,
            kind.upper(),
        )


@contextmanager
def gpu_arithmetic(precision: str, device: torch.device | str) -> Iterator[None]:
    """Let a GPU compute as a precision says, and alike each time, for a while.

    Unless told otherwise PyTorch lets convolutions round the factors of products to
    TF32, 10 of 23 bits of the fraction, and their gradients be summed up in any order.
    Both are the whole process's choice. So who wants another precision than others who
    are at work waits for them, and what there was before is put back.

    Parameters
    ----------
    precision : {"fp32", "tf32", "bf16"}
        With ``"bf16"`` what stays in float32 is multiplied as with ``"fp32"``; see
        :class:`~fedweight.core.module.FlatModule` for the rest.
    device : torch.device or str
        Where it is computed; nothing is done for one that is no CUDA device.

    Raises
    ------
    ConfigurationError
        If this thread already computes in another precision.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    tf32 = precision == "tf32"
    _ARITHMETIC.begin(tf32)
    try:
        yield
    finally:
        _ARITHMETIC.end()


class _Arithmetic:
    """How the process computes, while some threads ask for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._threads: list[int] = []
        self._tf32 = False
        self._before: dict[str, Any] = {}

    def begin(self, tf32: bool) -> None:
        """Compute so from now on, when nobody computes otherwise."""
        with self._changed:
            while self._threads and self._tf32 != tf32:
                if threading.get_ident() in self._threads:
                    raise ConfigurationError(
                        "precision: what computes in one precision asks for another; "
                        "give the app and the run the same."
                    )
                self._changed.wait()
            if not self._threads:
                self._before, self._tf32 = _state(), tf32
                _choose(tf32)
            self._threads.append(threading.get_ident())

    def end(self) -> None:
        """Compute as before, if nobody else asks for this."""
        with self._changed:
            self._threads.remove(threading.get_ident())
            if not self._threads:
                _put_back(self._before)
                self._changed.notify_all()


_ARITHMETIC = _Arithmetic()


def _switches() -> dict[str, Any]:
    """Return what has a ``fp32_precision``, by the name of what it multiplies."""
    return {
        "cuda matmul": torch.backends.cuda.matmul,
        "cudnn conv": torch.backends.cudnn.conv,  # type: ignore[attr-defined]
        "cudnn rnn": torch.backends.cudnn.rnn,
    }


def _state() -> dict[str, Any]:
    """Return how a GPU computes now, in all of PyTorch's words for it.

    An older word cannot be read where newer ones contradict it.
    """
    state: dict[str, Any] = {n: s.fp32_precision for n, s in _switches().items()}
    state["deterministic"] = torch.backends.cudnn.deterministic
    state["benchmark"] = torch.backends.cudnn.benchmark
    state["mkldnn matmul"] = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    with contextlib.suppress(RuntimeError):
        state["cudnn"] = torch.backends.cudnn.allow_tf32
    with contextlib.suppress(RuntimeError):
        state["matmul"] = torch.get_float32_matmul_precision()
    return state


def _choose(tf32: bool) -> None:
    """Let products be made so, in both words, as who reads one may want the other."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False  # It chooses by the clock.
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    for switch in _switches().values():
        switch.fp32_precision = "tf32" if tf32 else "ieee"


def _put_back(state: dict[str, Any]) -> None:
    """Let products be made as they were."""
    torch.backends.cudnn.deterministic = state["deterministic"]
    torch.backends.cudnn.benchmark = state["benchmark"]
    if "matmul" in state:
        torch.set_float32_matmul_precision(state["matmul"])
    if "cudnn" in state:
        torch.backends.cudnn.allow_tf32 = state["cudnn"]
    for name, switch in _switches().items():
        switch.fp32_precision = state[name]
    torch.backends.mkldnn.matmul.fp32_precision = state["mkldnn matmul"]  # type: ignore[attr-defined]
