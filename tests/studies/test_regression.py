"""Runs that predict a number, from a file's column to the tables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedweight import Run, resume, run
from fedweight.core.errors import ConfigurationError, DataError
from fedweight.data import DataSet, Examples
from fedweight.server.loop import ServerState
from fedweight.strategies import STRATEGIES
from fedweight.studies import contribution
from fedweight.studies.check import check_file
from fedweight.studies.configuration import Configuration
from fedweight.studies.runner import prepare

QUICK: dict[str, Any] = {
    "run.rounds": 3,
    "data.name": "csv",
    "data.task": "regression",
    "data.label": "score",
    "data.client": "school",
    "partition.name": "natural",
    "partition.clients": 0,
    "model.name": "softmax",
    "training.epochs": 2,
    "training.learning-rate": 0.05,
    "engine.name": "local",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Scores of 240 pupils in 6 schools, which follow from age and hours."""
    rng = np.random.default_rng(0)
    lines = ["age,hours,sex,school,score"]
    for k in range(240):
        age, hours, sex = rng.normal(12, 2), rng.normal(5, 1), rng.choice(["f", "m"])
        score = 0.5 * (age - 12) + (hours - 5) + 0.3 * rng.normal() + 0.2 * (k % 6) - 1
        lines.append(f"{age:.3f},{hours:.3f},{sex},s{k % 6},{score:.4f}")
    path = tmp_path / "pupils.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def start(file: Path, out: Path, **settings: Any) -> Run:
    given = {key.replace("__", ".").replace("_", "-"): v for key, v in settings.items()}
    return run(
        settings={**QUICK, "data.path": str(file), **given}, out=out, report=False
    )


def test_a_column_of_numbers_is_learnt(file: Path, tmp_path: Path) -> None:
    result = start(file, tmp_path / "run")
    rounds, clients = result.rounds, result.clients
    last = rounds.iloc[-1]
    assert last["test_r2"] > 0.8 > rounds.iloc[0]["test_r2"]
    assert last["test_loss"] == pytest.approx(last["test_rmse"] ** 2, rel=1e-5)
    assert not [c for c in (*rounds, *clients) if "accuracy" in c]
    assert [c for c in rounds if c.startswith("evaluate")] == [
        *("evaluate_loss", "evaluate_rmse", "evaluate_r2")
    ]
    own = clients[clients["round"] == 3]
    assert own["rmse"].notna().all()
    assert {"loss", "rmse", "r2", "train_loss"} <= set(own)
    # All examples together, and not the mean of the clients' roots.
    sizes = own["held_out_examples"].astype(float)
    whole = np.sqrt((sizes * own["rmse"] ** 2).sum() / sizes.sum())
    assert last["evaluate_rmse"] == pytest.approx(whole, rel=1e-12)
    assert last["evaluate_loss"] == pytest.approx(whole**2, rel=1e-5)
    assert result.partition.columns.tolist() == [
        *("client", "name", "train_examples", "held_out_examples")
    ]
    assert result.environment["data"]["task"] == "regression"
    assert not result.warnings


