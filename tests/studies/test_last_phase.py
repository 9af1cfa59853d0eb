"""A phase after the rounds: who takes part, what is recorded, what a kill costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedweight import Run, resume, run
from fedweight.core.errors import DataError
from fedweight.studies import runner

TUNED: dict[str, Any] = {
    "run.rounds": 3,
    "run.checkpoint-rounds": 1,
    "partition.clients": 6,
    "training.epochs": 1,
    "personal.name": "fine-tuned",
    "personal.when": "end",
    "strategy.fraction-train": 0.5,
    "strategy.fraction-evaluate": 0.5,
    "engine.name": "local",
    "engine.plan": "loop",
}

OWN = """
from fedweight.strategies import FedAvg
import flwr.serverapp.strategy as flowers

class Starts(FedAvg):
    def start(self, grid, *arguments, **named):
        return super().start(grid, *arguments, **named)

class Halves(FedAvg):
    def assign(self, selection):
        return [client % 2 for client in selection.clients]

class Flowers(flowers.FedAvg):
    pass
"""


def ran(folder: Path, **changes: Any) -> Run:
    return run(settings=TUNED | changes, out=folder, report=False)


class Stopped(Exception):
    """What ends a run in a test."""


def test_all_clients_take_part_and_the_rounds_are_as_without(tmp_path: Path) -> None:
    own = ran(tmp_path / "own")
    without = {k: v for k, v in TUNED.items() if not k.startswith("personal")}
    plain = run(settings=without, out=tmp_path / "plain", report=False)
    assert own.personal["client"].tolist() == [*range(6)]
    assert own.complete
    for name in ("clients.csv", "model.safetensors"):
        assert (own.folder / name).read_bytes() == (plain.folder / name).read_bytes()
    columns = [c for c in own.rounds if not c.startswith("evaluate_personal")]
    assert columns == [*plain.rounds]
    with pytest.raises(DataError, match=r"personal.csv is missing"):
        _ = plain.personal


@pytest.mark.parametrize("strategy", ["fedavg", "autoflip"])
def test_a_run_that_is_stopped_in_the_phase_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    chosen = {"strategy.name": strategy}
    whole = ran(tmp_path / "whole", **chosen).folder
    before = runner.after_rounds

    def stop(*given: Any) -> Any:
        before(*given)
        raise Stopped

    monkeypatch.setattr(runner, "after_rounds", stop)
    with pytest.raises(Stopped):
        ran(tmp_path / "run", **chosen)
    assert not Run(tmp_path / "run").complete
    monkeypatch.setattr(runner, "after_rounds", before)
    assert resume(tmp_path / "run", report=False).complete
    for name in ("personal.csv", "rounds.csv", "clients.csv", "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("name", ["Starts", "Flowers", "Halves"])
def test_any_strategy_has_a_phase_after_its_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "own_last.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    found = ran(
        tmp_path / name,
        **{"strategy.name": f"own_last:{name}", "strategy.fraction-train": 1.0},
    )
    assert found.personal["client"].tolist() == [*range(6)]
    assert found.personal["personal_accuracy"].notna().all()
    if name == "Halves":  # Each of its own model: clients of a half report one loss.
        losses = found.personal["loss"]
        last = found.clients[found.clients["round"] == 3].set_index("client")["loss"]
        np.testing.assert_array_equal(losses[last.dropna().index], last.dropna())
    if name == "Starts":
        plain = ran(tmp_path / "plain", **{"strategy.fraction-train": 1.0})
        np.testing.assert_array_equal(
            found.personal["personal_loss"], plain.personal["personal_loss"]
        )


def test_a_client_that_fails_in_the_phase_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedweight.clients.personal_models import PersonalModels

    train = PersonalModels.train

    def failing(self: Any, m: Any, start: Any, clients: Any, *a: Any, **k: Any) -> Any:
        if any(client.number == 2 for client in clients):
            raise RuntimeError("no room")
        return train(self, m, start, clients, *a, **k)

    monkeypatch.setattr(PersonalModels, "train", failing)
    own = ran(tmp_path / "run").personal
    assert own["status"].tolist() == ["evaluated"] * 2 + ["failed"] + ["evaluated"] * 3
    assert "no room" in own["reason"][2]
    assert "no room" in caplog.text
