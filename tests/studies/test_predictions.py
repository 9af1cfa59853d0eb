"""What a run's model predicts, against what the run has measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedweight import run
from fedweight.core.errors import ConfigurationError, DataError
from fedweight.data import DataSet, Examples, federate, load

QUICK: dict[str, Any] = {
    "run.rounds": 2,
    "partition.clients": 4,
    "training.epochs": 1,
    "model.name": "softmax",
    "engine.name": "local",
}


def test_predictions_say_what_the_tables_say(tmp_path: Path) -> None:
    result = run(settings=QUICK, out=tmp_path / "run", report=False)
    found = result.predictions()
    last = result.clients[result.clients["round"] == 2].set_index("client")
    right = (found["target"] == found["prediction"]).groupby(found["client"]).mean()
    assert right.to_dict() == pytest.approx(last["accuracy"].to_dict())
    scores = found[[f"score_{k}" for k in range(10)]].to_numpy()
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)
    assert (scores.argmax(1) == found["prediction"]).all()
    assert found[found["client"] == 2]["row"].tolist() == list(
        range(int(last["held_out_examples"][2]))
    )
    test = result.predictions("test")
    accuracy = (test["target"] == test["prediction"]).mean()
    assert accuracy == pytest.approx(result.rounds["test_accuracy"].iloc[-1])
    assert test["client"].isna().all()
    some = result.predictions("train", [1])
    assert len(some) == result.partition["train_examples"][1]
    other = {name: 0 * value for name, value in result.model().items()}
    assert (result.predictions(model=other)["prediction"] == 0).all()
    with pytest.raises(DataError, match="is not as the run's own model has it"):
        result.predictions(model={})
    for odd in ([99], [-1], ["a"], 3):
        with pytest.raises(ConfigurationError, match="clients must be a list"):
            result.predictions(clients=odd)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="Did you mean 'held-out'"):
        result.predictions("held_out")  # type: ignore[arg-type]


def test_predictions_of_numbers_given_in_python(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    examples = Examples(x, x.sum(1))
    own = DataSet("own", examples.take(slice(80)), examples, task="regression")
    settings = {**QUICK, "partition.name": "iid", "training.learning-rate": 0.01}
    result = run(settings=settings, dataset=own, out=tmp_path / "run", report=False)
    with pytest.raises(ConfigurationError, match="its data were given in Python"):
        result.predictions()
    found = result.predictions(dataset=own)
    error = np.sqrt(((found["target"] - found["prediction"]) ** 2).mean())
    assert error == pytest.approx(result.rounds["evaluate_rmse"].iloc[-1], rel=1e-5)
    assert found.columns.tolist() == ["client", "row", "target", "prediction"]


def test_predictions_name_the_clients_that_have_names(tmp_path: Path) -> None:
    path = tmp_path / "sites.csv"
    rows = [f"{k % 7},{k % 2},{'bonn' if k % 3 else 'ulm'}" for k in range(60)]
    path.write_text("\n".join(["x,y,site", *rows]) + "\n")
    data = {"data.name": "csv", "data.path": str(path), "data.label": "y"}
    natural = {"partition.name": "natural", "partition.clients": 0}
    settings = {**QUICK, **data, "data.client": "site", **natural}
    result = run(settings=settings, out=tmp_path / "run", report=False)
    found = result.predictions()
    names = dict(zip(found["client"], found["name"], strict=True))
    assert names == {0: "bonn", 1: "ulm"}
    ulm = result.predictions(clients=["ulm"])
    pd.testing.assert_frame_equal(ulm, result.predictions(clients=[1]))
    assert ulm["name"].unique().tolist() == ["ulm"]
    with pytest.raises(ConfigurationError, match=r"got 'ulmm'. Did you mean 'ulm'\?"):
        result.predictions(clients=["ulmm"])
    said = r"numbers from 0 to 1 or names, got 'ulm'. Of one client give \['ulm'\]"
    with pytest.raises(ConfigurationError, match=said):
        result.predictions(clients="ulm")


@pytest.mark.parametrize("partition", ["natural", "iid"])
def test_a_prediction_names_its_row_of_the_file(tmp_path: Path, partition: str) -> None:
    """Also where rows are dropped, and the server keeps some."""
    path = tmp_path / "own.csv"
    lines = [f"{'' if k % 9 == 4 else k},{k % 2},{'ab'[k % 3 == 0]}" for k in range(90)]
    path.write_text("\n".join(["x,y,site", *lines]) + "\n")
    settings = {
        **QUICK,
        "data": {"name": "csv", "path": str(path), "label": "y", "client": "site"},
        "partition": {"name": partition, "clients": 2},
    }
    settings["data"] |= {"drop-missing": True, "standardise": False, "proxy": 0.1}
    result = run(settings=settings, out=tmp_path / "run", report=False)
    frame, seen = pd.read_csv(path), []
    for part in ("train", "held-out", "test"):
        found = result.predictions(part)
        rows = frame.iloc[found["file_row"]]
        assert rows["y"].tolist() == found["target"].tolist()
        if partition == "natural" and part != "test":
            assert rows["site"].tolist() == found["name"].tolist()
        seen += found["file_row"].tolist()
    data = result.data()
    x = [data.client(k).train.x[:, 0] for k in range(2)] + [data.test.x[:, 0]]
    rows = [data.file_rows(k)[0] for k in range(2)] + [data.test_file_rows]
    assert np.concatenate(x).tolist() == frame["x"].iloc[np.concatenate(rows)].tolist()
    assert len(set(seen)) == len(seen) == 80 - len(data.proxy)


def test_rows_of_arrays_and_of_a_test_file(tmp_path: Path) -> None:
    x = np.arange(60, dtype=np.float32)[:, None]
    np.savez(tmp_path / "own.npz", x=x, y=np.arange(60) % 2)
    data = federate(load("npz", tmp_path / "own.npz"), "iid", num_clients=3)
    for k in range(3):
        held_out = data.client(k).held_out
        assert held_out.x[:, 0].tolist() == data.file_rows(k)[1].tolist()
    assert data.test.x[:, 0].tolist() == data.test_file_rows.tolist()
    for name, n in (("train", 40), ("test", 10)):
        lines = [f"{k},{k % 2}" for k in range(n)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["x,y", *lines]) + "\n")
    test = str(tmp_path / "test.csv")
    own = load("csv", tmp_path / "train.csv", test=test, standardise=False)
    lazy = federate(own, "dirichlet-sampled", 3, examples_per_client=20)
    train, _ = lazy.file_rows(1)
    assert lazy.client(1).train.x[:, 0].tolist() == train.tolist()
    assert lazy.test_file_rows.tolist() == list(range(10))
    assert federate(load("digits"), "iid", num_clients=2).file_rows(0) is None
