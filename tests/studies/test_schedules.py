"""Whole runs under a schedule: their bits, their tables, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedweight import Run, run
from fedweight.core.errors import ConfigurationError

ROUNDS = 8
QUICK: dict[str, Any] = {
    "run.rounds": ROUNDS,
    "partition.clients": 12,
    "training.epochs": 1,
    "strategy.name": "fedbuff",
    "schedule.name": "buffered",
    "schedule.buffer-size": 4,
    "schedule.concurrency": 8,
}


def simulated(folder: Path, **settings: Any) -> Run:
    return run(settings={**QUICK, **settings}, out=folder, report=False)


def written(made: Run) -> dict[str, bytes]:
    """Return what neither the clock nor the place decides."""
    timed = {"timings.csv", "report.html", "environment.json", "config.toml"}
    return {
        p.name: p.read_bytes() for p in made.folder.iterdir() if p.name not in timed
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("made") / "run"
    return simulated(folder, **{"engine.threads": 1, "engine.plan": "loop"})


def test_the_tables_tell_of_staleness_and_time(made: Run) -> None:
    rows = made.clients[made.clients["status"] == "ok"]
    assert set(rows.groupby("round")["client"].count()) == {4}
    assert rows.groupby("round")["client"].nunique().eq(4).all()
    assert rows["staleness"].min() == 0
    assert rows["staleness"].max() >= 1
    expected = 0.25 * (1 + rows["staleness"]) ** -0.5
    np.testing.assert_allclose(rows["weight"], expected, rtol=1e-6)
    seconds = made.rounds.set_index("round")["round_seconds"]
    assert np.isnan(seconds[0])
    assert (seconds[1:] > 0).all()
    assert made.summary()["failed_rounds"] == 0
    assert made.rounds["test_accuracy"].iloc[-1] > 0.5


def test_the_discount_that_was_asked_for_is_no_warning(tmp_path: Path) -> None:
    made = simulated(tmp_path / "run", **{"schedule.buffer-size": 1})
    assert made.clients.groupby("round")["weight"].sum().min() < 0.5
    assert made.warnings == []


@pytest.mark.usefixtures("ready_ray")
@pytest.mark.parametrize(
    "settings",
    [
        {"engine.threads": 2, "engine.plan": "loop"},
        pytest.param(
            {"engine.name": "ray", "engine.workers": 2, "engine.plan": "loop"},
            marks=[pytest.mark.ray, pytest.mark.timeout(300)],
        ),
    ],
)
def test_every_engine_gives_the_same_bits(
    made: Run, tmp_path: Path, settings: dict[str, Any]
) -> None:
    assert written(simulated(tmp_path / "run", **settings)) == written(made)


@pytest.mark.usefixtures("ready_ray")
@pytest.mark.parametrize(
    "settings",
    [
        {"engine.threads": 2},
        pytest.param(
            {"engine.name": "ray", "engine.workers": 2},
            marks=[pytest.mark.ray, pytest.mark.timeout(300)],
        ),
    ],
)
@pytest.mark.parametrize("strategy", ["fedavg", "fedasync"])
def test_and_so_where_clients_train_at_once(
    tmp_path: Path, settings: dict[str, Any], strategy: str
) -> None:
    batched = {"engine.plan": "batched-3", "strategy.name": strategy}
    one = simulated(tmp_path / "one", **batched, **{"engine.threads": 1})
    other = simulated(tmp_path / "other", **batched, **settings)
    assert written(one) == written(other)


def test_clients_that_train_at_once_train_as_each_alone(
    made: Run, tmp_path: Path
) -> None:
    other = simulated(tmp_path / "run", **{"engine.plan": "batched-3"})
    names = ["round", "client", "status", "weight", "staleness"]
    assert other.clients[names].equals(made.clients[names])
    for name in ("train_loss", "loss"):
        np.testing.assert_allclose(
            other.clients[name], made.clients[name], rtol=0, atol=2e-3
        )


def test_other_rules_weigh_the_buffer(tmp_path: Path) -> None:
    """What they give, times the discount; they may ask the clients for side data."""
    made = simulated(tmp_path / "run", **{"strategy.name": "feddisco"})
    rows = made.clients[made.clients["status"] == "ok"]
    undone = rows["weight"] / (1 + rows["staleness"]) ** -0.5
    np.testing.assert_allclose(undone.groupby(rows["round"]).sum(), 1, rtol=1e-5)
    assert (made.weights.sum(axis=1) < 1).any()


@pytest.mark.parametrize("name", ["fedlaw", "fedce", "ida", "afl", "qfedavg", "fedau"])
def test_all_rules_go_with_a_constant_discount(tmp_path: Path, name: str) -> None:
    settings = {"strategy.name": name, "schedule.discount": "constant", "run.rounds": 4}
    made = simulated(tmp_path / "run", **settings)
    assert made.summary()["failed_rounds"] == 0
    assert made.clients["staleness"].max() >= 1


def test_a_model_with_running_statistics(tmp_path: Path) -> None:
    settings = {
        "model.name": f"{__name__}:with_statistics",
        "schedule.buffer-size": 1,
        "schedule.speed-spread": 2.0,
        "run.rounds": 12,
    }
    made = simulated(tmp_path / "run", **settings)
    model = made.model()
    assert model["1.running_var"].min() > 0
    assert made.summary()["failed_rounds"] == 0
    other = simulated(tmp_path / "other", **settings, **{"engine.threads": 2})
    assert written(other) == written(made)


def with_statistics(input_shape: Any, num_classes: int) -> Any:
    from torch import nn

    return nn.Sequential(
        nn.Flatten(),
        nn.BatchNorm1d(int(np.prod(input_shape))),
        nn.Linear(int(np.prod(input_shape)), num_classes),
    )


def test_a_deadline(tmp_path: Path) -> None:
    settings = {
        "schedule.name": "deadline",
        "schedule.seconds": 0.1,
        "strategy.name": "fedavg",
        "run.rounds": 3,
    }
    made = run(
        settings={k: v for k, v in {**QUICK, **settings}.items() if k not in BUFFER},
        out=tmp_path / "run",
        report=True,
    )
    late = made.clients[made.clients["status"] == "dropped"]
    assert late["reason"].str.match(r"it needs \S+ s, the deadline is 0\.1 s").all()
    assert 0 < late["client"].nunique() < 12
    assert made.rounds["round_seconds"].dropna().tolist() == [0.1] * 3


BUFFER = {"schedule.buffer-size", "schedule.concurrency"}
OWN = """
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from fedweight.strategies import FedBuff

