"""Clients' errors in the log: each different one once."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

from ..core.records import ClientRecord
from ..core.texts import cause, clients_called, listed, one_of, without_numbers

log = logging.getLogger("fedweight")

# So many different errors are shown; the record has all.
MOST = 20


class KnownErrors:
    """Logs what went wrong with clients, each different error once in a run.

    Errors that differ in their numbers only are alike.
    """

    def __init__(self) -> None:
        self._known: set[tuple[str, str]] = set()
        self._told_the_rest = False
        self._left_out: set[str] = set()

    def left_out(self, round: int, measures: Collection[str]) -> None:
        """Log which measures a round has not, each once in a run."""
        new = sorted(set(measures) - self._left_out)
        self._left_out.update(new)
        if new:
            names, are = listed(map(repr, new), most=9), "are" if new[1:] else "is"
            log.warning(
                "round %d: %s of all clients together %s not finite and left out",
                round,
                names,
                are,
            )

    def tell(self, round: int, entries: Iterable[ClientRecord]) -> None:
        """Log the errors of a round that are new, with the clients they happened to.

        Round 0 is before the first one.
        """
        found: dict[tuple[str, str], list[tuple[ClientRecord, str]]] = {}
        for entry in entries:
            if entry.status in ("rejected", "failed", "missing"):
                why = cause(entry.reason)
                kind: tuple[str, str] = (entry.status, without_numbers(why))
                found.setdefault(kind, []).append((entry, why))
        for error, cases in found.items():
            if error in self._known or self._told_the_rest:
                continue
            if len(self._known) == MOST:
                self._told_the_rest = True
                log.warning("further errors are not shown; the record has them")
                continue
            self._known.add(error)
            names = {e.client: e.name or str(e.client) for e, _ in cases}
            whose = clients_called([*names], names.__getitem__)
            reason = one_of([why for _, why in cases])
            when = f"round {round}" if round else "before the first round"
            log.warning("%s: %s %s: %s", when, whose, error[0], reason)
