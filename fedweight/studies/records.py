"""From what a strategy recorded to the rows of ``rounds.csv`` and ``clients.csv``.

And to ``errors.log``, where what went wrong is told in full.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from ..core.texts import (
    NAME_LENGTH,
    REASON_LENGTH,
    TRACEBACK_LENGTH,
    clients_called,
    own_name,
    plain,
    plain_lines,
    rounds_listed,
    without_client,
)
from ..core.writing import write_whole
from ..metrics import client_spread
from ..strategies import ClientRecord, RoundRecord
from .columns import CLIENT_NAMES, COUNTS

Row = dict[str, Any]


def client_columns(
    number: int, records: Sequence[ClientRecord]
) -> dict[str, list[Any]]:
    """Return the columns of a round's clients, a value each; ``None`` is none."""
    columns: dict[str, list[Any]] = {}
    for name, values in _by_name([record.metrics for record in records]):
        column, counts = _column(name)
        if counts:
            values = [
                v if v is None or not math.isfinite(v) else int(v) for v in values
            ]
        if column in columns:  # Of two metrics of one column.
            pairs = zip(columns[column], values, strict=True)
            values = [one if other is None else other for one, other in pairs]
        columns[column] = values
    for name, values in _by_name([record.own_metrics for record in records]):
        columns[f"own_{snake_case(name)}"] = values
    if any(record.name for record in records):
        names = [own_name(r.client, plain(r.name, NAME_LENGTH)) for r in records]
        if any(names):
            columns["name"] = [name or None for name in names]
    columns["round"] = [number] * len(records)
    columns["client"] = [record.client for record in records]
    columns["status"] = [record.status for record in records]
    columns["reason"] = [first_line(record.reason) for record in records]
    columns["weight"] = [record.weight for record in records]
    columns["bytes_down"] = [record.bytes_down for record in records]
    columns["bytes_up"] = [record.bytes_up for record in records]
    return columns


def _by_name(
    several: Sequence[Mapping[str, float]],
) -> Iterator[tuple[str, list[float | None]]]:
    """Yield what several clients measured by name, a value each."""
    for name in dict.fromkeys(chain.from_iterable(several)):
        yield name, [one.get(name) for one in several]


def client_row(number: int, record: ClientRecord) -> Row:
    """Return one client's row of a round."""
    columns = client_columns(number, [record])
    return {name: value for name, (value,) in columns.items() if value is not None}


def _whole(value: float | None) -> float | None:
    """Return what was counted as a whole number, if it is one."""
    return int(value) if value is not None and math.isfinite(value) else value


@lru_cache(maxsize=4096)
def _column(name: str) -> tuple[str, bool]:
    """Return the column of a client's metric, and whether it counts something."""
    column = CLIENT_NAMES.get(name) or snake_case(name)
    return column, column in COUNTS


def round_row(
    record: RoundRecord, test: dict[str, float], *, accuracies: bool = True
) -> Row:
    """Return a round's row.

    Parameters
    ----------
    record : RoundRecord
        Of the round.
    test : dict[str, float]
        What the server measured, or empty.
    accuracies : bool
        Whether predictions are right or wrong.
    """
    statuses: list[str] = [c.status for c in record.clients]
    spread = client_spread(
        c.metrics.get("evaluate-accuracy", math.nan) for c in record.clients
    )
    counted = ("ok", "rejected", "failed", "missing", "dropped")
    return {
        **{
            snake_case(name): value
            for name, value in record.metrics.items()
            if name != "num-steps"
        },
        "round": record.number,
        "status": record.status,
        "reason": first_line(record.reason),
        "asked": sum(status != "evaluated" for status in statuses),
        **{status: statuses.count(status) for status in counted},
        **measured_columns(test),
        **{f"client_accuracy_{n}": v for n, v in spread.items() if accuracies},
        "bytes_down": sum(c.bytes_down for c in record.clients),
        "bytes_up": sum(c.bytes_up for c in record.clients),
    }


