from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fedweight.errors import ConfigurationError, DataError
from fedweight.studies.result import Run

MakeRun = Any


def test_frames_have_proper_types(make_run: MakeRun) -> None:
    run = Run(make_run())
    assert run.rounds["round"].dtype == "int64"
    assert run.rounds["bytes_up"].dtype == "Int64"
    assert run.rounds["train_loss"].dtype == "float64"  # empty throughout
    assert run.clients["weight"].dtype == "float64"
    assert run.clients["steps"].dtype == "Int64"
    assert run.partition["label_0"].sum() > 0
    assert list(run.timings["seconds"]) == [0.5] * 4
    assert run.rounds is run.rounds  # read once


def test_reason_that_reads_like_a_gap_stays_text(make_run: MakeRun) -> None:
    run = Run(make_run(reason="NaN"))
    assert list(run.bad_replies["reason"]) == ["NaN"]
    assert (run.clients["reason"] == "").sum() == len(run.clients) - 1


def test_weights_are_rounds_by_clients(make_run: MakeRun) -> None:
    weights = Run(make_run()).weights
    assert list(weights.index) == [1, 2]  # round 3 failed
    assert list(weights.columns) == [0, 1, 2, 3]
    assert weights.loc[1].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert math.isnan(weights.loc[2, 0])  # it answered with an error
    assert weights.loc[2].sum() == pytest.approx(1)


def test_client_that_answered_twice_counts_once(make_run: MakeRun) -> None:
    folder = make_run()
    with (folder / "clients.csv").open("a") as out:
        out.write("1,0,rejected,answered twice,,10,,,,,,0.9,0,0,\n")
    run = Run(folder)
    assert run.by_client("accuracy").loc[1, 0] == pytest.approx(0.2)
    assert run.weights.loc[1, 0] == pytest.approx(0.1)


def test_summary(make_run: MakeRun) -> None:
    summary = Run(make_run()).summary()
    assert summary == json.loads(json.dumps(summary))
    assert summary["test_accuracy"] == 0.7
    # Nothing is chosen by the test set: the last value counts, not the best.
    assert not [name for name in summary if name.startswith("best")]
    assert summary["mean_test_accuracy_last_10"] == pytest.approx((0.5 + 0.8 + 0.7) / 3)
    assert summary["client_accuracy_worst10"] == pytest.approx(0.4)
    assert summary["failed_rounds"] == 1
    assert summary["bad_replies"] == 1
    assert summary["seconds"] == pytest.approx(2)
    assert summary["bytes_down"] == 1600
    assert summary["complete"] is True
    assert summary["seed"] == 7


def test_mean_of_the_last_ten_rounds_leaves_out_what_came_before(
    make_run: MakeRun,
) -> None:
    # Rounds 0, 1 and 2 are the only ones whose accuracy is not 0.7.
    summary = Run(make_run(rounds=12)).summary()
    assert summary["mean_test_accuracy_last_10"] == pytest.approx(0.7)


def test_what_was_not_measured_is_none(make_run: MakeRun) -> None:
    summary = Run(make_run(evaluated=False)).summary()
    assert summary["client_accuracy_mean"] is None
    assert summary["held_out_accuracy"] is None
    json.dumps(summary, allow_nan=False)


def test_infinite_loss_can_be_read(make_run: MakeRun) -> None:
    folder = make_run()
    text = (folder / "rounds.csv").read_text().replace("2.0,", "inf,", 1)
    (folder / "rounds.csv").write_text(text)
    run = Run(folder)
    assert math.isinf(run.rounds["test_loss"].iloc[0])
    json.dumps(run.summary(), allow_nan=False)


def test_model(make_run: MakeRun) -> None:
    assert torch.equal(Run(make_run()).model()["bias"], torch.arange(3.0))


def test_interrupted_run_can_be_read(make_run: MakeRun) -> None:
    folder = make_run(rounds=2, asked=20, model=False)
    for name in ("environment.json", "timings.csv", "partition.csv"):
        (folder / name).unlink()
    run = Run(folder)
    summary = run.summary()
    assert summary["complete"] is False
    assert (summary["rounds"], summary["rounds_asked"]) == (2, 20)
    assert summary["seconds"] is None
    assert summary["clients"] == 4
    assert run.environment == {}
    assert "2 of 20 rounds" in repr(run)
    with pytest.raises(DataError, match=r"model\.safetensors.*fedweight run"):
        run.model()


def test_stopped_before_any_reply(make_run: MakeRun) -> None:
    folder = make_run(rounds=0, asked=3, model=False)
    (folder / "clients.csv").unlink()
    run = Run(folder)
    assert run.summary()["rounds"] == 0
    with pytest.raises(DataError, match=r"clients\.csv is missing"):
        _ = run.weights
    assert run.report().is_file()


def test_rounds_file_with_a_header_only(make_run: MakeRun) -> None:
    folder = make_run()
    for name in ("rounds.csv", "clients.csv"):
        header = (folder / name).read_text().splitlines()[0]
        (folder / name).write_text(header + "\n")
    run = Run(folder)
    assert run.rounds_done == 0
    assert run.weights.empty
    assert run.summary()["test_accuracy"] is None
    assert run.report().is_file()


@pytest.mark.parametrize("name", ["config.toml", "rounds.csv"])
def test_folder_that_is_no_run(make_run: MakeRun, name: str) -> None:
    folder = make_run()
    (folder / name).unlink()
    with pytest.raises(DataError, match=rf"{name} is missing. A run's folder is"):
        Run(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        Run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.toml", "[run", "is not TOML"),
        ("environment.json", "{", "is not JSON"),
        ("environment.json", "[]", "must hold an object, got list"),
        ("rounds.csv", "a,b\n1,2\n", "no column 'round'"),
        ("rounds.csv", "round,ok\nx,2\n", "cannot be read"),
    ],
)
def test_malformed_file_is_named(
    make_run: MakeRun, name: str, content: str, message: str
) -> None:
    folder = make_run()
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        Run(folder).report()


def test_run_is_frozen_and_takes_text(make_run: MakeRun) -> None:
    run = Run(str(make_run()))  # type: ignore[arg-type]
    assert isinstance(run.folder, Path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.folder = Path()  # type: ignore[misc]


def test_class_names_fall_back_to_numbers(make_run: MakeRun) -> None:
    folder = make_run()
    assert Run(folder).class_names == ["class 0", "class 1", "class 2"]
    (folder / "environment.json").unlink()
    assert Run(folder).class_names == ["0", "1", "2"]


def test_notebook_summary(make_run: MakeRun) -> None:
    html = Run(make_run())._repr_html_()
    assert "<svg" in html
    assert "70.0 %" in html
    assert "var(--fw-ink,#1f2933)" in html or "var(--fw-blue,#0b6bb1)" in html


@pytest.mark.parametrize("folder", ["a\0b", "x" * 5000])
def test_a_folder_that_none_can_be_is_an_error_of_ours(folder):
    with pytest.raises(ConfigurationError, match="the folder"):
        Run(folder)
