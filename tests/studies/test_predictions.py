"""What a run's model predicts, against what the run has measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedweight import run
from fedweight.core.errors import ConfigurationError, DataError
from fedweight.data import DataSet, Examples

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
