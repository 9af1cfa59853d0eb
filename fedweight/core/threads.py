"""Threads that never change a result."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

from .pytorch import torch

S = TypeVar("S")
T = TypeVar("T")


class SharedLock:
    """A lock that many threads hold at once, or one thread alone.

    Who wants it alone waits for those who share it, and nobody joins them meanwhile.
    The thread that has it alone may ask for it again, either way.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = 0
        self._alone: int | None = None  # the thread that has it, or waits for it

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lock together with others."""
        if self._alone == threading.get_ident():
            yield
            return
        with self._changed:
            while self._alone is not None:
                self._changed.wait()
            self._sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock alone; not for a thread that shares it."""
        if self._alone == threading.get_ident():
            yield
            return
        with self._changed:
            while self._alone is not None:
                self._changed.wait()
            self._alone = threading.get_ident()
        try:
            with self._changed:
                while self._sharing:
                    self._changed.wait()
            yield
        finally:
            with self._changed:
                self._alone = None
                self._changed.notify_all()


_most_cores: int | None = None


def limit_cores(most: int) -> None:
    """Let this process take no more cores, as others run beside it."""
    global _most_cores
    _most_cores = most


def num_cores() -> int:
    """Return how many cores this process may use."""
    if _most_cores is not None:
        return min(_most_cores, _cores_of_machine())
    return _cores_of_machine()


def _cores_of_machine() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch's operations in this thread use one thread each.

    More would change the last bits of their results.
    """
    intra_op = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(intra_op)


@contextmanager
def as_in_a_new_thread() -> Iterator[None]:
    """Let clients train as in other threads and processes, whatever the caller does.

    A caller's ``torch.no_grad()`` or ``torch.autocast()`` is its own thread's.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


def map_in_order(
    work: Callable[[S], T], items: Iterable[S], threads: int = 1
) -> list[T]:
    """Do work on every item, one thread each; the results keep the items' order."""
    items = list(items)
    with one_thread():
        if threads == 1 or len(items) <= 1:
            return [work(item) for item in items]
        return list(_pool(threads, os.getpid()).map(work, items))


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return this process's pool of so many threads, each without threads of its own.

    PyTorch's number of threads is a thread's own; all start now, while the caller's
    is one.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="fedweight")
    started = threading.Barrier(threads)

    def start(_: int) -> None:
        torch.set_num_threads(1)
        started.wait()

    list(pool.map(start, range(threads)))
    return pool
