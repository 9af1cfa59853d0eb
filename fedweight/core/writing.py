"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import OutputError


@contextlib.contextmanager
def written_aside(path: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a file beside another one, whose place it takes at the end.

    Nobody ever meets half of it: after an error in the block the file that was there
    before still is, and nothing is left aside.

    Parameters
    ----------
    path : Path
        The file; its folder is there.
    shared : bool
        Whether several processes may write the file at a time: the last one counts.

    Raises
    ------
    OSError
        If it cannot be written; :func:`cannot_write` makes a line of it.
    """
    own = f".{os.getpid()}" if shared else ""
    aside = path.with_name(f".{path.name}{own}.part")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes, *, shared: bool = False) -> None:
    """Write a file aside and rename it, so that nobody ever meets half of it.

    Parameters
    ----------
    path : Path
        The file; its folder is there.
    content : str or bytes
        What it holds; text becomes UTF-8.
    shared : bool
        Whether several processes may write the file at a time: the last one counts.

    Raises
    ------
    OutputError
        If it cannot be written; the file that was there before still is, and nothing
        is left aside.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        with written_aside(path, shared=shared) as file:
            file.write(data)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> OutputError:
    """Return the error that says why a file cannot be written, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return OutputError(
        f"{path} cannot be written: {error.strerror or error}. "
        f"{'Make room, or name' if full else 'Name'} another folder; what was "
        "written before is whole."
    )
