"""Personal models: what clients train for themselves, and keep."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from torch import nn

from fedweight import run
from fedweight.clients import TrainingSettings
from fedweight.clients.objectives import (
    ALDR,
    SAM,
    Focal,
    GroupDRO,
    Objective,
    Plain,
)
from fedweight.clients.personal import (
    PERSONAL,
    Ditto,
    FineTuned,
    Personal,
    Phase,
    personal,
)
from fedweight.clients.personal.base import phases_of
from fedweight.clients.steps.loop import train
from fedweight.clients.steps.task import Task
from fedweight.core.errors import ConfigurationError
from fedweight.core.module import FlatModule
from fedweight.data import Examples


class Slope(Objective):
    """A loss whose gradient is what a test says."""

    def batch_loss(self, outputs, batch, facts):
        return (outputs * torch.tensor([0.2, -0.4])).sum()


class Direct(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.0, 2.0]))

    def forward(self, x):
        return self.w.expand(len(x), 2)


def test_a_step_of_ditto_has_its_golden_value():
    part = Examples(np.zeros((1, 1), np.float32), np.zeros(1, np.int64))
    module = FlatModule(Direct())
    received = module.save()
    own = received.with_parameters(torch.tensor([1.0, 1.0]))
    goal = Ditto(weight=0.5).objective(Slope())
    result = train(
        module,
        received,
        Task(part, 1, 0, own=own),
        goal,
        TrainingSettings(),
        learning_rate=0.1,
    )
    assert result.model.parameters.tolist() == pytest.approx([0.93, 1.09])


@pytest.mark.usefixtures("ready_ray")
@pytest.mark.parametrize("name", ["ditto", "fine-tuned"])
@pytest.mark.parametrize(
    "engine", ["local", pytest.param("ray", marks=pytest.mark.ray)]
)
def test_personal_models_are_kept_and_evaluated(tmp_path, name, engine):
    settings = {
        "personal.name": name,
        "run.rounds": 3,
        "partition.clients": 6,
        "strategy.fraction-train": 0.5,
        "engine.name": engine,
        "engine.workers": 2 if engine == "ray" else 0,
        "training.epochs": 1,
    }
    own = run(settings=settings, out=tmp_path / "own", report=False)
    clients = own.clients
    trained = clients[clients["train_loss"].notna()].groupby("client")["round"].min()
    has = clients["personal_accuracy"].notna()
    # From its first round on every client has one, and none has it before.
    first = clients["client"].map(trained)
    expected = (clients["round"] >= first) & clients["accuracy"].notna()
    assert (has == expected).all()
    [*_, last] = own.rounds["evaluate_personal_accuracy"]
    assert own.summary()["personal_accuracy"] == last
    # What others see is the same as without personal models.
    without = {k: v for k, v in settings.items() if k != "personal.name"}
    plain = run(settings=without, out=tmp_path / "plain", report=False)
    assert (plain.rounds["test_loss"] == own.rounds["test_loss"]).all()
    assert "personal_accuracy" not in plain.clients


@pytest.mark.parametrize("name", ["ditto", "fine-tuned"])
def test_personal_models_are_the_same_at_once_and_one_after_another(tmp_path, name):
    made = []
    for plan in ("loop", "batched-3"):
        settings = {
            "personal.name": name,
            "run.rounds": 2,
            "partition.clients": 6,
            "engine.plan": plan,
            "training.epochs": 1,
        }
        made.append(run(settings=settings, out=tmp_path / plan, report=False).clients)
    np.testing.assert_allclose(
        made[0]["personal_loss"], made[1]["personal_loss"], rtol=1e-4
    )


def test_ditto_at_0_trains_alone_and_far_up_stays_near_the_global_model(tmp_path):
    losses = {}
    for weight in (0.0, 20.0):
        settings = {
            "personal.name": "ditto",
            "personal.weight": weight,
            "run.rounds": 3,
            "partition.clients": 4,
            "partition.name": "shards",
        }
        made = run(settings=settings, out=tmp_path / f"{weight}", report=False)
        last = made.clients[made.clients["round"] == 3]
        losses[weight] = (last["personal_accuracy"] - last["accuracy"]).abs().mean()
    assert losses[20.0] < losses[0.0]


def test_wrong_personal_models_are_told(tmp_path, monkeypatch):
    assert personal("none") is None
    with pytest.raises(ConfigurationError, match="weight"):
        Ditto(weight=-1.0)
    with pytest.raises(ConfigurationError, match="epochs"):
        FineTuned(epochs=0)
    (tmp_path / "own_person.py").write_text("class Nobody: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError, match="not derived from"):
        personal("own_person:Nobody")
    assert set(PERSONAL.entries) == {"none", "ditto", "fedetf", "fine-tuned"}


class Tuned(Personal):
    def __init__(self, start="trained", epochs=1, goal=None):
        self.start, self.epochs, self.goal = start, epochs, goal

    def objective(self, local):
        return self.goal or local


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": "received"}, "personal Tuned: start must be one of"),
        ({"epochs": 0}, "personal Tuned: epochs must be a whole number from 1, got 0"),
        ({"goal": "focal"}, "personal Tuned: objective must return an objective"),
    ],
)
def test_personal_training_that_does_not_fit_is_refused(options, said):
    with pytest.raises(ConfigurationError, match=said):
        phases_of(Tuned(**options), Plain())


@pytest.mark.parametrize("local", [ALDR(), SAM(0.1, GroupDRO("sex"))])
def test_what_remembers_is_for_one_phase(local):
    class Twice(Personal):
        def phases(self, local):
            return [Phase(local), Phase(Plain())]

    with pytest.raises(ConfigurationError, match=r"there are 2. Return one Phase, or"):
        phases_of(Twice(), local)
    assert len(phases_of(Twice(), Focal())) == 2
    assert len(phases_of(Tuned(), local)) == 1


OWN = """
import flwr.serverapp.strategy as flowers
import numpy as np
from fedweight import strategies
from fedweight.core.errors import AggregationError

