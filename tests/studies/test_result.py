from __future__ import annotations

import csv
import dataclasses
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fedweight.core.errors import ConfigurationError, DataError
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


def named(folder: Path, names: dict[int, str], table: str = "partition.csv") -> Run:
    """Give clients of a made-up run names, in one of its tables."""
    header, *lines = (folder / table).read_text().splitlines()
    place = header.split(",").index("client")
    told = []
    for line in lines:
        cells = next(csv.reader([line]))
        cells.insert(place + 1, names.get(int(cells[place]), ""))
        told.append(cells)
    columns = header.split(",")
    columns.insert(place + 1, "name")
    with (folder / table).open("w", newline="") as out:
        csv.writer(out).writerows([columns, *told])
    return Run(folder)


def test_names_stand_for_numbers_where_there_are_some(make_run: MakeRun) -> None:
    run = Run(make_run())
    assert run.names == {}
    assert run.name_of(2) == "2"
    names = {0: "North", 2: "South", 3: "South", 1: "1"}
    run = named(run.folder, names)
    assert run.names == {0: "North", 2: "South (2)", 3: "South (3)"}
    assert run.name_of(1) == "1"
    assert list(run.weights.columns) == ["North", "1", "South (2)", "South (3)"]
    assert list(run.by_client("accuracy").columns) == list(run.weights.columns)
    assert list(run.by_number("accuracy").columns) == [0, 1, 2, 3]
    assert list(run.weights_by_number.columns) == [0, 1, 2, 3]
    assert run.weights.loc[1, "South (3)"] == pytest.approx(0.4)


def test_names_come_from_the_weight_log_as_well(make_run: MakeRun) -> None:
    folder = make_run()
    (folder / "partition.csv").unlink()
    run = named(folder, {0: "=cmd|'x'!A1", 1: "a" * 5000}, "clients.csv")
    assert run.names[0] == "'=cmd|'x'!A1"
    assert len(run.names[1]) == 60
    assert run.clients["name"].dtype == "str" or run.clients["name"].dtype == object


def test_only_clients_whose_reply_was_used_have_a_weight(make_run: MakeRun) -> None:
    folder = make_run()
    text = (folder / "clients.csv").read_text()
    text = text.replace("1,3,ok,,0.4,40", "1,3,dropped,no examples,0.0,0")
    (folder / "clients.csv").write_text(text)
    weights = Run(folder).weights
    assert math.isnan(weights.loc[1, 3])
    assert weights.loc[1].notna().sum() == 3


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
    assert summary["test_accuracies_in_mean"] == 10


@pytest.mark.parametrize(("rounds", "count"), [(0, 0), (1, 1), (5, 5), (10, 10)])
def test_the_summary_says_of_how_many_rounds_its_mean_is(
    make_run: MakeRun, rounds: int, count: int
) -> None:
    assert Run(make_run(rounds=rounds)).summary()["test_accuracies_in_mean"] == count


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
        ("rounds.csv", "round,ok\n1,2\n1,2\n", "round 1 more than once"),
        ("rounds.csv", "round,ok\n99999999999,2\n", "a round is 99999999999"),
        ("rounds.csv", "round,ok\n99999999999999999999999,2\n", "cannot be read"),
        ("rounds.csv", "round,test_loss\n1,high\n", "cannot be read"),
        ("rounds.csv", "\xff\xfe", "cannot be read"),
        ("rounds.csv", "", "no column 'round'"),
        ("clients.csv", "round,client,status\n1,,ok\n", "cannot be read"),
        ("clients.csv", "round,client\n1,2\n", "no column 'status'"),
        ("partition.csv", "client,label_0\n1,2\n1,3\n", "client 1 more than once"),
        ("partition.csv", "client,label_0\n1,many\n", "cannot be read"),
        ("timings.csv", "round,seconds\n1,now\n", "cannot be read"),
    ],
)
def test_malformed_file_is_named(
    make_run: MakeRun, name: str, content: str, message: str
) -> None:
    folder = make_run()
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=f"{name}.*{message}") as caught:
        Run(folder).report()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("environment.json", '{"data": null}'),
        ("environment.json", '{"data": {"clients": "x", "class_names": 3}}'),
        ("environment.json", '{"data": {"notes": 3, "connected": "x"}}'),
        ("config.toml", "run = 3\nstrategy = [1]\ndata = 'x'\n"),
        ("config.toml", "[run]\nseed = 2026-01-01\nrounds = 'x'\n"),
        ("partition.csv", "client\n"),
        ("partition.csv", "client,train_examples,label_0\n"),
        ("partition.csv", "client,train_examples,label_0\n9,,\n"),
        ("clients.csv", "round,client,status\n1,2,ok\n"),
        ("timings.csv", "round\n1\n"),
    ],
)
def test_what_a_file_lacks_is_left_out(
    make_run: MakeRun, name: str, content: str
) -> None:
    folder = make_run()
    (folder / name).write_text(content)
    run = Run(folder)
    assert run.report().is_file()
    assert run._repr_html_()
    json.dumps(run.summary(), allow_nan=False)


def test_half_of_a_file_is_read_or_named(make_run: MakeRun) -> None:
    """Cut and spoilt files give a report or one line, whatever was hit."""
    draw = random.Random(0)
    whole = make_run()
    names = ["rounds.csv", "clients.csv", "partition.csv", "environment.json"]
    for turn in range(16):
        folder = whole.with_name(f"spoilt-{turn}")
        shutil.copytree(whole, folder)
        path = folder / draw.choice([*names, "config.toml", "timings.csv"])
        content = bytearray(path.read_bytes())
        if turn % 2:
            del content[draw.randrange(len(content)) :]
        for _ in range(3 - 3 * (turn % 2)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
        said = ""
        try:
            run = Run(folder)
            json.dumps(run.summary(), allow_nan=False)
            for frame in (run.clients, run.partition, run.timings, run.weights):
                assert len(frame.columns)
        except DataError as error:
            said = str(error)
        assert not said or path.name in said
        assert "\n" not in said


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
    assert "#0b6bb1" in html  # A notebook's page defines no colours.


def test_a_spoilt_model_is_named(make_run: MakeRun) -> None:
    run = Run(make_run())
    for name in ("model", "models", "best-models"):
        (run.folder / f"{name}.safetensors").write_bytes(b"half of it")
    for read in (run.model, run.models, run.best_models):
        with pytest.raises(DataError, match="safetensors cannot be read"):
            read()
    one = make_run("one")
    shutil.copy(one / "model.safetensors", one / "models.safetensors")
    with pytest.raises(DataError, match="does not begin with the number of one"):
        Run(one).models()


@pytest.mark.parametrize("folder", ["a\0b", "x" * 5000])
def test_a_folder_that_none_can_be_is_an_error_of_ours(folder):
    with pytest.raises(ConfigurationError, match="the folder"):
        Run(folder)


def test_how_a_measure_is_spread_over_the_clients(make_run: MakeRun) -> None:
    result = Run(make_run(clients=4, rounds=2))
    found = result.spread()
    assert found.index.tolist() == result.rounds["round"].tolist()
    assert found["worst10"].tolist() == pytest.approx(
        result.rounds["client_accuracy_worst10"].tolist()
    )
    accuracies = result.by_number("accuracy").loc[2].tolist()
    assert found.loc[2, "jain"] == pytest.approx(
        sum(accuracies) ** 2 / (4 * sum(a * a for a in accuracies))
    )
    assert found.loc[2, "weighted_mean"] == pytest.approx(found.loc[2, "mean"])
    assert not len(result.spread("no_such_column"))
