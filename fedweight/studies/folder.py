"""A run's folder: one run's at a time, with files that are whole or not there."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import logging
import os
import re
import sys
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..core.client_store import is_file_name
from ..core.errors import ConfigurationError, DataError
from ..core.paths import clean_path
from ..core.texts import listed, plain
from ..core.writing import cannot_write, write_whole

if sys.platform != "win32":
    import fcntl

log = logging.getLogger("fedweight")

# What a run that is not over goes on from; when it is over there is none.
CHECKPOINT = "checkpoint.safetensors"

# What went wrong, each error once and in full.
ERRORS = "errors.log"

# All that a run writes, besides the files of a client store while it goes on.
FILES = (
    "config.toml",
    "environment.json",
    "rounds.csv",
    "clients.csv",
    "groups.csv",
    "partition.csv",
    "personal.csv",
    "personal-models.safetensors",
    "client-states.safetensors",
    "timings.csv",
    ERRORS,
    "model.safetensors",
    "best-model.safetensors",
    "best-models.safetensors",
    "models.safetensors",
    "report.html",
    CHECKPOINT,
)

# Held by the run that writes to the folder, and removed when it ends.
LOCK = ".lock"

# Whether a run that is there may be removed: yes with a line that names what is, or,
# where it is known to be unfinished, without.
Overwrite = bool | Literal["unfinished"]


def check_free(out: str | Path | None, overwrite: Overwrite = False) -> None:
    """Refuse early a folder that :func:`new_folder` would refuse; write nothing."""
    if out is not None:
        with _refusals(out):
            _check_content(clean_path("--out", out), overwrite)


@contextmanager
def new_folder(
    out: str | Path | None, name: str, overwrite: Overwrite = False
) -> Iterator[Path]:
    """Take the folder of a new run, for the time of a ``with`` block.

    Meanwhile no other run can take it.

    Parameters
    ----------
    out : str or Path, optional
        The folder itself; it may exist if it is empty. By default ``runs/<name>``,
        with a number added if that is taken.
    name : str
        What the run is called.
    overwrite : bool or "unfinished"
        Remove a run that is in the folder already, and is not running. Anything else
        that is there is left alone, and refused.

    Raises
    ------
    ConfigurationError
        If the folder is taken or cannot be made.
    """
    with _refusals(f"runs/{name}" if out is None else out):
        folder = _make_folder(out, name, overwrite)
        lock = _take(folder, overwrite)
    try:
        yield folder
    finally:
        _give_back(folder, lock)


@contextmanager
def old_folder(folder: Path) -> Iterator[Path]:
    """Take the folder of a run that was stopped, for the time of a ``with`` block."""
    lock = _lock(folder / LOCK)
    if lock is None:
        raise ConfigurationError(
            f"another run is writing to '{folder}'. Wait for its end."
        )
    try:
        yield folder
    finally:
        _give_back(folder, lock)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Take the folder of a comparison, for the time of a ``with`` block.

    Raises
    ------
    ConfigurationError
        If another process has it, or nothing can be written there.
    """
    try:
        lock = _lock(folder / LOCK)
    except OSError as error:
        raise ConfigurationError(
            f"nothing can be written to '{folder}': {error.strerror}. Choose another "
            "folder with --out."
        ) from error
    if lock is None:
        raise ConfigurationError(
            f"another 'fedweight compare' is at work in '{folder}'. Nothing was run. "
            "Wait for its end, and give the same command again; or name another "
            "folder with --out."
        )
    try:
        yield
    finally:
        _give_back(folder, lock)


@contextmanager
def _refusals(folder: str | Path) -> Iterator[None]:
    """Say of any folder that cannot be made which one it is."""
    try:
        yield
    except ConfigurationError:
        raise
    except (OSError, ValueError) as error:  # ValueError: no path has a NUL in it.
        raise ConfigurationError(
            f"the run's folder '{plain(folder)}' cannot be made: "
            f"{getattr(error, 'strerror', None) or error}. Choose another with --out."
        ) from error


