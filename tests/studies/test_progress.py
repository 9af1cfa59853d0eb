"""How a run shows its rounds: in a terminal, in a notebook, and elsewhere."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import textwrap
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from fedweight import run
from fedweight.core.errors import ConfigurationError
from fedweight.studies import progress as progress_module
from fedweight.studies.progress import Progress, telling, watched

pty = pytest.importorskip("pty", reason="terminals are POSIX's")

QUICK: dict[str, Any] = {
    "run.rounds": 3,
    "partition.clients": 3,
    "training.epochs": 1,
    "model.name": "softmax",
    "engine.name": "local",
}
HIDDEN, VISIBLE = "\x1b[?25l", "\x1b[?25h"


class Terminal:
    """A program whose standard error is a terminal."""

    # It writes its traceback as Python does at the end of a program.
    TEXT = """
import os, sys, traceback
os.dup2(os.open({terminal!r}, os.O_RDWR | os.O_NOCTTY), 2)
os.chdir({folder!r})
os.environ |= {environment!r}
print("open", flush=True)
from fedweight import run
try:
    exec({code!r}, {{"run": run, "QUICK": {quick!r}}})
except BaseException:
    traceback.print_exc()
    raise
"""

    def __init__(
        self, python: Any, code: str, folder: Path, **environment: str
    ) -> None:
        self.python, self.shown = python, ""
        self.ours, theirs = pty.openpty()
        text = self.TEXT.format(
            terminal=os.ttyname(theirs),
            folder=str(folder),
            environment={"TERM": "xterm", "COLUMNS": "120", **environment},
            code=textwrap.dedent(code),
            quick=QUICK,
        )
        self.number = python.start(text)
        assert python.line() == "open\n"
        os.close(theirs)

    def read(self, until: str = "") -> None:
        """Read what is shown, until the end or a text."""
        while not until or until not in self.shown:
            try:
                part = os.read(self.ours, 4096)
            except OSError:  # Linux's way to say that the other side is closed
                break
            if not part:
                break
            self.shown += part.decode()

    def end(self) -> str:
        """Wait for the end; return what went to the standard output."""
        self.read()
        os.close(self.ours)
        return str(self.python.finish())

    @property
    def lines(self) -> list[str]:
        """What is shown, line by line, without the terminal's own commands."""
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.shown)
        return [line.rstrip() for line in re.split(r"[\r\n]+", text)]


def test_python_shows_a_bar_by_default_and_a_warning_does_not_tear_it(
    tmp_path: Path, ready_python: Any
) -> None:
    terminal = Terminal(
        ready_python,
        """
        import logging, sys, warnings
        logging.basicConfig(format="%(levelname)s %(message)s")
        handler = logging.getLogger().handlers[0]
        before = handler.stream, sys.stdout, sys.stderr
        def tell(state):
            logging.getLogger("mine").warning("of round %d", state.round)
            print("said", state.round)
        run(settings=QUICK, out="x", report=False, callbacks=[tell])
        assert (handler.stream, sys.stdout, sys.stderr) == before
        """,
        tmp_path,
    )
    out = terminal.end()
    assert ready_python.status == 0, terminal.shown
    assert out == "said 1\nsaid 2\nsaid 3\n"
    assert "3/3" in terminal.shown
    assert [line for line in terminal.lines if "of round" in line] == [
        f"WARNING of round {number}" for number in (1, 2, 3)
    ]
    assert terminal.shown.rfind(VISIBLE) > terminal.shown.rfind(HIDDEN) >= 0


@pytest.mark.parametrize(
    ("asked", "environment"),
    [("False, None, lambda p: None", {}), ("True,", {"TERM": "dumb"})],
)
def test_python_shows_nothing_where_that_is_asked_for(
    tmp_path: Path, ready_python: Any, asked: str, environment: dict[str, str]
) -> None:
    code = f"""
    for number, progress in enumerate(({asked})):
        run(settings=QUICK, out=str(number), report=False, progress=progress)
    """
    terminal = Terminal(ready_python, code, tmp_path, **environment)
    assert terminal.end() == ""
    assert ready_python.status == 0
    assert terminal.shown == ""
    assert len([*tmp_path.iterdir()]) == len(asked.split(",")) - asked.endswith(",")


