"""Paths that a user names: made usable, or refused before anything is opened."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from .errors import ConfigurationError, DataError
from .settings import check_text
from .texts import shown


def clean_path(what: str, path: str | Path) -> Path:
    """Return a path with ``~`` replaced, or raise if no system could have it.

    Parameters
    ----------
    what : str
        How a message calls it, such as ``"data.path"``.
    path : str or Path
        What the user gave; it need not exist.

    Raises
    ------
    ConfigurationError
        If it holds NUL, a line break or another control character, is too long, or
        begins with ``~`` and a user that does not exist.

    Examples
    --------
    >>> clean_path("data.path", "a/b.csv")
    PosixPath('a/b.csv')
    """
    text = str(path)
    check_text(what, text)
    if any(character < " " or character == "\x7f" for character in text):
        raise ConfigurationError(
            f"{what} holds a line break or another control character, got "
            f"{shown(text)}. In double quotes a backslash begins one: write a Windows "
            "path in single quotes."
        )
    try:
        whole = Path(text).expanduser()
        whole.stat()
    except RuntimeError as error:
        raise ConfigurationError(f"{what}, {shown(text)}: {error}") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigurationError(
                f"{what} is longer than a path can be, got {shown(text)}."
            ) from None
    return whole


def absolute(what: str, path: str | Path, start: Path) -> Path:
    """Return :func:`clean_path` as seen from a folder, absolute, links followed."""
    try:
        return (start / clean_path(what, path)).resolve()
    except (OSError, RuntimeError) as error:
        raise ConfigurationError(f"{what}, {shown(str(path))}: {error}") from None


def address(path: str | Path) -> str:
    """Return a file's ``file://`` address, which terminals make a link.

    Examples
    --------
    >>> address("/runs/of today/report.html")
    'file:///runs/of%20today/report.html'
    """
    return Path(path).absolute().as_uri()


def readable_file(path: str | Path | None, kind: str) -> Path:
    """Return the path of a user's data file that is there to be read.

    Parameters
    ----------
    path : str, Path or None
        What the user gave.
    kind : str
        ``"csv"`` or ``"npz"``.

    Raises
    ------
    DataError
        If it is not given, not there, or no plain file.
    """
    if path is None:
        raise DataError(f"data '{kind}' needs the option path: your .{kind} file.")
    path = clean_path("path", path)
    reason = why_unreadable(path)
    if reason == NOT_THERE:
        raise DataError(f"{path} does not exist. Give the path of a .{kind} file.")
    if reason is not None:
        raise DataError(
            f"{path} cannot be read: {reason}. Give the path of a .{kind} file."
        )
    return path


NOT_THERE = "it does not exist"


def why_unreadable(path: Path) -> str | None:
    """Return why a file cannot be read, or ``None`` if it is there and a plain file.

    Pipes and devices are not: they may never end.

    Examples
    --------
    >>> why_unreadable(Path("/no/such/file"))
    'it does not exist'
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, ValueError):
        return NOT_THERE
    except OSError as error:
        return error.strerror or str(error)
    if stat.S_ISDIR(mode):
        return "it is a folder"
    if not stat.S_ISREG(mode):
        return "it is a pipe or a device, not a file"
    if not os.access(path, os.R_OK):
        return "permission to read it is missing"
    return None


def cache_folder() -> Path:
    """Return where this machine keeps what would take long to make again.

    ``fedweight`` in the folder that ``XDG_CACHE_HOME`` names, or in ``~/.cache``.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fedweight"