def _make_folder(out: str | Path | None, name: str, overwrite: Overwrite) -> Path:
    if out is not None:
        folder = clean_path("--out", out)
        _check_content(folder, overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    name = re.sub(r"[/\\]+", "-", name).lstrip(".- ")  # A hidden one is not found.
    if overwrite:
        return _make_folder(Path("runs") / name, name, overwrite)
    for number in range(1, 1_000_000):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise ConfigurationError("runs/ is full; choose a folder with --out.")


def _check_content(folder: Path, overwrite: Overwrite) -> list[str]:
    """Return what a run that may be removed has written to a folder; or refuse it."""
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(
            f"--out '{folder}' exists and is not an empty folder. Name another."
        )
    names = sorted(os.listdir(folder)) if folder.exists() else []
    names = [name for name in names if name != LOCK]
    if names and not overwrite:
        raise ConfigurationError(
            f"--out '{folder}' exists and is not an empty folder. Name another, or "
            "remove it first: a run never writes over another's results. To replace "
            "a run that is there say --overwrite (in Python overwrite=True)."
        )
    if names:
        _check_is_run(folder, names)
    return names


def _check_is_run(folder: Path, names: Sequence[str]) -> None:
    """Refuse to remove anything but a run."""
    ours = {*FILES, *(f".{name}.part" for name in FILES)}
    others = [
        n
        for n in names
        if (n not in ours and not is_file_name(n)) or (folder / n).is_dir()
    ]
    if not others and set(FILES).isdisjoint(names):
        return  # It ended before its first file was whole.
    try:
        tables = tomllib.loads((folder / "config.toml").read_text("utf-8"))
    except (OSError, ValueError):
        tables = {}
    if others or not {"run", "strategy"} <= set(tables):
        what = plain(listed(others)) if others else "no config.toml of a run"
        raise ConfigurationError(
            f"--overwrite removes a run and nothing else, but '{folder}' has {what}. "
            "Nothing was removed. Name another folder with --out."
        )


def _take(folder: Path, overwrite: Overwrite) -> int:
    """Lock a folder for this run; remove the run that is there, if it may be."""
    lock = _lock(folder / LOCK)
    if lock is None:
        raise ConfigurationError(
            f"another run is writing to '{folder}'. Wait for its end, or name another "
            "folder with --out."
        )
    try:
        # Another run may have come and gone since it was looked at.
        names = _check_content(folder, overwrite)
        if names and overwrite is True:
            log.warning("removing the run in %s: %s", folder, listed(names, most=12))
        # The last one says that it is a run's folder, if not all can be removed.
        for name in sorted(names, key=lambda name: name == "config.toml"):
            (folder / name).unlink()
    except BaseException:
        _give_back(folder, lock)
        raise
    return lock


def _lock(path: Path) -> int | None:
    """Return an open file that nobody else has locked; ``None`` where somebody has.

    The lock ends with the process, however that ends.
    """
    if sys.platform == "win32":
        try:
            path.unlink(missing_ok=True)  # An open file cannot be removed there.
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except (PermissionError, FileExistsError):
            return None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            return descriptor  # A file system without locks: nobody can tell.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # Its run has removed it, in between.


def _give_back(folder: Path, lock: int) -> None:
    if sys.platform == "win32":
        os.close(lock)
    with contextlib.suppress(OSError):
        (folder / LOCK).unlink()
    if sys.platform != "win32":
        os.close(lock)


# Begins a config.toml that is not enough to repeat its run.
_CANNOT_REPEAT = "# This file alone does not repeat its run: "


def cannot_repeat(why: str, instead: str) -> str:
    """Return the comments that a ``config.toml`` begins with that is not enough.

    Examples
    --------
    >>> print(cannot_repeat("its data are gone", "bring them"), end="")
    # This file alone does not repeat its run: its data are gone.
    # To repeat it, bring them.
    """
    return f"{_CANNOT_REPEAT}{why}.\n# To repeat it, {instead}.\n"


def check_repeats(path: Path) -> None:
    """Refuse a ``config.toml`` that says that it does not repeat its run."""
    try:
        with path.open(encoding="utf-8") as file:
            why, how = file.readline(1000), file.readline(1000)
    except (OSError, ValueError):
        return  # Whoever reads it says so.
    if why.startswith(_CANNOT_REPEAT):
        said = plain(f"{why.removeprefix('# ')} {how.removeprefix('# ')}")
        raise ConfigurationError(f"{path}: {said}")


class Table:
    """A CSV file that grows row by row: what is there already is not written again.

    Only a column that is new has the file written anew.

    Parameters
    ----------
    path : Path
        The file.
    columns : Sequence[str]
        Columns that it always has; others are added at the end as rows bring them.
    optional : Collection[str]
        Those of ``columns`` that are there, in their place, once a row brings them.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], optional: Collection[str] = ()
    ) -> None:
        self.path = path
        self.columns = [name for name in columns if name not in optional]
        self._order = list(columns)
        self._known = set(self.columns)
        self._pending = ""
        self._begun = False
        self._rows = 0

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows to the file."""
        several = list(rows)
        names = dict.fromkeys(chain.from_iterable(several))
        columns = {name: [row.get(name) for row in several] for name in names}
        self.append_columns(columns, len(several))

    def append_columns(self, columns: Mapping[str, Sequence[Any]], count: int) -> None:
        """Add so many rows to the file, given by their columns."""
        new = {name: None for name in columns if name not in self._known}
        if new:
            self._add_columns(new)
        nothing = [""] * count
        cells = [
            _cells(columns[name]) if name in columns else nothing
            for name in self.columns
        ]
        self._pending += _lines(zip(*cells, strict=True))
        self._rows += count
        self.write()

    def complete(self, more: Mapping[str, Any]) -> None:
        """Fill in cells of the last row."""
        self.write()
        new = {name: None for name in more if name not in self._known}
        if new:
            self._add_columns(new)
        header, *rows = rows_of(self.path)
        known = dict(zip(header, rows[-1], strict=True))
        last = _cells(more.get(name, cell) for name, cell in known.items())
        self._write_again(header, [*rows[:-1], last])

    def _add_columns(self, new: Iterable[str]) -> None:
        before = list(self.columns)
        for name in new:
            self._known.add(name)
            place = len(self.columns)
            if name in self._order:
                ahead = self._order[: self._order.index(name)]
                place = sum(n in self.columns for n in ahead)
            self.columns.insert(place, name)
        if self._begun:
            self._write_again(before, rows_of(self.path)[1:])

    def _write_again(
        self, before: Sequence[str], rows: Iterable[Sequence[Any]]
    ) -> None:
        """Write the file anew, of rows that have the columns of before."""
        place = {name: k for k, name in enumerate(before)}
        lines = [
            [row[place[name]] if name in place else "" for name in self.columns]
            for row in rows
        ]
        write_whole(self.path, _lines([self.columns, *lines]))

    def write(self) -> None:
        """Write what is not in the file yet."""
        if not self._begun:
            write_whole(self.path, _lines([self.columns]) + self._pending)
            self._begun, self._pending = True, ""
        if not self._pending:
            return
        size = None
        try:
            with self.path.open("ab") as file:
                size = file.tell()
                file.write(self._pending.encode())
        except OSError as error:
            if size is not None:  # Half a row is none.
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)
            raise cannot_write(self.path, error) from error
        self._pending = ""

    @property
    def state(self) -> dict[str, Any]:
        """Columns and number of rows, for :meth:`restore`."""
        return {"columns": list(self.columns), "rows": self._rows}

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse to go on from this state where the file has fewer rows than it.

        Raises
        ------
        DataError
            If it has, or is not there.
        """
        there = len(rows_of(self.path)) - 1 if self.path.is_file() else 0
        if there < state["rows"]:
            raise DataError(
                f"{self.path} has {there} rows, and {state['rows']} when the "
                "checkpoint was written. It has been changed since."
            )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where a table ended that had this state; what came later is removed."""
        header, *rows = rows_of(self.path)
        self.columns = list(state["columns"])
        self._known = set(self.columns)
        self._begun, self._rows = True, state["rows"]
        self._write_again(header, rows[: self._rows])


