"""A user's own strategy is tried before anything is written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fedweight import compare, run
from fedweight.core.errors import ConfigurationError

OWN = """
import torch
from fedweight.core.errors import AggregationError
from fedweight.strategies import WeightingStrategy

class Typo(WeightingStrategy):
    def weights(self, round):
        return round.size_weight

class Later(WeightingStrategy):
    calls = []
    def begin(self):
        return 3
    def weights(self, round):
        assert round.clients == tuple(range(len(round.clients)))
        assert round.metric("train-loss").std() > 0
        Later.calls.append((round.number, round.num_clients, round.state))
        return round.size_weights, round.state + 1

class Particular(WeightingStrategy):
    def weights(self, round):
        if float(round.updates.norms().max()) > 0:
            raise AggregationError("too long")
        return round.size_weights

class Asks(WeightingStrategy):
    request = ("label-counts",)
    def weights(self, round):
        return round.profile("label-counts").sum(1) / round.num_examples.sum()
"""
QUICK: dict[str, Any] = {
    "run.rounds": 1,
    "partition.clients": 4,
    "training.epochs": 1,
    "model.name": "softmax",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_tried.py").write_text(OWN)
    yield tmp_path
    sys.modules.pop("own_tried", None)


SAID = (
    "strategy.name: 'own_tried:Typo' was tried on updates that were made up, and "
    "raised AttributeError: 'Round' object has no attribute 'size_weight'"
)


def test_what_would_raise_in_the_first_round_is_refused(here: Path) -> None:
    line = 1 + OWN[: OWN.index("return round.size_weight\n")].count("\n")
    with pytest.raises(ConfigurationError) as caught:
        run(strategy="own_tried:Typo", settings=QUICK, progress=False)
    assert str(caught.value).startswith(SAID)
    assert f"(own_tried.py, line {line})." in str(caught.value)
    with pytest.raises(ConfigurationError) as caught:
        compare(None, "fedavg,own_tried:Typo", "0", settings=QUICK)
    assert str(caught.value).startswith(f"'typo': {SAID}")
    assert not (here / "runs").exists()


def test_a_trial_leaves_nothing_behind(here: Path) -> None:
    given: dict[str, Any] = {"settings": QUICK, "progress": False}
    run(strategy="own_tried:Later", out="r", **given)
    calls = sys.modules["own_tried"].Later.calls
    # The trial, and the round.
    assert calls == [(1, 4, 3), (1, 4, 3)]


@pytest.mark.parametrize("name", ["Particular", "Asks"])
def test_what_cannot_be_made_up_is_not_refused(here: Path, name: str) -> None:
    found = run(strategy=f"own_tried:{name}", out="r", settings=QUICK, progress=False)
    assert found.rounds_done == 1
