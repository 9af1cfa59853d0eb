"""What is told of a run after each round, and the bar that shows it.

What draws a bar is imported when one is drawn.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from ..core.errors import ConfigurationError
from ..core.texts import shown

# Terminals that cannot write a line again.
_DUMB = ("dumb", "unknown")

# How often a notebook's bar is drawn, in seconds: each time is a message to a browser.
_SELDOM = 0.2


@dataclass(frozen=True)
class Progress:
    """What is known after a round.

    ``accuracy`` and ``loss`` are on the test data. Both are NaN after a round that is
    not tested; the accuracy alone, where numbers are predicted.
    """

    round: int
    rounds: int
    accuracy: float
    loss: float
    seconds: float

    @property
    def text(self) -> str:
        """What the test has shown, in words."""
        known = {"accuracy": self.accuracy, "loss": self.loss}
        told = [f"{n} {value:.4f}" for n, value in known.items() if value == value]
        return "  ".join(told) or "not tested"

    def __str__(self) -> str:
        """Return a line for a terminal or a log."""
        return f"round {self.round}/{self.rounds}  {self.text}  {self.seconds:.1f} s"


Report = Callable[[Progress], None]

Wanted = Report | bool | None
"""What is called after each round; True is a bar where somebody watches."""


def check_progress(progress: Any) -> None:
    """Refuse what can neither be called nor says whether to show a bar."""
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise ConfigurationError(
            "progress must be a function of a round's Progress, or True or False, got "
            f"{shown(progress)}."
        )


def watched() -> Literal["terminal", "notebook", ""]:
    """Return where somebody watches this process, if anybody does.

    A terminal shows one bar, so only runs in the main thread have one.
    """
    if threading.current_thread() is not threading.main_thread():
        return ""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if any(cls.__name__ == "ZMQInteractiveShell" for cls in type(shell).__mro__):
        return "notebook"
    try:
        terminal = sys.stderr.isatty()
    except (AttributeError, ValueError):  # There is none, or it is closed.
        return ""
    return "terminal" if terminal and os.environ.get("TERM") not in _DUMB else ""


@contextmanager
def telling(progress: Wanted) -> Iterator[Report | None]:
    """Return what is to be called after each round, in a ``with`` block.

    However the block ends, a bar is taken down and the terminal is what it was.
    """
    if not (progress is None or isinstance(progress, bool)):
        yield progress
        return
    where = watched() if progress else ""
    if not where:
        yield None
        return
    bar = _TerminalBar() if where == "terminal" else _NotebookBar()
    try:
        yield bar
    finally:
        bar.close()


class _TerminalBar:
    """A bar at the end of a terminal's output, which goes on above it."""

    def __init__(self) -> None:
        self.bar: Any = None
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []

    def __call__(self, progress: Progress) -> None:
        if self.bar is None:
            self._draw(progress)
        self.bar.update(
            self.bar.task_ids[0], completed=progress.round, text=progress.text
        )

    def _draw(self, progress: Progress) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar

        out, err = sys.stdout, sys.stderr
        self.bar = Bar(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            # What goes elsewhere, to a file perhaps, still does.
            redirect_stdout=out is not None and out.isatty(),
        )
        # A run that goes on begins in the middle, which is no speed.
        self.bar.add_task("", total=progress.rounds, completed=progress.round, text="")
        self.bar.start()
        # Handlers keep the stream that they were made with; what they write to it
        # would tear the bar.
        for name in (None, "fedweight", "flwr"):
            for handler in logging.getLogger(name).handlers:
                if not isinstance(handler, logging.StreamHandler):
                    continue
                for before, now in ((err, sys.stderr), (out, sys.stdout)):
                    if handler.stream is before is not now:
                        self._handlers.append((handler, handler.setStream(now)))

    def close(self) -> None:
        """Take the bar down; what it shows last stays."""
        for handler, stream in self._handlers:
            handler.setStream(stream)
        if self.bar is not None:
            with suppress(OSError):  # The terminal may be closed by now.
                self.bar.stop()


class _NotebookBar:
    """A bar below a notebook's cell, by IPython alone: no widgets are needed."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._last: Progress | None = None
        self._drawn = 0.0

    def __call__(self, progress: Progress) -> None:
        self._last = progress
        now = time.monotonic()
        if self._handle is None:
            display = importlib.import_module("IPython.display").display
            self._handle = display(_Shown(progress), display_id=True)
        elif now - self._drawn < _SELDOM:
            return
        else:
            self._handle.update(_Shown(progress))
        self._drawn = now

    def close(self) -> None:
        """Show the last round."""
        if self._handle is not None and self._last is not None:
            self._handle.update(_Shown(self._last))


@dataclass(frozen=True)
class _Shown:
    """A round as a notebook shows it."""

    progress: Progress

    def _repr_html_(self) -> str:
        now = self.progress
        return (
            f"<progress value='{now.round}' max='{now.rounds}'></progress> "
            f"{escape(str(now))}"
        )

    def __repr__(self) -> str:
        return str(self.progress)