@pytest.mark.parametrize("how", ["Ctrl-C", "an error"])
def test_whatever_ends_a_run_leaves_the_terminal_as_it_was(
    tmp_path: Path, ready_python: Any, how: str
) -> None:
    terminal = Terminal(
        ready_python,
        """
        import time
        def wait(state):
            if state.round == 2:
                print("waiting", flush=True)
                WAIT
        run(settings=QUICK, out="x", report=False, callbacks=[wait])
        """.replace("WAIT", "time.sleep(60)" if how == "Ctrl-C" else "1 / 0"),
        tmp_path,
    )
    if how == "Ctrl-C":
        assert ready_python.line() == "waiting\n"
        os.kill(terminal.number, signal.SIGINT)
    terminal.end()
    assert ready_python.status == 1
    assert terminal.shown.rfind(VISIBLE) > terminal.shown.rfind(HIDDEN) >= 0
    # The bar has its line, and the traceback begins on another.
    kind = "KeyboardInterrupt" if how == "Ctrl-C" else "ZeroDivisionError"
    assert "Traceback (most recent call last):" in terminal.lines
    assert any(line.startswith(kind) for line in terminal.lines)
    tail = terminal.shown[terminal.shown.index("Traceback") :]
    assert "2/3" not in tail


def test_nobody_watches_a_pipe(tmp_path: Path, capsys: Any) -> None:
    assert watched() == ""
    run(settings=QUICK, out=tmp_path / "x", report=False)
    out, err = capsys.readouterr()
    assert out == err == ""


class Screen:
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_only_the_main_thread_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Screen())
    monkeypatch.setenv("TERM", "xterm")
    assert watched() == "terminal"
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(watched()))
    thread.start()
    thread.join()
    assert found == [""]
    for odd in (None, object()):
        monkeypatch.setattr(sys, "stderr", odd)
        assert watched() == ""


@pytest.mark.parametrize("progress", ["yes", 3, [print]])
def test_progress_that_is_none_is_refused(tmp_path: Path, progress: Any) -> None:
    with pytest.raises(ConfigurationError, match="progress must be a function"):
        run(settings=QUICK, out=tmp_path / "x", progress=progress)
    assert not (tmp_path / "x").exists()


def test_a_notebook_has_a_bar_without_widgets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[Any] = []

    class ZMQInteractiveShell:
        """What a notebook's kernel calls its shell."""

    def display(shown: Any, display_id: bool) -> Any:
        assert display_id
        drawn.append(shown)
        return types.SimpleNamespace(update=drawn.append)

    ipython: Any = types.ModuleType("IPython")
    ipython.get_ipython = ZMQInteractiveShell
    ipython.display = types.ModuleType("IPython.display")
    ipython.display.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)
    monkeypatch.setattr(progress_module, "_SELDOM", 0.0)
    assert watched() == "notebook"
    run(settings=QUICK, out=tmp_path / "x", report=False)
    lines = [repr(shown) for shown in drawn]
    assert [line.split()[1] for line in lines] == ["0/3", "1/3", "2/3", "3/3", "3/3"]
    html = drawn[-1]._repr_html_()
    assert html.startswith("<progress value='3' max='3'></progress> round 3/3  accur")
    run(settings=QUICK, out=tmp_path / "y", report=False, progress=False)
    assert len(drawn) == len(lines)


def test_a_handler_gets_its_stream_back_also_after_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "screen").open("w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        monkeypatch.setenv("FORCE_COLOR", "1")  # A terminal, as far as rich can see.
        handler = logging.StreamHandler(file)
        streams: list[Any] = []

        def fails_with_a_bar() -> None:
            with telling(True) as told:
                assert told is not None
                told(Progress(1, 2, float("nan"), float("nan"), 0.5))
                streams.append(handler.stream)
                raise ZeroDivisionError

        logging.getLogger("fedweight").addHandler(handler)
        try:
            monkeypatch.setattr(progress_module, "watched", lambda: "terminal")
            with pytest.raises(ZeroDivisionError):
                fails_with_a_bar()
            assert streams != [file]
            assert handler.stream is file
            assert sys.stderr is file
        finally:
            logging.getLogger("fedweight").removeHandler(handler)


@pytest.mark.parametrize(
    ("accuracy", "loss", "said"),
    [
        (0.5, 1.25, "accuracy 0.5000  loss 1.2500"),
        (float("nan"), 1.25, "loss 1.2500"),
        (float("nan"), float("nan"), "not tested"),
    ],
)
def test_a_line_says_what_was_measured(accuracy, loss, said):
    assert Progress(1, 2, accuracy, loss, 0.5).text == said
