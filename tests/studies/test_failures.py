"""What fails in a comparison, and what must be known of it, is told as that."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import fedweight
from fedweight import Comparison, compare
from fedweight.core.texts import plain
from fedweight.studies.summarizing import SUMMARY_COLUMNS, summary_of

QUICK: dict[str, Any] = {
    "run.rounds": 3,
    "partition.clients": 3,
    "training.epochs": 1,
    "model.name": "softmax",
}
OWN = """
from dataclasses import dataclass
import torch.nn.functional as F
from fedweight.clients import Objective
from fedweight.strategies import WeightingStrategy

class Bad(WeightingStrategy):
    def weights(self, round):
        if round.number == 2:
            raise ZeroDivisionError("oops")
        return round.size_weights

@dataclass(frozen=True)
class Raises(Objective):
    wants = frozenset({"round"})
    first: int = 2
    last: int = 2
    def example_losses(self, outputs, batch, facts):
        if self.first <= int(facts.round) <= self.last:
            raise ZeroDivisionError("oops")
        return F.cross_entropy(outputs, batch.y, reduction="none")

class Huge(WeightingStrategy):
    def weights(self, round):
        return round.size_weights * 0.01
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_bad.py").write_text(OWN)
    yield tmp_path
    sys.modules.pop("own_bad", None)


def line_of(text: str) -> int:
    return 1 + OWN[: OWN.index(text)].count("\n")


def test_a_strategy_that_fails_everywhere_is_told_as_failed(here: Path) -> None:
    found = compare(
        None, "fedavg,own_bad:Bad", "0-1", settings=QUICK, out="c", workers=1
    )
    where = f"own_bad.py, line {line_of('raise Zero')}"
    reason = f"ZeroDivisionError: oops ({where}), in round 2"
    assert found.failures == {"bad-seed0": reason, "bad-seed1": reason}
    assert found.verdicts == [f"bad failed in all 2 runs: {reason}."]
    rows = found.summary[found.summary["strategy"] == "bad"]
    assert set(rows["verdict"]) == {"failed"}
    assert found.notes[-3:] == [
        f"failed: bad-seed0 and bad-seed1: {reason}",
        "errors.log of bad-seed0 and bad-seed1 has it in full.",
        "The same command runs again what ended before its time.",
    ]
    log = (here / "c" / "bad-seed0" / "errors.log").read_text()
    assert log.startswith("the run ended with\nTraceback")
    assert "ZeroDivisionError: oops" in log
    # Where it is the first, nobody can be held against it.
    found = compare(None, "own_bad:Bad,ida", "0", settings=QUICK, out="d", workers=1)
    assert found.verdicts == [
        f"bad failed in its only run: {reason}.",
        "Nothing can be held against bad, which is the first.",
    ]


def test_failed_rounds_are_told_with_the_strategy_and_the_error(here: Path) -> None:
    found = compare(
        None,
        "fedavg",
        "0-1",
        objectives="plain,own_bad:Raises",
        settings={**QUICK, "engine.plan": "loop"},
        out="c",
        workers=1,
    )
    own = found.cells[found.cells["strategy"] == "fedavg+raises"]
    assert list(own["status"]) == ["complete"] * 2
    assert list(own["failed_rounds"]) == [1, 1]
    [reason] = {*own["reason"]}
    assert reason.startswith("round 2 of 3 failed: train: ZeroDivisionError: oops")
    last = OWN.rindex("raise Zero")
    assert reason.endswith(f"(own_bad.py, line {1 + OWN[:last].count(chr(10))})")
    assert found.warnings[0] == (
        "fedavg+raises: 2 rounds failed in 2 of 2 runs, and left the model as it was: "
        f"{reason}"
    )
    text = str(found)
    assert text.index(found.warnings[0]) < text.index(found.verdicts[0])
    names = "fedavg+raises-seed0 and fedavg+raises-seed1"
    assert found.notes[-2:] == [
        f"errors.log of {names} has it in full.",
        f"What came to its end is not run again: delete {names} in c, and give the "
        "same command.",
    ]
    # They enter the tests with what their rounds made.
    row = found.summary[found.summary["strategy"] == "fedavg+raises"].iloc[0]
    assert (row["n"], row["pairs"]) == (2, 2)


