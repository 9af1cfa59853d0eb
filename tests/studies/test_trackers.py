"""Trackers: told what the tables hold; the real libraries where they are installed."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import fedweight
from fedweight.core.errors import ConfigurationError
from fedweight.data import DataSet, Examples
from fedweight.studies import MLflow, TensorBoard, Tracker, WandB
from fedweight.studies.trackers import Tracking

ROOT = Path(fedweight.__file__).parents[1]
QUICK: dict[str, Any] = {
    "run.rounds": 2,
    "partition.clients": 3,
    "training.epochs": 1,
    "model.name": "softmax",
}


class Kept(Tracker):
    def __init__(
        self, *, clients: bool = False, groups: bool = False, breaks: int = -1
    ) -> None:
        super().__init__(clients=clients, groups=groups)
        self.breaks = breaks
        self.told: list[Any] = []

    def begin(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.told.append((folder, dict(config)))

    def log(self, round: int, values: Mapping[str, float]) -> None:
        if round == self.breaks:
            raise OSError("no disk")
        self.told.append((round, dict(values)))

    def end(self, failed: bool) -> None:
        self.told.append(failed)


def quick(out: Path, *callbacks: Any, **more: Any) -> fedweight.Run:
    return fedweight.run(
        settings=QUICK, out=out, callbacks=callbacks, report=False, **more
    )


def test_a_tracker_is_told_what_the_tables_hold(tmp_path: Path) -> None:
    few, all_ = Kept(), Kept(clients=True)
    run = quick(tmp_path / "run", few, all_)
    for kept in (few, all_):
        (folder, config), *rounds, failed = kept.told
        assert folder == run.folder
        assert config["run.rounds"] == 2
        assert config["engine.plan"] == run.config["engine"]["plan"]
        assert failed is False
        assert [number for number, _ in rounds] == [0, 1, 2]
        for number, values in rounds:
            row = run.rounds.set_index("round").loc[number]
            own = {k: v for k, v in values.items() if not k.startswith("clients/")}
            known = {
                k: float(v)
                for k, v in row.items()
                if not isinstance(v, str) and math.isfinite(v)
            }
            assert own == known
    last = all_.told[3][1]
    rows = run.clients[run.clients["round"] == 2].set_index("client")
    for client in range(3):
        for column in ("weight", "accuracy", "train_loss"):
            value = last[f"clients/{client}/{column}"]
            assert value == rows.loc[client, column]
    assert not any(k.startswith("clients/") for k in few.told[3][1])


def people() -> DataSet:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3))
    who = {"sex": np.array(["f", "m/x"] * 100)}
    every = Examples(x, (x[:, 0] > 0).astype(int), who)
    return DataSet("p", every.take(slice(0, 140)), every.take(slice(140, 200)), 2)


def test_groups_are_told_where_asked(tmp_path: Path) -> None:
    kept = [Kept(groups=True, clients=each) for each in (False, True)]
    run = fedweight.run(
        dataset=people(),
        settings={**QUICK, "groups.attributes": ["sex"], "partition.name": "iid"},
        out=tmp_path / "run",
        callbacks=kept,
        report=False,
    )
    few, all_ = (one.told[-2][1] for one in kept)
    rows = run.groups[run.groups["round"] == 2]
    assert len(rows) == 2 * 2 + 3 * 2
    expected = {}
    for row in rows.to_dict("records"):
        owner = row["client"]
        where = f"groups/{row['part']}" if pd.isna(owner) else f"clients/{owner}/groups"
        group = row["group"].replace("/", "-")
        for column in ("examples", "accuracy", "selection_rate", "tpr", "fpr", "loss"):
            if math.isfinite(row[column]):
                expected[f"{where}/sex/{group}/{column}"] = row[column]
    found = {k: v for k, v in all_.items() if k in expected}
    assert found == expected
    told = [{k for k in one if "/sex/" in k} for one in (few, all_)]
    assert told[0] == {k for k in told[1] if k.startswith("groups/")}
    assert len(told[0]) < len(told[1])


class Greedy(Tracker):
    """One that keeps what it is told for itself, and does not make its base."""

    def __init__(self) -> None:
        self.rounds = 0

    def begin(self, folder: Path, config: Mapping[str, Any]) -> None:
        config.clear()  # type: ignore[attr-defined]

    def log(self, round: int, values: Mapping[str, float]) -> None:
        values.clear()  # type: ignore[attr-defined]
        self.rounds += 1


def test_a_tracker_takes_nothing_from_the_next(tmp_path: Path) -> None:
    greedy, kept = Greedy(), Kept()
    quick(tmp_path / "run", greedy, kept)
    assert greedy.rounds == 3
    assert kept.told[0][1]["run.rounds"] == 2
    assert kept.told[3][1]["test_accuracy"] > 0


def test_trackers_change_no_bit_of_a_run(tmp_path: Path) -> None:
    folders = [
        quick(tmp_path / "plain").folder,
        quick(tmp_path / "seen", Kept()).folder,
    ]
    for name in ("rounds.csv", "clients.csv", "model.safetensors", "config.toml"):
        plain, seen = ((folder / name).read_bytes() for folder in folders)
        assert plain == seen


def test_one_that_fails_ends_no_run_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken, whole = Kept(breaks=1), Kept()
    with caplog.at_level(logging.WARNING, "fedweight"):
        run = quick(tmp_path / "run", broken, whole)
    assert run.complete
    assert len(broken.told) == 2
    assert whole.told[-1] is False
    [said] = [r.message for r in caplog.records if "follows this run" in r.message]
    assert said == "Kept failed, and follows this run no longer: OSError: no disk"


def test_a_run_that_stops_is_told_as_failed(tmp_path: Path) -> None:
    kept = Kept()

    def stop(state: Any) -> None:
        if state.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path / "run", kept, stop)
    assert kept.told[-1] is True


def test_what_follows_a_run_that_goes_on(tmp_path: Path) -> None:
    def stop(state: Any) -> None:
        if state.round == 2:
            raise KeyboardInterrupt

    settings = {**QUICK, "run.checkpoint-rounds": 1, "run.rounds": 3}
    with pytest.raises(KeyboardInterrupt):
        fedweight.run(settings=settings, out=tmp_path / "r", callbacks=[stop])
    kept = Kept()
    fedweight.studies.resume(tmp_path / "r", callbacks=[kept])
    assert [told[0] for told in kept.told[1:-1]] == [2, 3]


@pytest.mark.parametrize(
    ("make", "extra"),
    [(TensorBoard, "tensorboard"), (MLflow, "mlflow"), (WandB, "wandb")],
)
def test_a_library_that_is_not_there_is_one_line(
    make: type[Tracker], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fedweight.core.extras.is_installed", lambda package: package != extra
    )
    with pytest.raises(ConfigurationError) as caught:
        make()
    said = f"needs {extra}, which is not installed. Install fedweight[{extra}]."
    assert said in str(caught.value)


def test_what_is_no_number_is_not_told() -> None:
    kept = Kept(clients=True)
    rows = [{"client": 3, "name": "site/a", "accuracy": 0.5, "reason": ""}]
    row = {"round": 1, "status": "ok", "test_loss": math.nan, "asked": 2}
    tracking = Tracking([kept])
    tracking.log(1, row, rows)
    assert kept.told == [(1, {"asked": 2.0, "clients/site-a/accuracy": 0.5})]
    with pytest.raises(ConfigurationError, match="clients must be True or False"):
        Kept(clients="yes")  # type: ignore[arg-type]


# ------------------------------------------------- the real libraries, where installed


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing import event_accumulator

    run = quick(tmp_path / "one", TensorBoard(tmp_path / "tb", clients=True))
    found = event_accumulator.EventAccumulator(str(tmp_path / "tb" / "one"))
    found.Reload()
    for column in ("test_accuracy", "train_loss"):
        events = {e.step: e.value for e in found.Scalars(column)}
        expected = run.measured(column).to_dict()
        assert events == pytest.approx(expected)
    assert len(found.Scalars("clients/1/weight")) == 2
    assert "config/text_summary" in found.Tags()["tensors"]


def test_mlflow_reads_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    run = fedweight.run(
        dataset=people(),
        settings={**QUICK, "groups.attributes": ["sex"]},
        out=tmp_path / "one",
        callbacks=[MLflow("mine", uri, groups=True)],
        report=False,
    )
    client = mlflow.MlflowClient(uri)
    [found] = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (found.info.run_name, found.info.status) == ("one", "FINISHED")
    assert found.data.params["run.rounds"] == "2"
    history = client.get_metric_history(found.info.run_id, "test_accuracy")
    values = {metric.step: metric.value for metric in history}
    assert values == run.measured("test_accuracy").to_dict()
    history = client.get_metric_history(found.info.run_id, "groups/test/sex/f/loss")
    assert [metric.step for metric in history] == [0, 1, 2]


def test_wandb_writes_its_offline_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    quick(tmp_path / "one", WandB("mine", tmp_path))
    wandb.teardown()  # Its process has written everything then.
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    [file] = folder.glob("*.wandb")
    content = file.read_bytes()
    assert b"test_accuracy" in content
    assert b"run.rounds" in content


def test_the_pages_own_tracker_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "runs.md").read_text("utf-8")
    [code] = [c for c in re.findall(r"```python\n(.*?)```", text, re.S) if "Lines" in c]
    assert len([line for line in code.splitlines() if line]) <= 11
    found: dict[str, Any] = {}
    exec(code, found)
    run = quick(tmp_path / "run", found["Lines"]())
    lines = (tmp_path / "run.log").read_text().splitlines()
    expected = run.rounds["test_accuracy"]
    assert lines == [f"{k} {value}" for k, value in enumerate(expected)]
