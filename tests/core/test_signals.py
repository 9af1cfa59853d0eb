"""Signals in this process; with whole runs they are in test_cli.py and test_ray.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fedweight
from fedweight.core.signals import Terminated, interruptible, own_handlers

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")

STOPS = (signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    numbers = (signal.SIGINT, *STOPS)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in STOPS:  # Whatever else of this process has set, or nohup.
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_raises_and_the_handlers_come_back(number: signal.Signals) -> None:
    with interruptible():
        with pytest.raises(Terminated) as caught, interruptible():
            os.kill(os.getpid(), number)
        assert caught.value.number == number
        assert signal.getsignal(number) is not signal.SIG_DFL  # still the outer one's
    assert signal.getsignal(number) is signal.SIG_DFL


def test_an_ignored_interrupt_is_heard_meanwhile() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_handlers_of_a_program_stay() -> None:
    heard: list[int] = []
    for number in (signal.SIGINT, *STOPS):
        signal.signal(number, lambda number, frame: heard.append(number))
    with interruptible():
        for number in (signal.SIGINT, *STOPS):
            os.kill(os.getpid(), number)
    assert heard == [signal.SIGINT, *STOPS]


def test_what_is_to_be_ignored_is_ignored() -> None:
    """As SIGHUP is by nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with interruptible():
        os.kill(os.getpid(), signal.SIGHUP)


def test_in_another_thread_nothing_changes() -> None:
    seen: list[Any] = []

    def look() -> None:
        with interruptible(), own_handlers():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


def test_replaced_handlers_are_put_back() -> None:
    with interruptible():
        ours = signal.getsignal(signal.SIGTERM)
        with own_handlers():
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(15))
        assert signal.getsignal(signal.SIGTERM) is ours


PROGRAM = """
import time
from fedweight.core.signals import interruptible
with interruptible():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("written", flush=True)
print("not reached", flush=True)
"""


@pytest.mark.parametrize("number", STOPS)
def test_a_program_ends_by_the_signal_after_its_work(number: signal.Signals) -> None:
    root = str(Path(fedweight.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == -number
    assert out == "written\n"
    assert err == ""