class Private(DifferentialPrivacyServerSideFixedClipping):
    def __init__(self):
        super().__init__(FedBuff(), 0.01, 1.0, 4)

class Starts(FedBuff):
    def start(self, *arguments, **named):
        return super().start(*arguments, **named)
"""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strategy.name": "fedlaw"}, r"schedule\.discount: FedLAW .* 'constant'"),
        ({"strategy.name": "fedcollab"}, "FedCollab keeps several global models"),
        (
            {"strategy.name": "flwr.serverapp.strategy:FedAvg"},
            r"schedule\.name: 'buffered' needs a strategy derived from",
        ),
        ({"strategy.name": "own_schedule:Private"}, "'buffered' needs a strategy"),
        ({"strategy.name": "own_schedule:Starts"}, r"start\(\) of its own"),
        ({"strategy.stragglers": 0.5, "training.epochs": 3}, r"strategy\.stragglers"),
        ({"strategy.fraction-train": 0.5}, r"strategy\.fraction-train does not go"),
        ({"strategy.min-train-nodes": 5}, r"strategy\.min-train-nodes does not go"),
        ({"schedule.buffer-size": 13}, r"schedule\.buffer-size is 13, but there are"),
        ({"strategy.min-replies": 5}, r"strategy\.min-replies is 5, but no round"),
        ({"schedule.discount": "linear"}, "schedule.discount"),
        ({"schedule.exponent": 0.0}, r"schedule\.exponent"),
        ({"schedule.seconds": 3.0}, "schedule has no key 'seconds'"),
        ({"schedule.name": "bufered"}, "buffered"),
    ],
)
def test_what_does_not_go_together_is_refused_at_the_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    said: str,
) -> None:
    (tmp_path / "own_schedule.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=said) as caught:
        simulated(tmp_path / "run", **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_clients_beyond_what_could_train_in_a_round(tmp_path: Path) -> None:
    """Only those in a buffer do."""
    made = simulated(
        tmp_path / "run",
        **{
            "partition.name": "dirichlet-sampled",
            "partition.clients": 20_000_000,
            "strategy.fraction-evaluate": 0.0,
            "run.rounds": 2,
        },
    )
    assert made.summary()["failed_rounds"] == 0


MINE = """
from flwr.app import Message

from fedweight.server import Arrival, Schedule, Timetable


class Mine(Schedule):
    \"\"\"The first clients, round after round.\"\"\"

    chooses = True

    def __init__(self, size: int = 3):
        self.size = size

    def next(self, moment, state):
        arrivals = tuple(
            Arrival(k, moment.round, moment.model, 1.0) for k in range(self.size)
        )
        return Timetable(arrivals, lambda passes: {}, lambda passes: 1.0), None
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return {
        "run.rounds": 2,
        "partition.clients": 5,
        "strategy.name": "fedavg",
        "schedule.name": "mine:Mine",
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy.fraction-train": 0.5},
        {"strategy.stragglers": 0.5, "training.epochs": 3},
        {"strategy.min-train-nodes": 3},
    ],
)
def test_what_a_schedule_of_ones_own_would_ignore_is_refused(
    mine: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    key = next(iter(settings))
    said = f"{key} does not go with schedule 'mine:Mine', where the schedule says whose"
    with pytest.raises(ConfigurationError, match=said):
        run(settings={**mine, **settings}, out=tmp_path / "run", report=False)
    assert not (tmp_path / "run").exists()


def test_a_schedule_of_ones_own_runs_and_is_refused_where_it_cannot_be(
    mine: dict[str, Any], tmp_path: Path
) -> None:
    made = run(settings=mine, out=tmp_path / "run", report=False)
    assert made.rounds["ok"].tolist()[1:] == [3, 3]
    with pytest.raises(ConfigurationError, match=r"from 0 to 4, got 5\."):
        run(settings={**mine, "schedule.size": 6}, out=tmp_path / "odd", report=False)


def test_the_defaults_of_a_strategy_from_python_go_with_a_buffer_of_one(
    tmp_path: Path,
) -> None:
    from fedweight.strategies import FedAsync

    settings = {**QUICK, "schedule.buffer-size": 1, "run.rounds": 1}
    del settings["strategy.name"]
    made = run(strategy=FedAsync(), settings=settings, out=tmp_path / "x", report=False)
    assert made.summary()["failed_rounds"] == 0
