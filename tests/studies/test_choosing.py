"""Where and how a run's clients train: measured before it, recorded, remembered."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedweight
from fedweight.clients.steps.batched import BatchedTrainer
from fedweight.core.errors import ConfigurationError
from fedweight.server.loop import ServerState
from fedweight.simulations import Plan
from fedweight.simulations.measuring import Measured, Meter
from fedweight.simulations.planner import Choice
from fedweight.studies import Run, choosing
from fedweight.studies.runner import resume

SAME = ("rounds.csv", "clients.csv", "model.safetensors")

MANY = {
    "partition.clients": 24,
    "run.rounds": 3,
    "model.name": "softmax",
    "engine.name": "local",
    "engine.threads": 1,
}

Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Run 24 clients, three rounds, into ``tmp_path / out``."""

    def run(out: str, **settings: Any) -> Run:
        return fedweight.run(
            settings={**MANY, **settings},
            out=tmp_path / out,
            report=False,
            progress=False,
        )

    return run


@pytest.fixture
def faster_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Let a stand-in measure: many clients at once are the faster, the more."""
    tried: list[str] = []

    def measure(self: Meter, device: str, plan: Plan, limit: float) -> Measured:
        tried.append(f"{plan} on {device}")
        return Measured(device, plan, 100.0 * plan.chunk, 0.05)

    monkeypatch.setattr(Meter, "__call__", measure)
    monkeypatch.setattr(choosing, "WORTH_MEASURING", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tried


def no_room_beyond(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    really = BatchedTrainer.train

    def train(self: Any, start: Any, tasks: Any, **more: Any) -> Any:
        if len(tasks) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return really(self, start, tasks, **more)

    monkeypatch.setattr(BatchedTrainer, "train", train)


def environment(run: Run) -> dict[str, Any]:
    engine: dict[str, Any] = json.loads(
        (run.folder / "environment.json").read_text("utf-8")
    )["engine"]
    return engine


def same(one: Run, other: Run) -> bool:
    return all(
        (one.folder / name).read_bytes() == (other.folder / name).read_bytes()
        for name in SAME
    )


def test_what_was_measured_stands_in_the_record_and_repeats(
    start: Start, faster_at_once: list[str]
) -> None:
    first = start("first")
    assert faster_at_once == ["loop on cpu", "batched-10 on cpu", "batched-20 on cpu"]
    engine = environment(first)
    assert (engine["device"], engine["plan"]) == ("cpu", "batched-20")
    chosen = engine["chosen"]
    assert chosen["by"] == "a measurement"
    assert chosen["seconds"] == 0.15
    assert chosen["seconds_allowed"] == 1.0
    assert [row["updates_per_second"] for row in chosen["measured"]] == [100, 1e3, 2e3]
    assert first.config["engine"]["plan"] == "batched-20"
    assert first.config["engine"]["device"] == "auto"  # There is nothing else here.
    again = start("again")
    assert len(faster_at_once) == 3
    assert environment(again)["chosen"]["by"].startswith("an earlier measurement")
    assert environment(again)["chosen"]["measured"] == chosen["measured"]
    assert same(first, again)


def test_other_workers_or_threads_lead_to_no_other_plan(
    start: Start, faster_at_once: list[str]
) -> None:
    first = start("first")
    other = start("other", **{"engine.threads": 2})
    assert len(faster_at_once) == 3
    assert same(first, other)


def test_short_runs_and_plans_that_are_told_say_so(start: Start) -> None:
    short = environment(start("short"))
    assert short["plan"] == "loop"
    assert "too short to measure" in short["chosen"]["by"]
    told = environment(start("told", **{"engine.plan": "batched-4"}))
    assert told["plan"] == "batched-4"
    assert told["chosen"] == {"by": "engine.plan and engine.device"}


def test_a_real_measurement_keeps_to_its_second(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(choosing, "WORTH_MEASURING", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = start("first")
    chosen = environment(first)["chosen"]
    measured = [row for row in chosen["measured"] if row["updates_per_second"]]
    assert measured[0]["plan"] == "loop"
    # What cannot be cut off, making a step, may go beyond by itself.
    assert chosen["seconds"] <= chosen["seconds_allowed"] + measured[-1]["seconds"]
    assert same(first, start("again"))


def test_in_a_run_the_chunk_is_halved_recorded_and_remembered(
    start: Start, faster_at_once: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_room_beyond(6, monkeypatch)
    first = start("first")
    engine = environment(first)
    assert engine["plan"] == "batched-6"  # Of 24 in twenties, twelve go together.
    (halved,) = engine["halved"]
    assert (halved["round"], halved["was"]) == (1, "batched-20")
    assert "CUDA out of memory" in halved["why"]
    assert first.clients["status"].eq("ok").all()
    # The same configuration: what fits is known, and from the first round on.
    again = start("again")
    assert environment(again)["plan"] == "batched-6"
    assert "halved" not in environment(again)
    assert same(first, again)
    # The run's own file says what was tried first, and comes to the same.
    told = start("told", **{"engine.plan": first.config["engine"]["plan"]})
    assert environment(told)["plan"] == "batched-6"
    assert same(first, told)


def test_a_run_that_goes_on_trains_as_it_had_to(
    faster_at_once: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_room_beyond(6, monkeypatch)
    settings = {**MANY, "run.checkpoint-rounds": 1}

    def stop(state: ServerState) -> None:
        if state.round == 2:
            raise KeyboardInterrupt

    def run(out: str, *callbacks: Any) -> Run:
        return fedweight.run(
            settings=settings,
            out=tmp_path / out,
            report=False,
            progress=False,
            callbacks=callbacks,
        )

    whole = run("whole")
    (tmp_path / "cache" / "fedweight" / "plans.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop)
    # It goes on where it was, though there seems to be a card by now.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Stand-in")
    resumed = resume(tmp_path / "stopped", report=False, progress=False)
    assert same(whole, resumed)
    of_resumed, of_whole = environment(resumed), environment(whole)
    for engine in (of_resumed, of_whole):
        assert engine.pop("chosen")["measured"]  # In other seconds.
    assert of_resumed == of_whole
    assert of_resumed["plan"] == "batched-6"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there seem to be a card; nothing is to reach it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Stand-in")


def choice_of(
    monkeypatch: pytest.MonkeyPatch, device: str, plan: Plan
) -> list[dict[str, Any]]:
    asked: list[dict[str, Any]] = []

    def choose(app_of: Any, arrays: Any, plans: Any, **more: Any) -> Choice:
        asked.append({"plans": {d: [*map(str, some)] for d, some in plans.items()}})
        return Choice(device, plan, {"by": "a measurement"})

    monkeypatch.setattr(choosing, "choose_plan", choose)
    monkeypatch.setattr(choosing, "WORTH_A_CARD", 0.0)
    return asked


def test_where_the_cpu_is_faster_it_is_taken_and_written(
    start: Start, card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = choice_of(monkeypatch, "cpu", Plan(3))
    run = start("run")
    both = ["loop", "batched-10", "batched-20"]
    assert asked == [{"plans": {"cuda": [*both, "batched-24"], "cpu": both}}]
    assert run.config["engine"]["device"] == "cpu"
    assert run.config["engine"]["plan"] == "batched-3"
    assert environment(run)["device"] == "cpu"
    monkeypatch.setattr(choosing, "choose_plan", None)  # It must not be asked again.
    again = start("again", **{"engine.device": "cpu", "engine.plan": "batched-3"})
    assert same(run, again)


def test_with_a_told_plan_only_the_device_is_open(
    start: Start, card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = choice_of(monkeypatch, "cpu", Plan(4))
    start("run", **{"engine.plan": "batched-4"})
    assert asked == [{"plans": {"cuda": ["batched-4"], "cpu": ["batched-4"]}}]


def test_convolutions_are_tried_one_client_at_a_time_on_a_cpu(
    card: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = choice_of(monkeypatch, "cpu", Plan())
    fedweight.run(
        settings={"model.name": "cnn", "run.rounds": 1, "partition.clients": 12},
        out=tmp_path / "run",
        report=False,
        progress=False,
    )
    tried = ["loop", "batched-10", "batched-12"]
    assert asked == [{"plans": {"cuda": tried, "cpu": ["loop"]}}]


def test_a_short_run_leaves_the_card_alone(start: Start, card: None) -> None:
    run = start("run")
    assert run.config["engine"]["device"] == "cpu"
    assert "too short" in environment(run)["chosen"]["by"]


def test_a_comparison_chooses_the_devices_before(
    card: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = choice_of(monkeypatch, "cpu", Plan(2))
    settings = {**MANY, "partition.clients": 4, "run.rounds": 1}
    found = fedweight.compare(
        strategies="fedavg,ida",
        seeds=[0, 1],
        settings=settings,
        out=tmp_path / "both",
        workers=1,
        progress=False,
    )
    assert len(asked) == 1  # Both methods train alike.
    (file,) = (tmp_path / "both").glob("*.toml")
    content = tomllib.loads(file.read_text("utf-8"))
    assert content["devices"] == {"fedavg": "cpu", "ida": "cpu"}
    assert content["plans"] == {"fedavg": "batched-2", "ida": "batched-2"}
    for config in (tmp_path / "both").glob("*/config.toml"):
        engine = tomllib.loads(config.read_text("utf-8"))["engine"]
        assert (engine["device"], engine["plan"]) == ("cpu", "batched-2")
    assert not len(found.failures)
    # What is there is found again, whatever would be chosen now.
    choice_of(monkeypatch, "cuda", Plan(4))
    fedweight.compare(
        strategies="fedavg,ida",
        seeds=[0, 1],
        settings=settings,
        out=tmp_path / "both",
        workers=1,
        progress=False,
    )
    assert tomllib.loads(file.read_text("utf-8"))["devices"] == content["devices"]


def test_a_device_that_is_not_there_is_refused(start: Start) -> None:
    with pytest.raises(ConfigurationError, match=r"engine\.device must be one of"):
        start("run", **{"engine.device": "cuda"})