def rows_of(path: Path) -> list[list[str]]:
    """Return the whole rows of a table, the first of them the header.

    A process that is killed may leave a part of its last row, which is left out.
    """
    rows = list(csv.reader(io.StringIO(whole_rows(path), newline="")))
    return rows or [[]]


def whole_rows(path: Path) -> str:
    """Return the text of a table, without a last row of which only a part is there."""
    data = path.read_bytes()
    if not data.endswith(b"\n") or data.count(b'"') % 2:
        # A character may be cut at the end; what else is no UTF-8 is no table.
        codecs.getincrementaldecoder("utf-8")().decode(data)
        # The row begins behind the last line end that is not within quotes.
        inside = np.cumsum(np.frombuffer(data, np.uint8) == ord('"')) % 2 == 1
        ends = (np.frombuffer(data, np.uint8) == ord("\n")) & ~inside
        data = data[: int(np.flatnonzero(ends)[-1]) + 1 if ends.any() else 0]
    return data.decode()


def _cells(values: Iterable[Any]) -> list[Any]:
    """Return what a table has of values: of NaN and ``None`` nothing."""
    # What differs from itself is NaN.
    return ["" if v is None or v != v else v for v in values]


def _lines(rows: Iterable[Iterable[Any]]) -> str:
    """Return lines of CSV; a float in full."""
    cells = list(rows)
    text = _as_csv(cells)
    if "\r" in text:  # Not every version of the module quotes a lone carriage return.
        text = "".join(
            _as_csv([row], csv.QUOTE_ALL) if "\r" in line else line
            for row in cells
            for line in [_as_csv([row])]
        )
    return text


def _as_csv(
    rows: Iterable[Iterable[Any]], quoting: Literal[0, 1] = csv.QUOTE_MINIMAL
) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n", quoting=quoting).writerows(rows)
    return buffer.getvalue()
