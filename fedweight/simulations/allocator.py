"""Settings of a process that make training many clients cheaper."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Tell this process's allocator to keep what is freed; return whether it can.

    Training allocates and frees the same large buffers at every step. By default glibc
    maps and unmaps each of them, and each time the system has to find and to clear
    pages. Only glibc is told; elsewhere nothing happens. It holds for the whole
    process.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    largest = 2**30
    return bool(
        mallopt(M_MMAP_THRESHOLD, largest)
        and mallopt(M_TRIM_THRESHOLD, largest)
        and mallopt(M_TOP_PAD, 2**26)
    )
