"""A run's folder: files that are whole or not there."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..paths import clean_path

# Tables grow by a few rows a round but are written whole. So that writing stays a
# small share of the time, a table rests this many times as long as it took to write.
REST = 20


def new_folder(out: str | Path | None, name: str) -> Path:
    """Make the folder of a new run.

    Parameters
    ----------
    out : str or Path, optional
        The folder itself; it may exist if it is empty. By default ``runs/<name>``,
        with a number added if that is taken.
    name : str
        What the run is called.

    Raises
    ------
    ConfigurationError
        If the folder is taken or cannot be made.
    """
    try:
        return _make_folder(out, name)
    except OSError as error:
        raise ConfigurationError(
            f"the run's folder '{error.filename}' cannot be made: {error.strerror}. "
            "Choose another with --out."
        ) from error


def _make_folder(out: str | Path | None, name: str) -> Path:
    if out is not None:
        folder = clean_path("--out", out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigurationError(
                f"--out '{folder}' exists and is not an empty folder. Name another, or "
                "remove it first: a run never writes over another's results."
            )
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    name = re.sub(r"[/\\]+", "-", name)
    for number in range(1, 1_000_000):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise ConfigurationError("runs/ is full; choose a folder with --out.")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file aside and rename it, so that nobody ever meets half of it."""
    aside = path.with_name(f".{path.name}.part")
    data = content.encode() if isinstance(content, str) else content
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


class Table:
    """A CSV file that grows row by row.

    Parameters
    ----------
    path : Path
        The file.
    columns : Sequence[str]
        Columns that it always has; others are added at the end as rows bring them.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = list(columns)
        self._known = set(self.columns)
        self._lines: list[str] = []
        self._rest_until = 0.0

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows; write the file unless it was written a moment ago."""
        for row in rows:
            new = [name for name in row if name not in self._known]
            self.columns += new
            self._known.update(new)
            self._lines.append(_line(row.get(name) for name in self.columns))
        if time.monotonic() >= self._rest_until:
            self.write()

    def write(self) -> None:
        """Write the file."""
        began = time.monotonic()
        width = len(self.columns)
        lines = [_line(self.columns)]
        for line in self._lines:
            # Rows from before a column was known lack its commas.
            short = width - 1 - _commas(line)
            lines.append(line[:-1] + "," * short + "\n" if short else line)
        write_whole(self.path, "".join(lines))
        ended = time.monotonic()
        self._rest_until = ended + REST * (ended - began)


def _commas(line: str) -> int:
    """Count the separators of a line, not the commas inside quotes."""
    if '"' not in line:
        return line.count(",")
    return len(next(csv.reader([line]))) - 1


def _line(values: Iterable[Any]) -> str:
    """Return one line of CSV; a float in full, NaN as nothing."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(
        "" if v is None or (isinstance(v, float) and math.isnan(v)) else v
        for v in values
    )
    return buffer.getvalue()
