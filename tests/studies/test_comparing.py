"""What a comparison says while it works, and that it works alone."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedweight import compare
from fedweight.cli import main
from fedweight.core.errors import ConfigurationError
from fedweight.studies.comparing import LINES
from fedweight.studies.folder import alone_in

QUICK: dict[str, Any] = {
    "run.rounds": 2,
    "partition.clients": 3,
    "training.epochs": 1,
    "model.name": "softmax",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_says_what_it_will_do(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    given: dict[str, Any] = {"settings": QUICK, "out": "c", "workers": 1}
    given["progress"] = LINES

    def said(*arguments: Any) -> list[str]:
        compare(None, *arguments, **given)
        return capsys.readouterr().err.splitlines()

    first, measuring, *ended = said("fedavg", "0")
    assert first == "1 run"
    assert measuring.startswith("measuring how clients train fastest")
    assert len(ended) == 1
    assert said("fedavg", "0") == ["nothing to run: 1 is there already"]
    # A plan is measured once for a strategy.
    first, *ended = said("fedavg", "0-2")
    assert first == "3 runs, of which 1 is there already"
    assert len(ended) == 2
    # As if killed in its first round.
    (here / "c" / "fedavg-seed1" / "model.safetensors").unlink()
    with caplog.at_level(logging.WARNING, "fedweight"):
        first, second, *_ = said("fedavg", "0-2")
    assert first == (
        "fedavg-seed1 was stopped before its first checkpoint and begins anew"
    )
    assert second == "3 runs, of which 2 are there already"
    assert "removing" not in caplog.text
    # Somebody's function hears how cells end, and nothing else.
    told: list[Any] = []
    given["progress"] = told.append
    assert said("fedavg", "0-3") == []
    assert [one.cell.name for one in told] == ["fedavg-seed3"]


def test_a_second_one_is_refused_at_once(here: Path) -> None:
    given: dict[str, Any] = {"settings": QUICK, "out": "c", "workers": 1}
    compare(None, "fedavg", "0", **given)
    before = sorted((here / "c").rglob("*"))
    with alone_in(here / "c"), pytest.raises(ConfigurationError) as caught:
        compare(None, "fedavg", "0-1", **given)
    assert str(caught.value).startswith("another 'fedweight compare' is at work in 'c'")
    assert sorted((here / "c").rglob("*")) == before
    compare(None, "fedavg", "0-1", **given)
    assert not (here / "c" / ".lock").exists()


def test_one_that_began_in_the_meantime_is_noticed(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedweight.studies.study import Study

    choose = Study.choose_plans

    def slowly(self: Study, dataset: Any) -> None:
        choose(self, dataset)
        (here / "c").mkdir()
        (here / "c" / "comparison.toml").touch()

    monkeypatch.setattr(Study, "choose_plans", slowly)
    with pytest.raises(ConfigurationError, match="began in 'c' in the meantime"):
        compare(None, "fedavg", "0", settings=QUICK, out="c", workers=1)
    assert [path.name for path in (here / "c").iterdir()] == ["comparison.toml"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_what_a_killed_one_leaves_holds_nobody_up(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--strategies", "fedavg", "--out", "k", "--workers", "1"]
    command += ["-s", "run.rounds=2000", "-s", "model.name=softmax"]
    command += ["-s", "partition.clients=2", "-s", "engine.plan=loop"]
    arguments = [sys.executable, "-m", "fedweight", *command]
    with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as child:
        while not (here / "k" / "fedavg-seed0" / "rounds.csv").exists():
            assert child.poll() is None
            time.sleep(0.05)
        assert main(command) == 2
        assert "is at work in 'k'" in capsys.readouterr().err
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert (here / "k" / ".lock").exists()
    with alone_in(here / "k"):
        pass
