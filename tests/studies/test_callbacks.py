"""What is done after each round: early stopping, the best model, the user's own."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, MetricRecord
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import fedweight
from fedweight import Run, resume, run
from fedweight.cli import main
from fedweight.core.errors import ConfigurationError, DataError
from fedweight.core.state import pack, unpack
from fedweight.data import DataSet, Examples
from fedweight.server.loop import ServerState
from fedweight.studies.callbacks import BEST, MEASURES, EarlyStopping, OwnCallbacks
from fedweight.studies.configuration import Configuration
from fedweight.studies.folder import CHECKPOINT
from fedweight.studies.tables import SCHEMA

NAN = math.nan
QUICK: dict[str, Any] = {
    "run.rounds": 30,
    "partition.clients": 5,
    "training.epochs": 1,
    "model.name": "softmax",
    "engine.name": "local",
}
# Ends after round 16 of 30, and is best in rounds 14 and 16.
STOPS = {
    **QUICK,
    "run.seed": 5,
    "run.stop-after": 2,
    "run.stop-delta": 0.02,
    "run.keep-best": "evaluate-accuracy",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def of(number: int, metric: str, value: float | None) -> ServerState:
    """Return what the loop holds after a round that measured a value, or none."""
    kind, name = metric.split("-", 1)
    record = MetricRecord() if value is None else MetricRecord({name: value})
    if kind == "train":
        record = MetricRecord() if value is None else MetricRecord({metric: value})
        return ServerState(ArrayRecord(), number, train_metrics=record)
    return ServerState(ArrayRecord(), number, evaluate_metrics=record)


def stops(stopping: EarlyStopping, values: list[float | None], first: int = 1) -> int:
    """Return the round that ends a run which measures these values, or 0."""
    for number, value in enumerate(values, first):
        if stopping(of(number, stopping.best.metric, value)):
            return number
    return 0


def test_less_is_better_of_losses_and_errors_and_more_of_all_else() -> None:
    less = {"loss", "perplexity", "rmse"}
    more = {"accuracy", "auc", "dice", "macro-f1", "r2"}
    signs = {name: measure.sign for name, measure in MEASURES.items()}
    assert signs == {
        "train-loss": -1,
        **{f"evaluate-{name}": -1 for name in less},
        **{f"evaluate-{name}": 1 for name in more},
    }
    for key, also in (("stop-metric", {"train-loss"}), ("keep-best", {""})):
        named = {key for key in MEASURES if key.startswith("evaluate-")}
        assert {*SCHEMA["run"][key].choices} == named | also


@pytest.mark.parametrize(
    ("metric", "after", "delta", "values", "ends", "best"),
    [
        ("evaluate-loss", 2, 0.0, [3, 2, 1, 1, 1, 0], 5, 3),
        ("evaluate-loss", 2, 0.0, [3, 2, 1, 1, 0.9, 2, 2], 7, 5),
        ("evaluate-loss", 1, 0.0, [3, 3], 2, 1),
        ("evaluate-loss", 0, 0.0, [3, 3, 3, 3, 3, 3], 0, 0),
        ("evaluate-accuracy", 2, 0.0, [0.5, 0.6, 0.6, 0.6], 4, 2),
        ("train-loss", 2, 0.0, [3, 2, 2.5, 2.1], 4, 2),
        # Small steps add up: the third is better than the first by more.
        ("evaluate-loss", 2, 0.15, [1.0, 0.9, 0.8, 0.75, 0.7, 0.6], 5, 3),
        ("evaluate-loss", 2, 0.5, [1.0, 0.5, 0.5], 3, 1),  # By so much, not by more.
        # What was not measured is no improvement, in the first round, too.
        ("evaluate-loss", 2, 0.0, [2, None, 1, NAN, math.inf, 0], 5, 3),
        ("evaluate-loss", 2, 0.0, [None, 2, 2, 2], 4, 2),
        ("evaluate-loss", 2, 0.0, [None, None, None, 1], 3, 0),
    ],
)
def test_the_round_that_ends_a_run(
    metric: str,
    after: int,
    delta: float,
    values: list[float | None],
    ends: int,
    best: int,
) -> None:
    stopping = EarlyStopping(metric, after, delta)
    assert stops(stopping, values) == ends
    assert stopping.best.round == best
    assert bool(stopping.reason) == (ends > 0)


VALUES = st.lists(
    st.none() | st.floats(allow_nan=True, allow_infinity=True), max_size=12
)


@given(
    st.sampled_from(sorted(MEASURES)),
    st.integers(1, 5),
    st.floats(0, 10),
    VALUES,
    st.integers(0, 12),
)
def test_stopping_is_never_early_and_survives_a_checkpoint(
    metric: str, after: int, delta: float, values: list[float | None], cut: int
) -> None:
    whole = EarlyStopping(metric, after, delta)
    ends = stops(whole, values)
    assert ends == 0 or after < ends <= len(values)
    before = EarlyStopping(metric, after, delta)
    if 0 < ends <= cut or cut > len(values):
        return
    assert stops(before, values[:cut]) == 0
    resumed = EarlyStopping(metric, after, delta)
    resumed.restore(unpack(*pack(before.state)))
    assert stops(resumed, values[cut:], cut + 1) == ends
    assert resumed.reason == whole.reason


@given(
    st.sampled_from(sorted(MEASURES)),
    st.integers(1, 3),
    st.lists(st.integers(1, 1000), max_size=30),
)
def test_what_improves_in_every_round_never_stops(
    metric: str, after: int, steps: list[int]
) -> None:
    way = MEASURES[metric].sign
    values: list[float | None] = [float(way * v) for v in np.cumsum(steps)]
    assert stops(EarlyStopping(metric, after, 0.5), values) == 0


def test_a_metric_that_is_not_there_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "fedweight"):
        stopping = EarlyStopping("evaluate-loss", 3)
        assert stops(stopping, [None] * 5) == 4
    assert [r.getMessage() for r in caplog.records] == [
        "round 1: the clients measured no evaluate-loss, which counts as no improvement"
    ]
    assert stopping.reason == "evaluate-loss was not measured in any of 4 rounds"


# --------------------------------------------------------------------------- whole runs


def test_a_run_that_stops_early_is_over(here: Path, capsys: Any) -> None:
    settings = [f"--set={key}={value}" for key, value in STOPS.items()]
    arguments = ["run", *settings, "--set=run.evaluate-every=100", "--out", "x"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "after round 16 of 30: evaluate-loss was " in out
    assert "better by more than 0.02 in the 2 rounds since" in out
    assert "warning" not in out
    done = Run("x")
    assert done.complete
    assert done.rounds_done == 16
    assert "16 of 30 rounds (stopped early)" in repr(done)
    # The last model is tested, whichever round is the last.
    assert done.accuracy.index.tolist() == [0, 16]
    assert not Path("x", CHECKPOINT).exists()
    assert "This run stopped early, after round 16" in Path("x/report.html").read_text()
    assert main(["resume", "x"]) == 2
    assert "is complete" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["complete"] is True
    assert summary["stopped"].startswith("after round 16 of 30: evaluate-loss was ")
    assert summary["round_of_best_model"] == 14


def test_what_config_toml_says_repeats_a_run_that_stopped(here: Path) -> None:
    first = run(settings=STOPS, out="x", report=False)
    again = run("x/config.toml", out="y", report=False)
    assert first.rounds.equals(again.rounds)
    for name in ("config.toml", "rounds.csv", "model.safetensors", BEST):
        assert Path("x", name).read_bytes() == Path("y", name).read_bytes()


def test_the_best_model_is_that_of_its_round(here: Path) -> None:
    done = run(settings=STOPS, out="x", report=False)
    accuracy = done.rounds.set_index("round")["evaluate_accuracy"]
    assert done.best_round == accuracy.idxmax() == 14  # The first of equal ones.
    assert (accuracy == accuracy.max()).sum() == 2
    with safe_open(Path("x", BEST), "pt") as file:
        assert file.metadata() == {"round": "14"}
    short = run(
        settings={**QUICK, "run.seed": 5, "run.rounds": 14}, out="y", report=False
    )
    best, last = done.best_model(), short.model()
    assert best.keys() == last.keys()
    assert all((best[name] == last[name]).all() for name in best)
    summary = done.summary()
    test = short.summary()["test_accuracy"]
    assert summary["test_accuracy_of_best_model"] == test
    assert short.best_round is None
    with pytest.raises(DataError, match=r"run\.keep-best says by what"):
        short.best_model()
    Path("y", BEST).write_bytes(b"nothing")
    with pytest.raises(DataError, match="no model that a run kept"):
        _ = Run("y").best_round


class Stopped(Exception):
    """Ends a run between two rounds."""


def written(folder: str) -> dict[str, bytes]:
    """Return what the clock does not decide."""
    timed = {"timings.csv", "report.html", "environment.json"}
    return {
        p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name not in timed
    }


# Rounds 14 and 16 are the best.
@pytest.mark.parametrize("last", [3, 13, 14, 15])
def test_a_run_that_goes_on_stops_in_the_same_round(here: Path, last: int) -> None:
    settings = {**STOPS, "run.checkpoint-rounds": 2}
    whole = run(settings=settings, out="whole", report=False)

    def stop(progress: Any) -> None:
        if progress.round == last:
            raise Stopped

    with pytest.raises(Stopped):
        run(settings=settings, out="x", report=False, progress=stop)
    assert not Run("x").complete
    assert Run("x").stopped is None
    resumed = resume("x", report=False)
    assert written("x") == written("whole")
    assert resumed.stopped == whole.stopped
    assert resumed.complete
    assert not Path("x", CHECKPOINT).exists()


def test_a_best_model_that_is_gone_is_missed(here: Path) -> None:
    def stop(progress: Any) -> None:
        if progress.round == 5:
            raise Stopped

    with pytest.raises(Stopped):
        run(
            settings={**STOPS, "run.checkpoint-rounds": 2},
            out="x",
            report=False,
            progress=stop,
        )
    Path("x", BEST).unlink()
    with pytest.raises(DataError, match=r"best-model\.safetensors is missing"):
        resume("x", report=False)


def test_a_checkpoint_stays_until_the_model_is_written(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedweight.studies import recorder

    whole = recorder.write_whole

    def full(path: Path, content: Any) -> None:
        if path.name == "model.safetensors":
            raise Stopped
        whole(path, content)

    settings = {**STOPS, "run.checkpoint-rounds": 2}
    with monkeypatch.context() as patch:
        patch.setattr(recorder, "write_whole", full)
        with pytest.raises(Stopped):
            run(settings=settings, out="x", report=False)
    assert not Run("x").complete
    assert resume("x", report=False).complete
    run(settings=settings, out="whole", report=False)
    assert written("x") == written("whole")


FLOWERS = "flwr.serverapp.strategy:FedAvg"


@pytest.mark.filterwarnings("ignore")  # Flower's own.
def test_a_strategy_of_flowers_is_stopped_alike(here: Path) -> None:
    # It sums in any order, so equal accuracies differ in their last bits.
    settings = {**STOPS, "run.keep-best": "evaluate-loss"}
    ours = run(settings=settings, out="x", report=False)
    settings["strategy.name"] = FLOWERS
    theirs = run(settings=settings, out="y", report=False)
    assert theirs.rounds_done == ours.rounds_done
    assert theirs.best_round == ours.best_round
    for column in ("train_loss", "evaluate_loss", "evaluate_accuracy"):
        np.testing.assert_allclose(theirs.rounds[column], ours.rounds[column], 1e-5)


# ----------------------------------------------------------------- refused at the start

OWN_START = """
from fedweight.strategies import FedAvg

