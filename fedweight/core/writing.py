"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from .errors import OutputError


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
    own = f".{os.getpid()}" if shared else ""
    aside = path.with_name(f".{path.name}{own}.part")
    data = content.encode() if isinstance(content, str) else content
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> OutputError:
    """Return the error that says why a file cannot be written, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return OutputError(
        f"{path} cannot be written: {error.strerror or error}. "
        f"{'Make room, or name' if full else 'Name'} another folder; what was "
        "written before is whole."
    )
