"""Runs that find shapes in images, from drawn sites to the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedweight import Run, resume, run
from fedweight.core.errors import ConfigurationError, DataError
from fedweight.data import DataSet, Examples, load
from fedweight.server.loop import ServerState
from fedweight.studies import contribution
from fedweight.studies.configuration import Configuration
from fedweight.studies.runner import prepare

ROOT = Path(__file__).parents[2]

QUICK: dict[str, Any] = {
    "run.rounds": 3,
    "data.name": "shapes",
    "data.images": 90,
    "data.test-images": 20,
    "data.size": 16,
    "data.sites": 3,
    "partition.name": "natural",
    "partition.clients": 0,
    "model.name": "unet",
    "model.width": 4,
    "training.epochs": 2,
    "training.batch-size": 8,
    "training.optimizer": "adam",
    "training.learning-rate": 0.02,
    "engine.name": "local",
}


def start(out: Path, report: bool = False, **settings: Any) -> Run:
    given = {key.replace("__", ".").replace("_", "-"): v for key, v in settings.items()}
    settings = {**QUICK, **given}
    if settings["training.optimizer"] != "adam":
        settings["training.learning-rate"] = 0.05
    return run(settings=settings, out=out, report=report)


def test_shapes_are_learnt(tmp_path: Path) -> None:
    result = start(
        tmp_path / "run",
        report=True,
        run__rounds=8,
        run__keep_best="evaluate-dice",
        objective__name="dice",
        training__epochs=4,
        training__learning_rate=0.03,
        strategy__name="fedce",
        data__heterogeneity=0.0,
    )
    rounds, clients = result.rounds, result.clients
    last = rounds.iloc[-1]
    assert last["test_dice"] > rounds.iloc[0]["test_dice"] + 0.1
    assert last["test_loss"] < rounds.iloc[0]["test_loss"]
    assert [c for c in rounds if c.startswith("evaluate")] == [
        *("evaluate_loss", "evaluate_accuracy", "evaluate_dice")
    ]
    own = clients[clients["round"] == 8]
    assert own[["loss", "accuracy", "dice", "minus_error"]].notna().all(axis=None)
    assert own["minus_error"].between(0, 1).all()
    assert result.partition["name"].tolist() == ["site-0", "site-1", "site-2"]
    # How many images have a class.
    assert (result.partition["label_0"] == result.partition["train_examples"]).all()
    assert (result.partition["label_3"] < result.partition["train_examples"]).all()
    best = int(rounds.set_index("round")["evaluate_dice"].idxmax())
    assert result.best_round == best
    assert result.summary()["test_dice"] == pytest.approx(last["test_dice"])
    assert result.environment["data"]["largest_test_class"] > 0.5
    assert (result.folder / "report.html").is_file()


def test_the_federations_dice_is_that_of_all_pixels(tmp_path: Path) -> None:
    result = start(tmp_path / "run", run__metrics=["dice", "macro-f1"])
    components = prepare(Configuration.read(None, QUICK))
    model = components.make_model()
    model.load_state_dict(result.model())
    parts = [components.data.client(k).held_out for k in range(3)]
    y = np.concatenate([part.y for part in parts])
    with torch.no_grad():
        x = torch.from_numpy(np.concatenate([part.x for part in parts]))
        guess = model(x).argmax(1).numpy()
    dice = []
    for c in range(4):
        sizes = (guess == c).sum() + (y == c).sum()
        if sizes:
            dice.append(2 * ((guess == c) & (y == c)).sum() / sizes)
    last = result.rounds.iloc[-1]
    assert last["evaluate_dice"] == pytest.approx(np.mean(dice[1:]), abs=1e-3)
    assert last["evaluate_macro_f1"] == pytest.approx(np.mean(dice), abs=1e-3)
    assert last["evaluate_accuracy"] == pytest.approx((guess == y).mean(), abs=1e-3)
    frame = result.predictions(part="test")
    assert frame["accuracy"].mean() == pytest.approx(last["test_accuracy"], abs=1e-6)


def tables(result: Run) -> list[str]:
    names = ("rounds.csv", "clients.csv", "partition.csv")
    return [(result.folder / name).read_text() for name in names]


def test_the_same_bits_on_threads_and_resumed(tmp_path: Path) -> None:
    settings = {"strategy.name": "fedce", "run.keep-best": "evaluate-dice"}
    one = start(tmp_path / "one", **settings)
    several = start(tmp_path / "several", engine__threads=3, **settings)
    assert tables(one) == tables(several)
    again = run(one.folder / "config.toml", out=tmp_path / "again", report=False)
    assert tables(one) == tables(again)

    def stopping(state: ServerState) -> None:
        if state.round == 2:
            raise KeyboardInterrupt

    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run(
            settings={**QUICK, **settings, "run.checkpoint-rounds": 1},
            out=folder,
            report=False,
            callbacks=[stopping],
        )
    resumed = resume(folder, report=False)
    assert tables(resumed) == tables(one)
    assert resumed.best_round == one.best_round


@pytest.mark.usefixtures("ready_ray")
@pytest.mark.ray
def test_the_same_bits_on_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    settings = {"run.rounds": 2, "strategy.name": "fedce"}
    one = start(tmp_path / "one", **settings)
    ray = start(tmp_path / "ray", engine__name="ray", engine__workers=2, **settings)
    assert tables(one) == tables(ray)


@pytest.mark.parametrize("objective", ["plain", "dice", "fair-error-bound"])
def test_many_at_once_learn_the_same(tmp_path: Path, objective: str) -> None:
    settings = {"objective.name": objective, "training.optimizer": "sgd"}
    settings |= {"objective.group": "scanner"} if "fair" in objective else {}
    alone = start(tmp_path / "alone", engine__plan="loop", **settings)
    at_once = start(tmp_path / "at_once", engine__plan="batched-3", **settings)
    for column in ("train_loss", "evaluate_loss", "evaluate_dice", "test_loss"):
        np.testing.assert_allclose(
            alone.rounds[column], at_once.rounds[column], rtol=1e-4, atol=1e-5
        )


def test_a_strategy_of_flowers_stops_by_the_same_measure(tmp_path: Path) -> None:
    settings = {
        "run.rounds": 6,
        "run.stop-after": 1,
        "run.stop-delta": 0.99,
        "run.stop-metric": "evaluate-dice",
        "run.keep-best": "evaluate-dice",
    }
    for name in ("fedavg", "flwr.serverapp.strategy:FedAvg"):
        result = start(tmp_path / name[:4], strategy__name=name, **settings)
        assert "evaluate-dice was" in str(result.stopped)
        assert result.best_round in (1, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy__name": "feddisco"}, "have one for each pixel"),
        ({"objective__name": "focal"}, "'focal' is for examples that have a class"),
        ({"partition__name": "dirichlet"}, "have one for each pixel"),
        ({"model__name": "cnn", "model__width": None}, r"a logit for each class and p"),
        ({"model__depth": 5}, "16 pixels cannot be halved so often"),
        ({"model__groups": 3}, "groups must divide width"),
        ({"run__metrics": ["confusion"]}, "'confusion' is a table of numbers"),
        ({"run__metrics": ["auc"]}, "segmentation has no 'auc'"),
        ({"run__keep_best": "evaluate-macro-f1"}, "does not have 'macro-f1'"),
        ({"run__keep_best": "evaluate-dise"}, "Did you mean 'evaluate-dice'"),
    ],
)
def test_what_does_not_go_with_masks_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    given = {key.replace("__", ".").replace("_", "-"): v for key, v in settings.items()}
    given = {k: v for k, v in {**QUICK, **given}.items() if v is not None}
    if given["partition.name"] == "dirichlet":
        given["partition.clients"] = 3
    with pytest.raises((ConfigurationError, DataError), match=message):
        run(settings=given, out=tmp_path / "run", report=False)
    assert not (tmp_path / "run").exists()


def test_arrays_with_masks(tmp_path: Path) -> None:
    drawn = load("shapes", images=40, test_images=10, size=16)
    path = tmp_path / "own.npz"
    np.savez(path, x=drawn.train.x, y=drawn.train.y.astype(np.uint8))
    own = ("data.images", "data.test-images", "data.size", "data.sites")
    given = {k: v for k, v in QUICK.items() if k not in own}
    given |= {"data.name": "npz", "data.path": str(path), "data.task": "segmentation"}
    given |= {"partition.name": "iid", "partition.clients": 2, "run.rounds": 1}
    result = run(settings=given, out=tmp_path / "run", report=False)
    assert result.rounds["test_dice"].notna().all()


def test_a_client_of_background_only(tmp_path: Path) -> None:
    """Where there is nothing to find, Dice is not defined, and nobody fails."""
    x = np.random.default_rng(0).normal(size=(24, 1, 8, 8)).astype(np.float32)
    y = (x[:, 0] > 1) * np.repeat([0, 1], 12)[:, None, None]
    examples = Examples(x, y)
    own = DataSet(
        "own",
        examples,
        examples,
        2,
        natural_clients=np.repeat([0, 1], 12),
        task="segmentation",
    )
    given = {k: v for k, v in QUICK.items() if not k.startswith("data.")}
    result = run(
        settings={**given, "strategy.name": "fedce"},
        dataset=own,
        out=tmp_path / "run",
        report=False,
    )
    assert (result.rounds["status"].dropna() == "ok").all()
    assert (result.clients["status"] == "ok").all()


def test_clients_contribute_in_dice(tmp_path: Path) -> None:
    quick = {**QUICK, "run.rounds": 1, "data.images": 30, "data.sites": 2}
    found = contribution(settings=quick, out=tmp_path / "c")
    runs = {
        name: Run(tmp_path / "c" / f"clients-{name}").measured("test_dice")
        for name in ("0", "1", "0-1")
    }
    gained = runs["0-1"].iloc[-1] - runs["0-1"].loc[0]
    assert sum(found.values.values()) == pytest.approx(gained)
    quick["run.metrics"] = ["macro-f1"]
    with pytest.raises(ConfigurationError, match=r"in dice. Add it to run.metrics"):
        contribution(settings=quick, out=tmp_path / "c")


def test_the_simulation_file_is_feasible() -> None:
    configuration = Configuration.read(
        ROOT / "simulations" / "shapes.toml", {"data.images": 60, "data.test-images": 6}
    )
    assert prepare(configuration).statistics.extra == ("dice",)
