"""Ends what is left of a Ray whose driver was killed.

A driver that ends in an orderly way ends its Ray. When it is killed the system ends the
processes that it has started, but theirs stay: workers for seconds, agents for a minute
or more, since they wait for servers that are gone. This program, started beside the
driver, waits for the end of its standard input, from which it is told the session's
folder. If it has not been told that all is closed by then the driver is dead, and the
processes are killed that carry Ray's mark in their environment, or that write to the
session's folder: Ray's agents wipe their environment when they change their title.

It is run by its path, with nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

SECONDS = 10.0

# What the driver says last, when it has ended its Ray itself.
CLOSED = "closed"

# So long nothing must have shown up: a process that is just being started has no mark
# yet.
QUIET = 1.0


def main(mark: str) -> None:
    """Wait for the driver's end; end what carries a mark, ``NAME=value``."""
    told = os.fsdecode(sys.stdin.buffer.read())
    if told.endswith(CLOSED):
        return
    folder = told.strip()
    last = time.monotonic()
    deadline = last + SECONDS
    while time.monotonic() < min(deadline, last + QUIET):
        for process in marked(mark.encode()) | writing_to(folder):
            last = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def marked(mark: bytes) -> set[int]:
    """Return the processes, but this one, that have inherited a mark."""
    found = set()
    for number in _others():
        with (
            contextlib.suppress(OSError),  # It is gone, or somebody else's.
            open(f"/proc/{number}/environ", "rb") as file,
        ):
            if mark in file.read().split(b"\0"):
                found.add(number)
    return found


def writing_to(folder: str) -> set[int]:
    """Return the processes, but this one, that write to a file of a folder."""
    return {number for number in _others() if folder and _writes(number, folder)}


def _writes(number: int, folder: str) -> bool:
    """Tell whether a process writes to a folder; those that are gone do not."""
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{number}/fd"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                path = os.readlink(f"/proc/{number}/fd/{name}")
                if path.startswith(f"{folder}/"):
                    with open(f"/proc/{number}/fdinfo/{name}") as file:
                        flags = int(file.read().split("flags:")[1].split()[0], 8)
                    if flags & os.O_ACCMODE != os.O_RDONLY:
                        return True
    return False


def _others() -> list[int]:
    names = os.listdir("/proc")
    return [int(n) for n in names if n.isdigit() and int(n) != os.getpid()]


if __name__ == "__main__":
    main(sys.argv[1])