def test_the_federations_r2_is_that_of_all_examples(file: Path, tmp_path: Path) -> None:
    result = start(file, tmp_path / "run")
    components = prepare(Configuration.read(None, {**QUICK, "data.path": str(file)}))
    model = components.make_model()
    model.load_state_dict(result.model())
    parts = [components.data.client(k).held_out for k in range(6)]
    x = torch.from_numpy(np.concatenate([part.x for part in parts]))
    y = np.concatenate([part.y for part in parts]).astype(float)
    with torch.no_grad():
        guess = model(x)[:, 0].double().numpy()
    r2 = 1 - ((y - guess) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    assert result.rounds["evaluate_r2"].iloc[-1] == pytest.approx(r2, rel=1e-5)


@pytest.mark.parametrize(("measure", "best"), [("rmse", "idxmin"), ("r2", "idxmax")])
def test_the_model_with_the_smallest_error_is_kept(
    file: Path, tmp_path: Path, measure: str, best: str
) -> None:
    result = start(
        file,
        tmp_path / "run",
        run__rounds=5,
        run__keep_best=f"evaluate-{measure}",
        run__metrics=[measure],
        training__learning_rate=0.4,  # So long a step that some rounds are worse.
    )
    measured = result.rounds.set_index("round")[f"evaluate_{measure}"].dropna()
    assert result.best_round == getattr(measured, best)()
    columns = [column for column in result.rounds if column.startswith("evaluate")]
    assert columns == ["evaluate_loss", f"evaluate_{measure}"]


def tables(result: Run) -> list[str]:
    names = ("rounds.csv", "clients.csv", "partition.csv")
    return [(result.folder / name).read_text() for name in names]


def test_the_same_bits_on_threads_and_resumed(file: Path, tmp_path: Path) -> None:
    one = start(file, tmp_path / "one")
    several = start(file, tmp_path / "several", engine__threads=3)
    assert tables(one) == tables(several)
    again = run(one.folder / "config.toml", out=tmp_path / "again", report=False)
    assert tables(one) == tables(again)

    def stopping(state: ServerState) -> None:
        if state.round == 2:
            raise KeyboardInterrupt

    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run(
            settings={
                **QUICK,
                "data.path": str(file),
                "run.checkpoint-rounds": 1,
            },
            out=folder,
            report=False,
            callbacks=[stopping],
        )
    assert tables(resume(folder, report=False)) == tables(one)


def test_many_at_once_learn_the_same(file: Path, tmp_path: Path) -> None:
    alone = start(file, tmp_path / "alone", engine__plan="loop")
    at_once = start(file, tmp_path / "at_once", engine__plan="batched-6")
    for column in ("train_loss", "evaluate_rmse", "test_r2"):
        np.testing.assert_allclose(
            alone.rounds[column], at_once.rounds[column], rtol=1e-4
        )


@pytest.mark.parametrize(
    "strategy", sorted(STRATEGIES.entries.keys() - {"fedbuff", "fedasync"})
)
def test_every_strategy_runs_or_says_what_it_needs(
    file: Path, tmp_path: Path, strategy: str
) -> None:
    settings = {"strategy.name": strategy, "run.rounds": 1}
    if strategy in ("feddisco", "fedlaw", "fedce", "fedcollab"):
        needs = "goes by scores" if strategy == "fedce" else "needs examples that have"
        with pytest.raises(ConfigurationError, match=needs):
            start(file, tmp_path / "run", **settings)
        assert not (tmp_path / "run").exists()
    else:
        assert (
            start(file, tmp_path / "run", **settings).rounds["test_rmse"].notna().all()
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"strategy__name": "ida", "strategy__intrac": True},
            "IDA goes by scores",
        ),
        ({"objective__name": "focal"}, "objective 'focal' is for examples that have a"),
        ({"partition__name": "dirichlet"}, "divides examples by their classes"),
        ({"run__keep_best": "evaluate-accuracy"}, "regression has no accuracy"),
        ({"data__classes": ["1", "2"]}, "Leave classes out"),
        ({"data__label": "sex"}, "'sex' has texts such as"),
        ({"data__task": "regresion"}, "Did you mean 'regression'"),
    ],
)
def test_what_does_not_go_with_numbers_is_refused(
    file: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    clients = {"partition__clients": 6} if "partition__name" in settings else {}
    with pytest.raises((ConfigurationError, DataError), match=message):
        start(file, tmp_path / "run", **settings, **clients)
    assert not (tmp_path / "run").exists()


def test_a_strategy_of_flowers_has_the_same_measures(
    file: Path, tmp_path: Path
) -> None:
    ours = start(file, tmp_path / "ours")
    other = start(
        file,
        tmp_path / "other",
        strategy__name="flwr.serverapp.strategy:FedAvg",
    )
    for column in ("evaluate_rmse", "evaluate_r2", "test_rmse"):
        np.testing.assert_allclose(
            other.rounds[column].dropna(), ours.rounds[column].dropna(), rtol=1e-4
        )


@pytest.mark.parametrize("name", ["fedavg", "flwr.serverapp.strategy:FedAvg"])
def test_where_nobody_evaluates_there_are_no_measures(
    file: Path, tmp_path: Path, name: str
) -> None:
    result = start(
        file,
        tmp_path / "run",
        run__rounds=1,
        strategy__name=name,
        strategy__fraction_evaluate=0.0,
    )
    assert result.rounds.filter(like="evaluate").isna().all(axis=None)
    assert result.rounds["test_rmse"].notna().all()
    assert not result.warnings


def test_arrays_with_numbers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 3)).astype(np.float32)
    path = tmp_path / "own.npz"
    np.savez(path, x=x, y=x.sum(1))
    settings = {"data.name": "npz", "data.client": None, "data.label": None}
    given = {k: v for k, v in {**QUICK, **settings}.items() if v is not None}
    given |= {"data.path": str(path), "partition.name": "iid", "partition.clients": 4}
    result = run(settings=given, out=tmp_path / "run", report=False)
    assert result.rounds["test_r2"].iloc[-1] > 0.8


def test_numbers_given_in_python_with_a_proxy_and_a_report(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 3))
    examples = Examples(x, x.sum(1))
    own = DataSet("own", examples.take(slice(80)), examples, task="regression")
    given = {k: v for k, v in QUICK.items() if not k.startswith("data.")}
    given |= {"partition.name": "quantity", "partition.clients": 4, "data.proxy": 0.1}
    result = run(settings=given, dataset=own, out=tmp_path / "run")
    assert result.summary()["test_accuracy"] is None
    assert (result.folder / "report.html").is_file()
    with pytest.raises(DataError, match="regression has no classes, but num_classes"):
        run(
            dataset=DataSet("own", examples, examples, 3, task="regression"),
            settings=given,
            out=tmp_path / "refused",
        )


def test_a_check_says_how_the_numbers_lie(file: Path) -> None:
    found = check_file(file, ["data.task=regression", "data.client=school"])
    assert not found.refused
    assert "classes" not in found.facts
    target = found.facts["target"]
    assert target["from"] < target["mean"] < target["to"]
    assert any("score: numbers from" in line for line in found.lines())
    found = check_file(file, ["data.client=school"])
    assert "set task = 'regression'" in found.refused[0]


def test_what_clients_contribute_has_no_score(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="and regression has none"):
        contribution(settings={**QUICK, "data.path": str(file)}, out=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_real_schools(tmp_path: Path) -> None:
    folder = os.environ.get("FEDWEIGHT_DATA")
    if not folder or not (Path(folder) / "schools").is_dir():
        pytest.skip("FEDWEIGHT_DATA does not name a folder that has schools/ in it")
    path = Path(folder) / "schools" / "egsingle.csv"
    result = start(
        path,
        tmp_path / "run",
        data__label="math",
        data__client="schoolid",
        data__drop=["childid"],
    )
    assert len(result.partition) == 60
    assert result.rounds["test_r2"].iloc[-1] > 0.4
