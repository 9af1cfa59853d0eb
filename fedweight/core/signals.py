"""Signals that ask a process to end: what was recorded is written first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# What a service manager sends, and a terminal that is closed.
_STOPS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class Terminated(KeyboardInterrupt):
    """A signal other than Ctrl-C's asks the process to end.

    Parameters
    ----------
    number : int
        The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def interruptible() -> Iterator[None]:
    """Let signals end what is done in a ``with`` block as Ctrl-C does.

    SIGTERM and SIGHUP raise :class:`Terminated`. SIGINT raises ``KeyboardInterrupt``
    also in a process that was started in the background of a script, where it is
    ignored. Handlers that a program has set itself stay; a SIGTERM or SIGHUP that is
    ignored (``nohup``) stays ignored.

    After the block all handlers are what they were. A process that was asked to end
    then does, by the same signal, unless somebody further out has said that it is
    interruptible. In another thread than the main one nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in _STOPS:
        if signal.getsignal(number) is signal.SIG_DFL:
            before[number] = signal.signal(number, _terminate)
    ended_by = 0
    try:
        yield
    except Terminated as stop:
        ended_by = stop.number
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if ended_by in before:
            os.kill(os.getpid(), ended_by)


@contextmanager
def own_handlers() -> Iterator[None]:
    """Put back the handlers that what is done in a ``with`` block replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *_STOPS)}
    try:
        yield
    finally:
        for number, handler in before.items():
            # Even one that is Python's still: another may be below it.
            if callable(handler):
                signal.signal(number, handler)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)
