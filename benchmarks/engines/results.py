"""Writing and showing results."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import BENCHMARKS
from .processes import machine

Row = dict[str, Any]

RESULTS = BENCHMARKS / "results"


def today() -> str:
    """Return the date as in a file's name."""
    return datetime.datetime.now().astimezone().date().isoformat()


def stamp(rows: Sequence[Row]) -> list[Row]:
    """Add date and machine to rows."""
    where = machine()
    return [{**row, "date": today(), "machine": where} for row in rows]


def write(rows: Sequence[Row], program: str, file: Path | None) -> Path:
    """Write rows to a file, by default a new one with the date; return which."""
    if file is None:
        name = f"{program}-{today()}"
        file = RESULTS / f"{name}.json"
        number = 1
        while file.exists():
            number += 1
            file = RESULTS / f"{name}-{number}.json"
    _write(file, json.dumps(list(rows), indent=1, allow_nan=False))
    return file


def write_study(rows: Sequence[Row], path: Path, /, **about: Any) -> None:
    """Write the rows of many runs to a file, with date, machine and what they hold for.

    What is not finite is null there: JSON has no NaN. A row is a line.
    """
    content = {"date": today(), "machine": machine(), **about, "rows": []}
    head = json.dumps(_finite(content), indent=1, allow_nan=False)
    lines = [json.dumps(_finite(row), allow_nan=False) for row in rows]
    _write(path, head[: -len("[]\n}")] + "[\n" + ",\n".join(lines) + "\n]}")


def _write(file: Path, text: str) -> None:
    """Write a file whole, or not at all: what was measured so far may be dear."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.part")
    aside.write_text(text + "\n", "utf-8")
    aside.replace(file)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content.item() if isinstance(content, np.generic) else content


def show(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Print rows as a table; what was not measured is a dash."""
    table = [list(columns), *([text(row.get(c)) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join(cells).rstrip())


def text(value: Any) -> str:
    """Return a value as in a table."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