def personal_rows(record: RoundRecord, columns: Collection[str]) -> Iterator[Row]:
    """Yield a row for each client of the phase after the rounds."""
    for client in record.clients:
        row = client_row(record.number, client)
        yield {name: value for name, value in row.items() if name in columns}


def personal_means(record: RoundRecord) -> Row:
    """Return what the last round's row has of the phase after it."""
    means = {snake_case(name): value for name, value in record.metrics.items()}
    return {n: v for n, v in means.items() if n.startswith("evaluate_personal")}


def measured_columns(test: Mapping[str, float], part: str = "test") -> Row:
    """Return what the server measured by the columns of a round's row."""
    return {f"{part}_{snake_case(name)}": value for name, value in test.items()}


@lru_cache(maxsize=4096)
def snake_case(name: str) -> str:
    """Return a metric's name as a column's.

    Examples
    --------
    >>> snake_case("proxy-loss")
    'proxy_loss'
    """
    return plain(name, NAME_LENGTH).replace("-", "_")


def first_line(text: str) -> str:
    """Return the first line of a reason; a traceback is for ``errors.log``."""
    return plain(text.strip().split("\n", 1)[0]) if text else ""


@dataclass
class Error:
    """One error, and whom it happened to."""

    text: str
    rounds: set[int] = field(default_factory=set)
    clients: dict[int, str] = field(default_factory=dict)
    times: int = 0


class ErrorLog:
    """``errors.log``: each distinct error once, in full, with its rounds and clients.

    What one line says in full is in ``clients.csv`` and not here.

    Parameters
    ----------
    path : Path
        The file; there is none until there is an error.
    """

    MOST = 100  # different errors

    def __init__(self, path: Path) -> None:
        self.path = path
        self._errors: dict[str, Error] = {}
        self._left_out = 0
        self._new = False
        self._end = ""

    def end(self, text: str) -> None:
        """Take in what the run ended with, before its time."""
        self._end = f"the run ended with\n{plain_lines(text, TRACEBACK_LENGTH)}\n"

    def add(self, record: RoundRecord) -> None:
        """Take in what went wrong in a round; write the file if some of it is new."""
        for client in record.clients:
            if client.reason:
                self._add(record.number, client)
        if self._new:
            self.write()

    def _add(self, number: int, client: ClientRecord) -> None:
        reason = client.reason.strip()
        if "\n" not in reason and len(reason) <= REASON_LENGTH:
            return
        key = without_client(reason[:TRACEBACK_LENGTH])
        error = self._errors.get(key)
        if error is None:
            if len(self._errors) == self.MOST:
                self._left_out += 1
                return
            error = self._errors[key] = Error(plain_lines(key, TRACEBACK_LENGTH))
            self._new = True
        error.rounds.add(number)
        error.clients[client.client] = client.name or str(client.client)
        error.times += 1

    @property
    def state(self) -> dict[str, Any]:
        """All that was taken in, for :meth:`restore`."""
        errors = {
            key: [e.text, sorted(e.rounds), e.clients, e.times]
            for key, e in self._errors.items()
        }
        return {"errors": errors, "left-out": self._left_out}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what another run took in; how that ended is over."""
        self._errors = {
            key: Error(text, set(rounds), clients, times)
            for key, (text, rounds, clients, times) in state["errors"].items()
        }
        self._left_out = state["left-out"]
        if not self._errors:
            self.path.unlink(missing_ok=True)

    def write(self) -> None:
        """Write the file, with what has come together since."""
        if not self._errors and not self._end:
            return
        parts = [_told(error) for error in self._errors.values()]
        if self._left_out:
            parts.append(
                f"{self._left_out} times other errors, after {self.MOST} different "
                "ones; clients.csv has their first lines.\n"
            )
        parts += [self._end] if self._end else []
        write_whole(self.path, "\n".join(parts))
        self._new = False


def _told(error: Error) -> str:
    whom = clients_called(sorted(error.clients), error.clients.__getitem__, most=20)
    rounds = rounds_listed(error.rounds, most=20)
    return f"{error.times} x, {rounds}, {whom}:\n{error.text}\n"