class Alone(FedAvg):
    def start(self, *arguments, **named):
        raise AssertionError
"""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"run.stop-metric": "test-loss"}, r"stop-metric must be one of"),
        ({"run.keep-best": "test-accuracy"}, r"keep-best must be one of"),
        ({"run.keep-best": "train-loss"}, r"keep-best must be one of"),
        ({"run.stop-after": -1}, r"run\.stop-after must be"),
        ({"run.stop-delta": -0.1}, r"run\.stop-delta must be"),
        (
            {"run.stop-after": 2, "strategy.fraction-evaluate": 0.0},
            r"run\.stop-metric is 'evaluate-loss', but strategy\.fraction-evaluate is "
            r"0: .* Raise strategy\.fraction-evaluate, or set run\.stop-after = 0\.",
        ),
        (
            {"run.keep-best": "evaluate-accuracy", "strategy.fraction-evaluate": 0.0},
            r"run\.keep-best is 'evaluate-accuracy', .* or set it to \"\"\.",
        ),
        (
            {"run.stop-after": 2, "data.held-out": 0.0},
            r"data\.held-out is 0: .* Raise data\.held-out, or set run\.stop-after",
        ),
        (
            {"run.stop-after": 2, "data.held-out": 0.001},
            r"no client has so many examples that data\.held-out = 0\.001 leaves",
        ),
        (
            {
                "run.stop-after": 2,
                "data.held-out": 0.001,
                "partition.name": "dirichlet-sampled",
            },
            r"no client has so many examples that data\.held-out = 0\.001 leaves",
        ),
        (
            {
                "run.stop-after": 2,
                "run.stop-metric": "train-loss",
                "strategy.fraction-train": 0.0,
            },
            r"run\.stop-metric is 'train-loss', but strategy\.fraction-train is 0",
        ),
        (
            {"run.stop-after": 2, "strategy.name": "own_start:Alone"},
            r"strategy 'own_start:Alone' runs its rounds in a start\(\) of its own",
        ),
    ],
)
def test_what_nobody_will_have_measured_is_refused(
    here: Path, settings: dict[str, Any], said: str
) -> None:
    Path("own_start.py").write_text(OWN_START)
    with pytest.raises(ConfigurationError, match=said) as caught:
        run(settings={**QUICK, **settings}, out="x")
    assert "\n" not in str(caught.value)
    assert not Path("x").exists()


def test_the_training_loss_needs_nothing_held_out(here: Path) -> None:
    settings = {
        **QUICK,
        "run.rounds": 2,
        "run.stop-after": 5,
        "run.stop-metric": "train-loss",
        "data.held-out": 0.0,
        "strategy.fraction-evaluate": 0.0,
    }
    done = run(settings=settings, out="x", report=False)
    assert done.complete
    assert done.stopped is None


def test_the_test_set_decides_nothing(here: Path) -> None:
    """Another test set gives another accuracy, and the same models."""
    rng = np.random.default_rng(0)
    y = np.arange(300) % 3
    x = (rng.normal(size=(300, 2)) + 3 * np.eye(3)[y, :2]).astype(np.float32)
    found = []
    for number, labels in enumerate((y[-60:], (y[-60:] + 1) % 3)):
        data = DataSet("own", Examples(x[:-60], y[:-60]), Examples(x[-60:], labels), 3)
        settings = {k: v for k, v in STOPS.items() if k != "model.name"}
        settings |= {"model.name": "softmax", "run.stop-delta": 0.05}
        done = run(settings=settings, dataset=data, out=str(number), report=False)
        found.append((done, written(str(number))))
    (one, files), (other, others) = found
    assert one.stopped == other.stopped is not None
    assert one.summary()["test_accuracy"] != other.summary()["test_accuracy"]
    for name in ("model.safetensors", BEST, "clients.csv"):
        assert files[name] == others[name]


# ----------------------------------------------------------------------- the user's own


def test_a_users_callback_sees_every_round_when_it_is_recorded(here: Path) -> None:
    seen: list[tuple[int, int, float]] = []

    def look(state: ServerState) -> None:
        loss = state.evaluate_metrics["loss"]
        assert isinstance(loss, float)
        seen.append((state.round, Run("x").rounds_done, loss))

    done = run(
        settings={**QUICK, "run.rounds": 3}, out="x", report=False, callbacks=[look]
    )
    assert [(a, b) for a, b, _ in seen] == [(1, 1), (2, 2), (3, 3)]
    losses = done.rounds["evaluate_loss"].tolist()[1:]
    assert [loss for _, _, loss in seen] == losses
    assert done.stopped is None


@pytest.mark.parametrize("answer", [True, np.True_])
def test_a_users_callback_may_stop(here: Path, answer: Any) -> None:
    called = []

    def enough(state: ServerState) -> bool:
        return answer if state.round == 4 else False

    done = run(
        settings={**QUICK, "run.checkpoint-rounds": 2},
        out="x",
        report=False,
        callbacks=[enough, lambda state: called.append(state.round)],
    )
    assert called == [1, 2, 3, 4]
    assert done.complete
    assert done.stopped is not None
    assert "enough asked for it" in done.stopped
    assert not Path("x", CHECKPOINT).exists()
    with pytest.raises(ConfigurationError, match="is complete"):
        resume("x")


@pytest.mark.parametrize("every", [1, 2, 100])
def test_the_last_model_is_tested_when_a_users_callback_stops(
    here: Path, every: int
) -> None:
    settings = {**QUICK, "run.evaluate-every": every}
    done = run(
        settings={**settings, "run.rounds": 9},
        out="x",
        report=False,
        callbacks=[lambda state: state.round == 3],
    )
    run(settings={**settings, "run.rounds": 3}, out="y", report=False)
    assert done.complete
    assert done.accuracy.index[-1] == 3
    assert Path("x/rounds.csv").read_bytes() == Path("y/rounds.csv").read_bytes()
    assert done.summary()["test_accuracy"] == Run("y").summary()["test_accuracy"]


def test_a_users_callback_that_asks_in_the_last_round_stops_nothing(
    here: Path,
) -> None:
    done = run(
        settings={**QUICK, "run.rounds": 2},
        out="x",
        report=False,
        callbacks=[lambda state: state.round == 2],
    )
    assert done.complete
    assert done.stopped is None


def test_a_users_callback_that_raises_ends_the_run(here: Path) -> None:
    def broken(state: ServerState) -> None:
        if state.round == 3:
            raise Stopped("of mine")

    settings = {**QUICK, "run.checkpoint-rounds": 1, "run.rounds": 5}
    with pytest.raises(Stopped, match="of mine") as caught:
        run(settings=settings, out="x", report=False, callbacks=[broken])
    assert "fedweight resume x" in " ".join(caught.value.__notes__)
    assert Run("x").rounds_done == 3
    # The round whose callback failed comes again.
    seen: list[int] = []
    done = resume("x", report=False, callbacks=[lambda s: seen.append(s.round)])
    assert seen == [3, 4, 5]
    assert done.complete


@pytest.mark.parametrize(
    ("callbacks", "said"),
    [
        (print, r"callbacks must be a list of functions, got .* callbacks=\[f\]"),
        ("name", "callbacks must be a list of functions, got 'name'"),
        ([print, 3], r"callbacks\[1\] must be a function of the loop's state, got 3"),
    ],
)
def test_callbacks_that_are_none_are_refused(
    here: Path, callbacks: Any, said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        run(settings=QUICK, out="x", callbacks=callbacks)
    assert not Path("x").exists()


def test_callbacks_of_a_strategy_with_its_own_start_are_refused(here: Path) -> None:
    Path("own_start.py").write_text(OWN_START)
    with pytest.raises(ConfigurationError, match=r"callbacks: strategy 'own_start"):
        run(
            settings={**QUICK, "strategy.name": "own_start:Alone"},
            out="x",
            callbacks=[lambda state: None],
        )


def test_a_callbacks_answer_is_true_false_or_nothing() -> None:
    own = OwnCallbacks([lambda state: 0.3])  # type: ignore[arg-type,return-value]
    with pytest.raises(
        ConfigurationError, match=r"returned 0\.3\. Return True to stop"
    ):
        own(of(1, "train-loss", 0.3))


def test_the_defaults_stop_nothing_and_keep_one_model(here: Path) -> None:
    table = Configuration.of({})["run"]
    assert (table["stop-after"], table["keep-best"]) == (0, "")
    done = fedweight.run(settings={**QUICK, "run.rounds": 1}, out="x", report=False)
    assert not (done.folder / BEST).exists()
    assert load_file(done.folder / "model.safetensors").keys() == done.model().keys()
