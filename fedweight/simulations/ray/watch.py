"""Ends what is left of a Ray whose driver was killed.

A driver that ends in an orderly way ends its Ray. When it is killed the system ends the
processes that it has started, but theirs stay: workers for seconds, agents for a minute
or more, since they wait for servers that are gone. This program, started beside the
driver, waits for the end of its standard input. If nothing has come by then the driver
is dead, and the processes are killed that carry Ray's mark in their environment.

It is run by its path, with nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

SECONDS = 10.0

# So long nothing must have shown up: a process that is just being started has no mark
# yet.
QUIET = 1.0


def main(mark: str) -> None:
    """Wait for the driver's end; end what carries a mark, ``NAME=value``."""
    if sys.stdin.buffer.read():
        return
    last = time.monotonic()
    deadline = last + SECONDS
    while time.monotonic() < min(deadline, last + QUIET):
        for process in marked(mark.encode()):
            last = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def marked(mark: bytes) -> list[int]:
    """Return the processes, but this one, that have inherited a mark."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with (
                contextlib.suppress(OSError),  # It is gone, or somebody else's.
                open(f"/proc/{name}/environ", "rb") as file,
            ):
                if mark in file.read().split(b"\0"):
                    found.append(int(name))
    return found


if __name__ == "__main__":
    main(sys.argv[1])
