"""Clients' exceptions in Flower's log: each in full once, with whose they are.

Flower's strategies log the reason of every reply that is an error, which is one line
where Flower's runtime wrote it. Ours has the traceback, too
(:func:`~fedweight.core.errors.describe_failure`), and a client may fail in every round.
"""

from __future__ import annotations

import contextlib
import logging
import re
import textwrap
from collections.abc import Iterator

# The first line of a reason with a traceback: whose it is, and the type of the error.
_REASON = re.compile(
    r"client (?P<client>\d+), [^:\n]*: (?P<kind>[^:\n]*).*\n", re.ASCII
)
_PLACE = re.compile(r'^[ |]*File ".*$', re.MULTILINE)


class _Once(logging.Filter):
    """Shortens the tracebacks in what is logged. It drops nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._known: set[tuple[str, str, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Let a record pass, with what is known already in one line."""
        if isinstance(record.args, tuple):
            record.args = tuple(map(self._short, record.args))
        return True

    def _short(self, argument: object) -> object:
        told = _REASON.match(argument) if isinstance(argument, str) else None
        if told is None:
            return argument
        first, rest = told.group(), told.string[told.end() :]
        *_, place = "", *_PLACE.findall(rest)
        error = told["client"], told["kind"], place
        if error in self._known:
            return first.rstrip()
        self._known.add(error)
        whose = f"(client {told['client']}) "
        return first + textwrap.indent(rest.rstrip(), whose, lambda line: True)


@contextlib.contextmanager
def tracebacks_once() -> Iterator[None]:
    """Let Flower's log have each client's tracebacks once, for a ``with`` block.

    A client's errors are the same where their type and the place that raised them are.
    Their first lines are all logged, and replies keep their reasons whole. Lines of a
    traceback begin with ``(client 2)``, as what the client prints does.
    """
    logger, once = logging.getLogger("flwr"), _Once()
    logger.addFilter(once)
    try:
        yield
    finally:
        logger.removeFilter(once)
