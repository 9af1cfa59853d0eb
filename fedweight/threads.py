"""Threads that never change a result."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")


def num_cores() -> int:
    """Return how many cores this process may use."""
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