def test_a_run_whose_last_rounds_fail_by_errors_has_failed(here: Path) -> None:
    found = compare(
        None,
        "fedavg",
        "0",
        objectives="plain,own_bad:Raises:last=3",
        settings={**QUICK, "engine.plan": "loop"},
        out="c",
        workers=1,
    )
    own = found.cells[found.cells["strategy"] != "fedavg+plain"].iloc[0]
    assert (own["status"], own["failed_rounds"]) == ("failed", 2)
    assert own["reason"].startswith("rounds 2 and 3 of 3 failed: train: ZeroDivision")
    assert found.summary["verdict"].iloc[1] == "failed"
    assert np.isnan(found.summary["mean"].iloc[1])


def test_a_run_that_diverges_counts_with_the_model_it_has(here: Path) -> None:
    """To leave out what a method spoils would flatter it."""
    settings = {**QUICK, "training.learning-rate": 1e38, "training.momentum": 0.9}
    found = compare(None, "fedavg", "0", settings=settings, out="c", workers=1)
    [row] = found.cells.to_dict("records")
    assert row["failed_rounds"] >= 1
    assert row["status"] == "complete"
    assert "failed" in row["reason"]


def test_warnings_of_runs_are_gathered_by_strategy(here: Path) -> None:
    settings = {**QUICK, "run.rounds": 2}
    found = compare(
        None, "fedavg,own_bad:Huge", "0-1", settings=settings, out="c", workers=1
    )
    [line] = found.warnings
    assert line.startswith("huge (all seeds): the weights summed to 0.01 and not to 1")
    assert line in str(found)
    assert plain(line)[:60] in found._repr_html_()
    assert found.to_dict()["warnings"] == [line]
    frame = pd.read_csv(here / "c" / "warnings.csv")
    assert list(frame["folder"]) == ["huge-seed0", "huge-seed1"]
    assert line.split(": ", 1)[1].partition(" (or")[0] in set(frame["warning"])
    # A folder from before has none.
    (here / "c" / "warnings.csv").unlink()
    assert Comparison(Path("c")).warnings == []


def test_an_attribute_that_makes_no_groups_is_told(here: Path) -> None:
    rows = [f"{k % 7},{k / 3},{k % 2}" for k in range(90)]
    (here / "own.csv").write_text("\n".join(["a,age,y", *rows]))
    own = {"data.name": "csv", "data.path": "own.csv", "data.label": "y"}
    found = compare(
        strategies="fedavg",
        seeds="0-1",
        settings={**QUICK, **own, "data.sensitive": ["age"]},
        out="c",
        workers=1,
    )
    [line] = [line for line in found.warnings if "which make no groups" in line]
    assert line.startswith("fedavg (all seeds): ")


def test_a_verdict_on_a_gap_says_what_the_accuracy_did() -> None:
    cells = [
        {
            **{"strategy": name, "data": "d", "seed": seed, "chosen": 1},
            **{"status": "complete", "failed_rounds": 0, "folder": f"{name}{seed}"},
            "test_accuracy": accuracy + 0.01 * seed,
            "accuracy_gap": gap + 0.002 * (seed % 3) * len(name),
        }
        for name, accuracy, gap in (("a", 0.8, 0.2), ("bb", 0.5, 0.02))
        for seed in range(5)
    ]
    frame = pd.DataFrame(summary_of(cells)).reindex(columns=SUMMARY_COLUMNS)
    of = pd.DataFrame(cells)
    assert frame["verdict"].tolist()[3] == "better"

    class Made(Comparison):
        def __post_init__(self) -> None: ...

        summary = frame.fillna(
            {
                "against": "",
                "wilcoxon_verdict": "",
                "verdict": "",
                "sentence": "",
                "chosen": "",
            }
        )
        cells = of.assign(reason="")
        strategies = ["a", "bb"]  # noqa: RUF012
        data_sets = ["d"]  # noqa: RUF012
        seeds = list(range(5))  # noqa: RUF012

    summary = Made.summary
    found = Made(Path("nowhere"))
    last = found.verdicts[-1]
    assert last.startswith("bb is better than a in the gap in accuracy between groups")
    beside = found.accuracy_beside(summary.iloc[3].to_dict())
    assert beside in last
    assert "-0.3000" in beside
    assert f"better; {beside}" in str(found)
    assert found.accuracy_beside(summary.iloc[1].to_dict()) == ""


def test_a_run_that_ends_with_an_error_has_it_in_its_log(here: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fedweight.run(strategy="own_bad:Bad", settings=QUICK, out="r", progress=False)
    assert "oops" in (here / "r" / "errors.log").read_text()
