"""Strategies that bring what their clients minimise, and tell it numbers."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedweight import resume, run
from fedweight.clients.objectives.group_dro import GroupDRO
from fedweight.core.errors import FedweightError
from fedweight.data import DataSet, Examples
from fedweight.studies.result import Run

QUICK: dict[str, Any] = {
    "run.rounds": 4,
    "partition.clients": 4,
    "training.epochs": 1,
    "model.name": "softmax",
    "engine.name": "local",
    "data.proxy": 0.2,
}

METHODS: dict[str, dict[str, Any]] = {
    "groups": {"strategy.name": "global-group-dro", "strategy.group": "site"},
    "clients": {"strategy.name": "global-group-dro"},
    "kernels": {
        "strategy.name": "agnostic-fair",
        "strategy.group": "site",
        "strategy.bases": 8,
        "strategy.tolerance": 100.0,
        "strategy.penalty": 0.2,
    },
}

every_method = pytest.mark.parametrize("method", METHODS)


def points(shift: float = 1.5) -> DataSet:
    """Points of two classes, which lie elsewhere for the few of a second group."""
    rng = np.random.default_rng(0)
    y, group = np.arange(500) % 2, (np.arange(500) % 7 == 0).astype(np.int64)
    x = rng.normal(size=(500, 4)) + np.eye(4)[(y + group) % 3] * shift
    parts = [
        Examples(x[rows].astype(np.float32), y[rows], {"site": group[rows]})
        for rows in (slice(400), slice(400, 500))
    ]
    return DataSet("points", *parts, 2, attribute_names={"site": ("a", "b")})


def ran(folder: Path, method: str, **more: Any) -> Run:
    settings = {**QUICK, **METHODS[method], **more}
    return run(settings=settings, dataset=points(), out=folder, report=False)


@every_method
def test_all_at_once_is_as_one_after_another(tmp_path: Path, method: str) -> None:
    settings = {"training.optimizer": "adam", "training.learning-rate": 0.02}
    one, other = (
        ran(tmp_path / plan, method, **settings, **{"engine.plan": plan})
        for plan in ("loop", "batched-3")
    )
    assert one.rounds["ok"].tolist()[1:] == [4] * 4
    assert "one after another" not in " ".join(one.warnings + other.warnings)
    for name in ("test_loss", "train_loss"):
        np.testing.assert_allclose(one.rounds[name], other.rounds[name], rtol=1e-4)
    np.testing.assert_allclose(one.weights, other.weights, rtol=1e-4)


@every_method
def test_it_resumes_with_the_same_bits(tmp_path: Path, method: str) -> None:
    def breaks(state: Any) -> None:
        if state.round == 3:
            raise RuntimeError("the power is gone")

    more = {"data.name": f"{__name__}:points", "run.checkpoint-rounds": 2}
    settings = {**QUICK, **METHODS[method], **more}
    whole = run(settings=settings, out=tmp_path / "whole", report=False)
    with pytest.raises(RuntimeError, match="the power is gone"):
        run(settings=settings, out=tmp_path / "part", report=False, callbacks=[breaks])
    assert resume(tmp_path / "part", report=False).complete
    assert filecmp.cmp(
        whole.folder / "model.safetensors", tmp_path / "part/model.safetensors", False
    )


@pytest.mark.usefixtures("ready_ray")
@pytest.mark.ray
@every_method
def test_on_ray_it_has_the_bits_of_the_local_engine(
    tmp_path: Path, method: str
) -> None:
    local = ran(tmp_path / "local", method)
    ray = ran(tmp_path / "ray", method, **{"engine.name": "ray", "engine.workers": 2})
    for name in ("model.safetensors", "rounds.csv"):
        assert filecmp.cmp(local.folder / name, ray.folder / name, False)


def test_another_objective_is_weighed_too(tmp_path: Path) -> None:
    found = {}
    for name in ("balanced-softmax", "plain"):
        made = ran(tmp_path / name, "groups", **{"objective.name": name})
        assert made.rounds["ok"].tolist()[1:] == [4] * 4
        found[name] = made.rounds["test_loss"].iloc[-1]
    assert found["plain"] != found["balanced-softmax"]


def test_the_worst_groups_loss_falls(tmp_path: Path) -> None:
    """Beyond what counting both groups alike gives."""
    found = {}
    for step in (0.0, 1.0):
        more = {"run.rounds": 20, "partition.name": "iid", "strategy.step": step}
        made = ran(tmp_path / str(step), "groups", **more)
        last = made.rounds[["group_0_loss", "group_1_loss"]].tail(5).mean()
        found[step] = last.max()
        assert last.idxmax() == "group_1_loss" or step
    assert found[1.0] < found[0.0] - 0.01


PERSONAL: dict[str, dict[str, Any]] = {
    **METHODS,
    "guidance": {"strategy.name": "fedlex", "strategy.explore-epochs": 1},
}


@pytest.mark.parametrize("method", PERSONAL)
def test_personal_models_are_trained_for_the_client_itself(
    tmp_path: Path, method: str
) -> None:
    """Alone, what a client trains does not depend on what the others' model is for."""
    alone = {"personal.name": "ditto", "personal.weight": 0.0}
    found, expected = (
        run(
            settings={**QUICK, **alone, **settings},
            dataset=points(),
            out=tmp_path / str(settings["strategy.name"]),
            report=False,
        )
        for settings in (PERSONAL[method], {"strategy.name": "fedavg"})
    )
    other = expected.personal_models()
    for client, model in found.personal_models().items():
        for name, values in model.items():
            np.testing.assert_array_equal(values, other[client][name])
    assert not filecmp.cmp(
        *(one.folder / "model.safetensors" for one in (found, expected)), False
    )


@pytest.mark.parametrize("method", [*PERSONAL, "pruned"])
def test_all_clients_have_a_personal_model_in_the_end(
    tmp_path: Path, method: str
) -> None:
    """When nothing is told any more."""
    pruned = {"strategy.name": "autoflip"}
    settings = {
        **QUICK,
        **PERSONAL.get(method, pruned),
        "personal.name": "fine-tuned",
        "personal.when": "end",
    }
    made = run(settings=settings, dataset=points(), out=tmp_path, report=False)
    assert made.personal["status"].tolist() == ["evaluated"] * 4
    assert made.personal["personal_loss"].notna().all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"strategy.group": "seks"},
            "strategy.group: data 'points' have no attribute 'seks'.*They have site",
        ),
        ({"objective": GroupDRO("site")}, "cannot be weighed besides"),
    ],
)
def test_what_cannot_be_is_refused_before_the_run(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(FedweightError, match=said):
        ran(tmp_path, "groups", **settings)
    assert not (tmp_path / "rounds.csv").exists()
