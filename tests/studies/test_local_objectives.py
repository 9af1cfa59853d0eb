"""Local objectives in a run: what they want to know, and what they keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedweight import run
from fedweight.clients.objectives import OBJECTIVES, noisy_labels
from fedweight.clients.objectives.group_dro import GroupDRO
from fedweight.clients.objectives.noisy_labels import DWS, RENT
from fedweight.clients.objectives.plain import Plain
from fedweight.core.errors import ConfigurationError, FedweightError
from fedweight.data import DataSet, Examples
from fedweight.studies.result import Run

QUICK: dict[str, Any] = {
    "run.rounds": 3,
    "partition.clients": 4,
    "training.epochs": 1,
    "model.name": "softmax",
    "engine.name": "local",
}


def points() -> DataSet:
    """Points in two groups, of which the second one's classes lie elsewhere."""
    rng = np.random.default_rng(0)
    y, group = np.arange(400) % 3, (np.arange(400) % 5 == 0).astype(np.int64)
    x = rng.normal(size=(400, 4)) + np.eye(4)[(y + group) % 3] * 2
    parts = [
        Examples(x[rows].astype(np.float32), y[rows], {"site": group[rows]})
        for rows in (slice(300), slice(300, 400))
    ]
    return DataSet("points", *parts, 3, attribute_names={"site": ("a", "b")})


def start(folder: Path, objective: Any) -> Run:
    return run(
        settings={**QUICK, "objective": objective},
        dataset=points(),
        out=folder,
        report=False,
    )


def takes_classes(name: str) -> bool:
    tasks = OBJECTIVES.resolve(name).tasks
    return not tasks or "classification" in tasks


@pytest.mark.parametrize("name", [*filter(takes_classes, OBJECTIVES.entries)])
@pytest.mark.parametrize("plan", ["loop", "batched-2"])
def test_every_objective_runs_on_clients(tmp_path: Path, name: str, plan: str) -> None:
    own = {"objective.name": name}
    if name in ("group-dro", "fair-error-bound"):
        own["objective.group"] = "site"
    settings = {**QUICK, **own, "engine.plan": plan}
    made = run(settings=settings, dataset=points(), out=tmp_path, report=False)
    assert made.rounds["ok"].tolist()[1:] == [4] * 3
    assert made.rounds["test_accuracy"].iloc[-1] > 0.4


def test_objects_are_taken_with_what_they_want(tmp_path: Path) -> None:
    made = start(tmp_path, GroupDRO("site"))
    assert made.rounds["ok"].tolist()[1:] == [4] * 3


def test_what_clients_carry_changes_the_later_rounds(tmp_path: Path) -> None:
    losses = [
        start(tmp_path / f"{eta}", GroupDRO("site", eta)).rounds["test_loss"].tolist()
        for eta in (0.0, 1.0)
    ]
    assert losses[0][0] == losses[1][0]
    assert losses[0][1:] != losses[1][1:]


def test_what_clients_estimate_on_the_way_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    estimate = noisy_labels.transition_matrix

    def counted(likely: Any, labels: Any) -> Any:
        asked.append(len(labels))
        return estimate(likely, labels)

    monkeypatch.setattr(noisy_labels, "transition_matrix", counted)
    losses = []
    for plan in ("loop", "batched-2"):
        asked.clear()
        given = {**QUICK, "run.rounds": 4, "objective": RENT(start=2)}
        given["partition.name"] = "iid"
        made = run(
            settings={**given, "engine.plan": plan, "engine.threads": 1},
            dataset=points(),
            out=tmp_path / plan,
            report=False,
        )
        # Once of each client's 60 examples; a trial of the model has fewer.
        assert sum(n > 40 for n in asked) == 4
        losses.append(made.rounds["test_loss"].tolist())
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.usefixtures("ready_ray")
@pytest.mark.parametrize("strategy", ["fedavg", "afl"])
@pytest.mark.parametrize(
    "engine", ["local", pytest.param("ray", marks=pytest.mark.ray)]
)
@pytest.mark.parametrize("goal", [RENT, DWS])
def test_what_clients_estimate_together_is_told_to_all(
    tmp_path: Path, goal: Any, engine: str, strategy: str
) -> None:
    losses = {}
    more = {"engine.name": engine, **({"engine.workers": 2} if engine == "ray" else {})}
    for name, own in {
        "plain": Plain(),
        "pooled": goal(start=3, estimate="pooled"),
        "own": goal(start=3),
    }.items():
        made = run(
            settings={
                **QUICK,
                **more,
                "run.rounds": 5,
                "objective": own,
                "strategy.name": strategy,
            },
            dataset=points(),
            out=tmp_path / name,
            report=False,
        )
        assert made.rounds["ok"].tolist()[1:] == [4] * 5
        losses[name] = made.rounds["test_loss"].tolist()
    # Warm-up is the cross-entropy; then all clients have one matrix.
    assert losses["pooled"][:3] == pytest.approx(losses["plain"][:3], rel=1e-6)
    assert losses["pooled"][3] != pytest.approx(losses["plain"][3], rel=1e-6)
    assert losses["pooled"][3] != pytest.approx(losses["own"][3], rel=1e-6)


def test_a_strategy_that_pools_nothing_is_refused(tmp_path: Path) -> None:
    settings = {
        **QUICK,
        "objective.name": "rent",
        "objective.estimate": "pooled",
        "strategy.name": "flwr.serverapp.strategy:FedAvg",
    }
    with pytest.raises(ConfigurationError, match="which FedAvg does not do"):
        run(settings=settings, dataset=points(), out=tmp_path / "run", report=False)


@pytest.mark.parametrize("group", ["", "sight"])
def test_a_group_that_the_data_do_not_have_is_refused(
    tmp_path: Path, group: str
) -> None:
    with pytest.raises(FedweightError, match=r"objective.group.*site"):
        start(tmp_path / "run", GroupDRO(group))
    assert not (tmp_path / "run").exists()


def test_a_strategy_that_tells_no_totals_is_refused(tmp_path: Path) -> None:
    settings = {
        **QUICK,
        "objective.name": "balanced-softmax",
        "strategy.name": "flwr.serverapp.strategy:FedAvg",
    }
    with pytest.raises(ConfigurationError, match="FedAvg does not tell them"):
        run(settings=settings, dataset=points(), out=tmp_path / "run", report=False)


def test_totals_are_told_to_all(tmp_path: Path) -> None:
    """With equal classes everywhere it is the cross-entropy; with others it is not."""
    own = {"partition.name": "iid", "training.epochs": 1}
    plain, balanced = (
        run(
            settings={**QUICK, **own, "objective.name": name},
            dataset=points(),
            out=tmp_path / name,
            report=False,
        ).rounds["test_loss"]
        for name in ("plain", "balanced-softmax")
    )
    np.testing.assert_allclose(plain, balanced, rtol=0.05)