kept = []

class Ours(strategies.FedAvg):
    def weights(self, round):
        if round.number in (1, 3):
            raise AggregationError("no")
        return super().weights(round)

class Starts:
    def start(self, grid, *arguments, **named):
        result = super().start(grid, *arguments, **named)
        kept.append(grid.store.read("personal", np.arange(4)).arrays["parameters"])
        return result

class OursAlone(Starts, Ours):
    pass

class FlowersAlone(Starts, flowers.FedAvg):
    def aggregate_train(self, server_round, replies):
        found = super().aggregate_train(server_round, replies)
        return (None, found[1]) if server_round in (1, 3) else found
"""


@pytest.fixture
def played(tmp_path, monkeypatch):
    """Give a function that runs a strategy of the text above for some rounds."""
    (tmp_path / "own_starts.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)

    def play(name, rounds):
        settings = {
            "strategy.name": f"own_starts:{name}",
            "personal.name": "ditto",
            "run.rounds": rounds,
            "partition.clients": 4,
            "training.epochs": 1,
            "engine.name": "local",
            "engine.plan": "loop",
        }
        return run(settings=settings, out=tmp_path / f"{name}{rounds}", report=False)

    return play


def test_a_start_of_its_own_has_the_same_personal_models(played):
    losses = [
        played(name, 4).rounds["evaluate_personal_loss"]
        for name in ("Ours", "OursAlone")
    ]
    # Round 0 has no clients, and after round 1 nobody has a personal model.
    assert losses[0].isna().tolist() == [True, True, False, False, False]
    np.testing.assert_array_equal(*losses)


@pytest.mark.parametrize("name", ["OursAlone", "FlowersAlone"])
def test_a_round_that_fails_in_a_start_of_its_own_keeps_nothing(played, name):
    for rounds in (2, 3, 4):
        played(name, rounds)
    second, third, fourth = importlib.import_module("own_starts").kept[-3:]
    assert second.shape[0] == 4
    np.testing.assert_array_equal(third, second)
    assert (fourth != second).any()
