"""Strategies of a user's that bring what their clients measure and answer."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import pandas as pd
import pytest
import torch

from fedweight import Run, run
from fedweight.core.errors import ConfigurationError, DataError

GAIN = '''
import torch
from fedweight.clients import ClientRound
from fedweight.strategies import WeightingStrategy


def gain(client: ClientRound) -> float:
    before = client.evaluate(client.received, "held-out").loss
    return before - client.evaluate(client.trained, "held-out").loss


class ByGain(WeightingStrategy):
    """Weigh clients by what their training gains."""

    probes = {"gain": gain}
    request = ("gain",)

    def weights(self, round):
        return torch.softmax(round.metric("gain"), 0)
'''

HALF = '''
import numpy as np

from fedweight.clients import Answer, ClientQuery
from fedweight.server import Question
from fedweight.strategies import WeightingStrategy


def half(asked: ClientQuery) -> Answer:
    upper = np.mean(asked.data.train.y >= asked.num_classes / 2)
    return Answer({"half": int(upper > 0.5)})


class ByHalf(WeightingStrategy):
    """Train a model for each half of the classes."""

    queries = {"half": half}

    def prepare(self, population):
        questions = {client: Question() for client in population.clients}
        answers = population.ask("half", questions)
        return {client: answer.metrics["half"] for client, answer in answers.items()}

    def assign(self, selection):
        return [selection.state.get(client, 0) for client in selection.clients]

    def weights(self, round):
        return round.size_weights
'''


ON_RAY = pytest.param("ray", marks=pytest.mark.ray)
AS_A_PROGRAM = pytest.param("program", marks=pytest.mark.ray)


@pytest.fixture(params=["local", ON_RAY])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ran(folder: Path, code: str, settings: dict[str, object], engine: str) -> Run:
    """Run a strategy of a module of the user's; ``"program"`` is one, on Ray.

    The module, ``own`` in the settings, has another name each time: workers on Ray
    remember those of other tests.
    """
    name = f"own_{uuid.uuid4().hex}"
    Path(f"{name}.py").write_text(code)
    strategy = str(settings["strategy.name"]).replace("own:", f"{name}:")
    given = {**settings, "strategy.name": strategy, "engine.name": "local"}
    if engine != "local":
        given |= {"engine.name": "ray", "engine.workers": 2}
    if engine != "program":
        return run(settings=given, out=folder / "run", report=False)
    pairs = [f"{key}={value!r}" for key, value in given.items()]
    options = [part for pair in pairs for part in ("--set", pair)]
    command = [sys.executable, "-m", "fedweight", "run", "--out", "run", *options]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=110)
    return Run(folder / "run")


def gains(made: Run) -> pd.Series:
    """Return the clients' gains, whose column has the module's name before it."""
    [column] = (name for name in made.clients if name.endswith("_gain"))
    return made.clients[column]


@pytest.fixture
def own(tmp_path: Path, ready_ray: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("engine", ["local", AS_A_PROGRAM])
def test_a_strategy_brings_its_probes(own: Path, engine: str) -> None:
    settings = {
        "strategy.name": "own:ByGain",
        "run.rounds": 2,
        "partition.clients": 4,
    }
    made = ran(own, GAIN, settings, engine)
    assert made.rounds["ok"].tolist()[1:] == [4, 4]
    assert gains(made).notna().all()


def test_a_strategy_brings_its_queries(own: Path, engine: str) -> None:
    settings = {
        "strategy.name": "own:ByHalf",
        "run.rounds": 3,
        "training.epochs": 3,
        "partition.clients": 6,
        "partition.name": "shards",
    }
    made = ran(own, HALF, settings, engine)
    assert len(made.models()) == 2
    last = made.clients.query("round == 3")
    assert last["weight"].sum() == pytest.approx(2)
    assert last["accuracy"].notna().all()


# Clients 1 and 2 cannot answer; where `nobody` is told, the method gives up.
SICK = HALF.replace(
    "    upper =",
    '    if asked.client in (1, 2):\n        raise ValueError("no power")\n    upper =',
)
GIVES_UP = SICK.replace(
    '        answers = population.ask("half", questions)\n',
    '        answers = population.ask("half", questions)\n'
    '        raise ConfigurationError("too few answers")\n',
).replace(
    "import numpy", "from fedweight.core.errors import ConfigurationError\nimport numpy"
)

FAILED = "clients 1 and 2 did not answer before the first round: query 'half': "


def test_who_does_not_answer_a_query_is_recorded(
    own: Path, engine: str, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "strategy.name": "own:ByHalf",
        "run.rounds": 2,
        "partition.clients": 5,
        "partition.name": "iid",
    }
    made = ran(own, SICK, settings, engine)
    told = f"{FAILED}query.ask: ValueError: no power"
    assert told in made.warnings
    assert "Traceback" not in "".join(capfd.readouterr())
    rows = made.clients[made.clients["round"] == 0]
    assert rows["client"].tolist() == [1, 2]
    assert rows["status"].tolist() == ["failed"] * 2
    log = (made.folder / "errors.log").read_text()
    assert log.count("Traceback") == 1
    assert "2 x, round 0, clients 1 and 2:" in log
    # They train all the same.
    assert made.rounds["ok"].tolist()[1:] == [5, 5]
    assert made.rounds["failed"].sum() == 0
    assert not any("failed in every round" in line for line in made.warnings)
    made.report()


def test_a_method_that_gives_up_before_the_rounds_leaves_the_reasons(own: Path) -> None:
    settings = {"strategy.name": "own:ByHalf", "partition.clients": 5}
    with pytest.raises(ConfigurationError, match="too few answers"):
        ran(own, GIVES_UP, settings, "local")
    made = Run(own / "run")
    assert any(line.startswith(FAILED) for line in made.warnings)
    assert "no power" in (own / "run" / "errors.log").read_text()


def test_the_best_of_several_models_are_kept(own: Path) -> None:
    settings: dict[str, object] = {
        "strategy.name": "own:ByHalf",
        "run.rounds": 4,
        "run.keep-best": "evaluate-accuracy",
        "training.epochs": 3,
        "training.learning-rate": 1.0,
        "partition.clients": 6,
        "partition.name": "shards",
    }
    done = ran(own, HALF, settings, "local")
    best = done.best_round
    assert best == done.measured("evaluate_accuracy").idxmax()
    assert not (done.folder / "best-model.safetensors").exists()
    (own / "short").mkdir()
    settings = {**settings, "run.rounds": best, "run.keep-best": ""}
    short = ran(own / "short", HALF, settings, "local")
    for kept, model in zip(done.best_models(), short.models(), strict=True):
        assert all(torch.equal(kept[name], model[name]) for name in model)
    with pytest.raises(DataError, match=r"has several best models.*best_models\(\)"):
        done.best_model()
    with pytest.raises(DataError, match=r"best-models\.safetensors is missing"):
        short.best_models()
    summary = done.summary()
    assert summary["round_of_best_model"] == best
    assert summary["test_accuracy_of_best_model"] is None


WRAPPED = '''
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping


class Holder(DifferentialPrivacyServerSideFixedClipping):
    """Clip what comes in and add no noise; a method of ours does the rest."""

    def __init__(self, fraction_train: float = 1.0) -> None:
        inner = {}(fraction_train=fraction_train)
        super().__init__(inner, 0.0, 1e3, 5)


class Outer(Holder):
    """A wrapper in a wrapper."""

    def __init__(self) -> None:
        self.outermost = True
        super().__init__()
        self.strategy = Holder()
'''

ASKS = SICK.replace("class ByHalf", "class Asks").replace(
    "    def assign(self, selection):\n"
    "        return [selection.state.get(client, 0) for client in selection.clients]\n",
    "",
)


@pytest.mark.parametrize("name", ["Holder", "Outer"])
def test_a_wrapped_strategy_brings_its_probes(
    own: Path, engine: str, name: str
) -> None:
    settings = {
        "strategy.name": f"own:{name}",
        "run.rounds": 2,
        "partition.clients": 5,
        "partition.name": "iid",
    }
    made = ran(own, GAIN + WRAPPED.format("ByGain"), settings, engine)
    assert gains(made).notna().all()
    assert made.clients["status"].tolist() == ["ok"] * 10


def test_a_wrapped_strategy_brings_its_queries(own: Path) -> None:
    settings = {
        "strategy.name": "own:Holder",
        "run.rounds": 2,
        "partition.clients": 5,
        "partition.name": "iid",
    }
    made = ran(own, ASKS + WRAPPED.format("Asks"), settings, "local")
    assert made.clients.loc[made.clients["round"] == 0, "client"].tolist() == [1, 2]
    assert any(line.startswith(FAILED) for line in made.warnings)


def test_what_a_wrapped_strategy_asks_for_is_checked_first(own: Path) -> None:
    code = GAIN.replace('request = ("gain",)', 'request = ("gains",)')
    settings = {"strategy.name": "own:Holder", "partition.clients": 5}
    with pytest.raises(ConfigurationError, match=r"ByGain\.request names 'gains'"):
        ran(own, code + WRAPPED.format("ByGain"), settings, "local")
    assert not (own / "run").exists()
