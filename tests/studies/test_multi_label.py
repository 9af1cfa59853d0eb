"""Runs that name any of several labels, from a file's columns to the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from fedweight import Run, run
from fedweight.core.errors import ConfigurationError, DataError
from fedweight.data import DataSet, Examples
from fedweight.strategies import STRATEGIES
from fedweight.studies.check import check_file
from fedweight.studies.configuration import Configuration
from fedweight.studies.runner import prepare

LABELS = ["cough", "fever", "rash"]
QUICK: dict[str, Any] = {
    "run.rounds": 3,
    "data.name": "csv",
    "data.task": "multi-label",
    "data.label": LABELS,
    "data.client": "clinic",
    "partition.name": "natural",
    "partition.clients": 0,
    "model.name": "softmax",
    "training.epochs": 3,
    "training.learning-rate": 0.5,
    "engine.name": "local",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """300 patients of 5 clinics, whose complaints follow from two numbers."""
    rng = np.random.default_rng(0)
    lines = ["age,heat,sex,clinic,cough,fever,rash"]
    for k in range(300):
        age, heat, sex = rng.normal(40, 10), rng.normal(37, 1), rng.choice(["f", "m"])
        z = rng.normal(size=3) * 0.3
        old, hot = (age - 40) / 10, heat - 37
        flags = (
            int(old + z[0] > 0.3),
            int(hot + z[1] > 0.2),
            int(hot - old + z[2] > 1),
        )
        lines.append(f"{age:.2f},{heat:.2f},{sex},c{k % 5},{','.join(map(str, flags))}")
    path = tmp_path / "patients.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def start(file: Path, out: Path, report: bool = False, **settings: Any) -> Run:
    given = {key.replace("__", ".").replace("_", "-"): v for key, v in settings.items()}
    return run(
        settings={**QUICK, "data.path": str(file), **given}, out=out, report=report
    )


def test_columns_of_0_and_1_are_learnt(file: Path, tmp_path: Path) -> None:
    result = start(
        file,
        tmp_path / "run",
        report=True,
        run__metrics=["auc", "macro-f1"],
        run__keep_best="evaluate-auc",
    )
    rounds, clients = result.rounds, result.clients
    last = rounds.iloc[-1]
    assert last["test_auc"] > 0.9
    assert last["test_macro_f1"] > rounds.iloc[0]["test_macro_f1"]
    assert 0.7 < last["test_accuracy"] <= 1
    assert [c for c in rounds if c.startswith("evaluate")] == [
        *("evaluate_loss", "evaluate_accuracy", "evaluate_macro_f1", "evaluate_auc"),
        "evaluate_auc_error",
    ]
    own = clients[clients["round"] == 3]
    assert own[["loss", "accuracy", "macro_f1", "auc"]].notna().all(axis=None)
    assert result.partition.columns.tolist() == [
        *("client", "name", "train_examples", "held_out_examples"),
        *("label_0", "label_1", "label_2"),
    ]
    assert (result.partition["label_0"] < result.partition["train_examples"]).all()
    assert result.environment["data"]["class_names"] == LABELS
    assert result.best_round in (1, 2, 3)
    assert result.summary()["test_auc"] == pytest.approx(last["test_auc"])
    assert not result.warnings
    assert (result.folder / "report.html").is_file()


def test_what_is_measured_is_what_scikit_learn_says(file: Path, tmp_path: Path) -> None:
    result = start(file, tmp_path / "run", run__metrics="macro-f1, auc")
    frame = result.predictions()
    y = frame[[f"target_{k}" for k in range(3)]].to_numpy()
    guess = frame[[f"prediction_{k}" for k in range(3)]].to_numpy()
    score = frame[[f"score_{k}" for k in range(3)]].to_numpy()
    last = result.rounds.iloc[-1]
    f1 = sk.f1_score(y, guess, average="macro")
    assert last["evaluate_macro_f1"] == pytest.approx(f1)
    assert last["evaluate_accuracy"] == pytest.approx((y == guess).mean())
    area = sk.roc_auc_score(y, score, average="macro")
    assert abs(last["evaluate_auc"] - area) <= last["evaluate_auc_error"] + 1e-9
    loss = np.mean([sk.log_loss(y[:, k], score[:, k]) for k in range(3)])
    assert last["evaluate_loss"] == pytest.approx(loss, rel=1e-5)


def test_many_at_once_learn_the_same(file: Path, tmp_path: Path) -> None:
    alone = start(file, tmp_path / "alone", engine__plan="loop")
    at_once = start(file, tmp_path / "at_once", engine__plan="batched-5")
    for column in ("train_loss", "train_accuracy", "evaluate_macro_f1", "test_loss"):
        np.testing.assert_allclose(
            alone.rounds[column], at_once.rounds[column], rtol=1e-4
        )


NEED_CLASSES = ("feddisco", "fedlaw", "fedcollab")


@pytest.mark.parametrize(
    "strategy", sorted(STRATEGIES.entries.keys() - {"fedbuff", "fedasync"})
)
def test_every_strategy_runs_or_says_what_it_needs(
    file: Path, tmp_path: Path, strategy: str
) -> None:
    settings = {"strategy.name": strategy, "run.rounds": 2}
    if strategy in NEED_CLASSES:
        with pytest.raises(
            ConfigurationError, match=r"needs examples that have a class, .* any number"
        ):
            start(file, tmp_path / "run", **settings)
        assert not (tmp_path / "run").exists()
    else:
        made = start(file, tmp_path / "run", **settings)
        assert made.rounds["test_macro_f1"].notna().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective__name": "focal"}, "'focal' is for examples that have a class"),
        ({"objective__name": "dice"}, "'dice' is for segmentation"),
        ({"partition__name": "dirichlet"}, "have any number of labels each"),
        ({"data__task": "classification"}, "label names 3 columns, and classification"),
        ({"data__classes": ["1", "2"]}, "Leave classes out"),
        ({"data__label": ["cough", "age"]}, "has the value .*and is to say where a la"),
        ({"data__label": ["cough", "sex"]}, "'sex' has the value 'f'"),
        ({"data__label": ["cough", "coff"]}, "coff"),
        ({"data__label": []}, "label names no column"),
        ({"data__task": "segmentation"}, "data.task must be one of"),
        (
            {"run__metrics": ["dice"]},
            r"multi-label has no 'dice'.* It has macro",
        ),
        ({"run__metrics": ["macro_f1"]}, "Did you mean 'macro-f1'"),
        ({"run__keep_best": "evaluate-auc"}, "run.metrics does not have 'auc'. Add it"),
        ({"run__keep_best": "evaluate-dice"}, "multi-label has no dice"),
    ],
)
def test_what_does_not_go_with_labels_is_refused(
    file: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    clients = {"partition__clients": 6} if "partition__name" in settings else {}
    with pytest.raises((ConfigurationError, DataError), match=message):
        start(file, tmp_path / "run", **settings, **clients)
    assert not (tmp_path / "run").exists()


def test_true_and_false_say_whether_a_label_holds(file: Path, tmp_path: Path) -> None:
    text = file.read_text().splitlines()
    rows = [line.rsplit(",", 3) for line in text[1:]]
    words = {"0": "False", "1": "True"}
    other = tmp_path / "words.csv"
    lines = [",".join([row[0], *(words[v] for v in row[1:])]) for row in rows]
    other.write_text("\n".join([text[0], *lines]) + "\n")
    parts = []
    for path in (file, other):
        settings = {**QUICK, "data.path": str(path)}
        parts.append(prepare(Configuration.read(None, settings)).data)
    assert (parts[0].examples.y == parts[1].examples.y).all()
    assert parts[0].examples.y.dtype == np.float32


@pytest.mark.parametrize("given", ["macro-f1, auc", ["macro-f1", "auc"]])
def test_a_text_has_names_between_commas(given: Any) -> None:
    named = Configuration.of({"run": {"metrics": given}})["run"]["metrics"]
    assert named == ["macro-f1", "auc"]
    # As a Flower run config has it, which knows no lists.
    flat = {"run.metrics": "macro-f1,auc", "data.name": "digits"}
    assert Configuration.unflatten(flat)["run"]["metrics"] == named
    assert Configuration.unflatten({"run.metrics": ""})["run"]["metrics"] == []
    with pytest.raises(ConfigurationError, match=r"run.metrics must be a list, each a"):
        Configuration.of({"run": {"metrics": [1]}})


def test_a_check_counts_each_label(file: Path) -> None:
    given = {"data.task": "multi-label", "data.label": LABELS, "data.client": "clinic"}
    found = check_file(file, given)
    assert not found.refused
    assert set(found.facts["labels"]) == set(LABELS)
    assert any(
        line.startswith("3 labels; examples with cough: ") for line in found.lines()
    )
    roles = {c["name"]: c["role"] for c in found.facts["columns"]}
    assert roles["fever"] == roles["rash"] == "label"


def test_arrays_with_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3)).astype(np.float32)
    path = tmp_path / "own.npz"
    np.savez(path, x=x, y=x > 0.2)
    left_out = ("data.label", "data.client")
    given = {k: v for k, v in QUICK.items() if k not in left_out}
    given |= {"data.name": "npz", "data.path": str(path)}
    given |= {"partition.name": "quantity", "partition.clients": 4}
    result = run(settings=given, out=tmp_path / "run", report=False)
    assert result.rounds["test_accuracy"].iloc[-1] > 0.9
    assert check_file(path, ["data.task=multi-label"]).facts["labels"].keys() == {
        *("0", "1", "2")
    }


def test_labels_given_in_python_and_a_strategy_of_flowers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 3))
    examples = Examples(x, (x > 0).astype(int))
    own = DataSet("own", examples, examples, 3, task="multi-label")
    given = {k: v for k, v in QUICK.items() if not k.startswith("data.")}
    given |= {"partition.name": "iid", "partition.clients": 4}
    stops = {"run.stop-after": 1, "run.stop-metric": "evaluate-macro-f1"}
    results = [
        run(
            settings={**given, **stops, "strategy.name": name, "run.rounds": 20},
            dataset=own,
            out=tmp_path / str(k),
            report=False,
        )
        for k, name in enumerate(["fedavg", "flwr.serverapp.strategy:FedAvg"])
    ]
    for result in results:
        assert "evaluate-macro-f1 was" in str(result.stopped)
    for column in ("evaluate_macro_f1", "test_macro_f1", "evaluate_accuracy"):
        np.testing.assert_allclose(
            *(result.rounds[column].dropna() for result in results), rtol=1e-4
        )
