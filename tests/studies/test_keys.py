"""What keys of a simulation file mean at their limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedweight import run
from fedweight.clients.optimizers import OPTIMIZERS, SGD
from fedweight.clients.rate_schedules import Cosine
from fedweight.core.errors import ConfigurationError
from fedweight.core.module import FlatModule
from fedweight.data import DataSet, Examples
from fedweight.messages.arrays import FlatRecord
from fedweight.server import loop
from fedweight.simulations import Plan
from fedweight.simulations.planner import Choice
from fedweight.studies import choosing, runner
from fedweight.studies.configuration import Configuration
from fedweight.studies.runner import prepare

QUICK: dict[str, Any] = {
    "run.rounds": 2,
    "partition.clients": 4,
    "training.epochs": 1,
    "model.name": "softmax",
    "engine.name": "local",
}


def points(shape: tuple[int, ...] = (2,)) -> DataSet:
    rng = np.random.default_rng(0)
    y = np.arange(120) % 3
    x = rng.normal(size=(120, *shape)).astype(np.float32)
    natural = np.arange(90) % 7
    train, test = Examples(x[:90], y[:90]), Examples(x[90:], y[90:])
    return DataSet("points", train, test, 3, natural)


def start(tmp_path: Path, **settings: Any) -> Any:
    given = {key.replace("__", ".").replace("_", "-"): v for key, v in settings.items()}
    return run(
        settings={**QUICK, **given}, dataset=points(), out=tmp_path, report=False
    )


class Stopped(Exception):
    """Raised where a run would begin."""


def arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **settings: Any) -> Any:
    """Return what the engine and the strategy are called with."""
    found: dict[str, Any] = {}
    simulate = runner.simulate

    def simulating(*given: Any, **named: Any) -> Any:
        found.update(named)
        return simulate(*given, **{**named, "engine": "local", "workers": None})

    def federating(*given: Any, **named: Any) -> Any:
        found.update(named)
        raise Stopped

    monkeypatch.setattr(runner, "simulate", simulating)
    monkeypatch.setattr(loop, "federate", federating)
    with pytest.raises(Stopped):
        start(tmp_path / str(len(list(tmp_path.iterdir()))), **settings)
    return found


def test_what_is_left_to_the_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    default = arguments(monkeypatch, tmp_path)
    for key in ("workers", "threads", "address", "timeout"):
        assert default[key] is None
    assert default["gpus_per_worker"] == 0
    told = arguments(monkeypatch, tmp_path, run__timeout=7.5, engine__threads=3)
    assert (told["timeout"], told["threads"]) == (7.5, 3)


def test_no_number_of_clients_is_all_natural_ones(tmp_path: Path) -> None:
    for clients, there_are in ((0, 7), (3, 3), (9, 7)):
        settings = {"partition.name": "natural", "partition.clients": clients}
        configuration = Configuration.read(None, {**QUICK, **settings}, "points")
        assert prepare(configuration, points()).data.num_clients == there_are
    with pytest.raises(ConfigurationError, match="needs num_clients"):
        start(tmp_path / "run", partition__clients=0)


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS.entries, "torch.optim:NAdam"])
def test_a_learning_rate_of_0_leaves_the_model_as_it_began(
    tmp_path: Path, optimizer: str
) -> None:
    settings = {"training__learning_rate": 0.0, "training__optimizer": optimizer}
    found = weights(start(tmp_path / "still", **settings).folder)
    configuration = Configuration.read(None, QUICK, "points")
    began = prepare(configuration, points()).make_model().state_dict()
    for name, values in found.items():
        np.testing.assert_array_equal(values, began[name].numpy())


def test_a_decay_of_1_and_no_momentum_or_weight_decay_change_nothing(
    tmp_path: Path,
) -> None:
    plain = {"training__momentum": 0.0}
    same = {"training__learning_rate_decay": 1.0, "training__weight_decay": 0.0}
    one, two, three, four = (
        weights(start(tmp_path / str(number), **plain, **more).folder)
        for number, more in enumerate(
            (
                {},
                same,
                {"training__learning_rate_decay": 0.5},
                {"training__weight_decay": 0.1},
            )
        )
    )
    for name, values in one.items():
        np.testing.assert_array_equal(values, two[name])
        assert (values != three[name]).any()
        assert (values != four[name]).any()


def test_without_held_out_examples_nobody_evaluates_and_without_a_proxy_fedlaw_stops(
    tmp_path: Path,
) -> None:
    result = start(tmp_path / "run", data__held_out=0.0)
    assert result.rounds["evaluate_accuracy"].isna().all()
    assert result.summary()["held_out_accuracy"] is None
    assert result.partition["held_out_examples"].sum() == 0
    with pytest.raises(ConfigurationError, match="use fedavg"):
        start(tmp_path / "law", data__proxy=0.0, strategy__name="fedlaw")


@pytest.mark.parametrize("model", ["softmax", "cnn"])
@pytest.mark.parametrize("rounds", [1, 100_000])
def test_a_plan_is_measured_for_long_runs_without_convolutions(
    monkeypatch: pytest.MonkeyPatch, model: str, rounds: int
) -> None:
    """On a CPU; what is not measured trains one client after another."""
    settings = {**QUICK, "run.rounds": rounds, "model.name": model}
    settings["partition.clients"] = 12  # Of fewer than ten nobody would try many.
    components = prepare(
        Configuration.read(None, settings, "points"), points((1, 8, 8))
    )
    measured_plan = Choice("cpu", Plan(17), {})
    monkeypatch.setattr(choosing, "choose_plan", lambda *_, **__: measured_plan)
    initial = FlatRecord(FlatModule(components.make_model()).save())
    choice = choosing.choose(components, components.client_app(), initial)
    measured = rounds > 1 and model == "softmax"
    assert choice.plan == (Plan(17) if measured else Plan())
    assert choice.device == "cpu"
    assert measured or "too short" in choice.why["by"] or model == "cnn"


def test_options_of_the_optimizer_and_the_schedule_reach_the_clients() -> None:
    settings = {
        "training.nesterov": True,
        "training.learning-rate-schedule": "cosine",
        "training.clip-norm": 0.5,
    }
    configuration = Configuration.read(None, {**QUICK, **settings}, "points")
    found = prepare(configuration, points()).client_app().settings
    assert found.rule == SGD(momentum=0.9, nesterov=True)
    assert found.rate_schedule == Cosine(schedule_length=2)  # All rounds of the run.
    assert found.clip_norm == 0.5


def test_every_key_that_training_may_have_changes_something(tmp_path: Path) -> None:
    plain = weights(start(tmp_path / "plain").folder)
    changes: list[dict[str, Any]] = [
        {"training__nesterov": True},
        {"training__dampening": 0.5},
        {"training__clip_norm": 0.01},
        {"training__learning_rate_schedule": "warm-up"},
        {
            "training__learning_rate_schedule": "cosine",
            "training__schedule_over": "steps",
        },
    ]
    for number, more in enumerate(changes):
        found = weights(start(tmp_path / str(number), **more).folder)
        assert any((values != plain[name]).any() for name, values in found.items())


def test_an_optimizer_of_ones_own_trains_one_client_after_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = {"training__optimizer": "torch.optim:SGD", "engine__plan": "batched-2"}
    found = weights(start(tmp_path / "own", **own).folder)
    said = [r.getMessage() for r in caplog.records if "optimizer" in r.getMessage()]
    assert said == [
        "clients train one after another: optimizer torch.optim:SGD is not one of sgd, "
        "adam, adamw, adagrad, rmsprop."
    ]
    for name, values in weights(start(tmp_path / "ours").folder).items():
        np.testing.assert_array_equal(values, found[name])
