"""Mistakes in an objective of one's own are told before the first round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedweight import run
from fedweight.core.errors import ConfigurationError
from fedweight.studies.check import check_file

WRONG = """
import torch
import torch.nn.functional as F
from fedweight.clients import Around, Loss, Objective
from fedweight.clients.objectives import SAM
from fedweight.clients.personal import Personal
from fedweight.strategies import FedAvg


class Good(Objective):
    def example_losses(self, outputs, batch, facts):
        return F.cross_entropy(outputs, batch.y, reduction="none")

class Mean(Objective):
    def example_losses(self, outputs, batch, facts):
        return F.cross_entropy(outputs, batch.y)

class Shape(Objective):
    def batch_loss(self, outputs, batch, facts):
        return F.cross_entropy(outputs, batch.y, reduction="none")

class Wants(Objective):
    wants = frozenset({"class-count"})
    def example_losses(self, outputs, batch, facts):
        return F.cross_entropy(outputs, batch.y, reduction="none")

class WantsText(Wants):
    wants = "class-counts"

class Hears(Good):
    hears = "lambda"

class Untold(Good):
    hears = ("lambda",)

class Telling(FedAvg):
    def tell(self, selection):
        return {"lamda": 0.5}

class Tasks(Good):
    tasks = ("clasification",)

class Pools(Good):
    pools = ("sums",)

class Unmeasured(Good):
    pools = {"transition-sum": 1}

class Features(Objective):
    def loss(self, model, batch, facts):
        outputs = model(batch.x)
        losses = F.cross_entropy(outputs, batch.y, reduction="none")
        return Loss(batch.mean(losses), outputs.argmax(1))

class Wide(Features):
    def loss(self, model, batch, facts):
        return super().loss(model, batch, facts)._replace(outputs=torch.ones(4, 30))

class Listed(Good):
    def begin(self, facts):
        return [torch.ones(2)]

class Ends(Good):
    def example_losses(self, outputs, batch, facts):
        raise SystemExit("no licence")

class Unsaid(Objective):
    def example_losses(self, outputs, batch, facts):
        return outputs[:, 0] * facts.class_counts.sum()

class Fails(Objective):
    def example_losses(self, outputs, batch, facts):
        return outputs @ torch.ones(7)

class Inside(SAM):
    def __init__(self):
        super().__init__(0.1, Fails())

class Nothing(Wants):
    wants = frozenset()
    def trains(self, name):
        return name.startswith("head")

class Kept(Nothing):
    per_example = {"loss": "low"}

class Carried(Objective):
    def loss(self, model, batch, facts):
        outputs = model(batch.x)
        return Loss(batch.mean(outputs[:, 0]), outputs, {"mean": outputs.mean()})

class Tuned(Personal):
    def objective(self, local):
        return Fails()

class OneHot(Objective):
    def example_losses(self, outputs, batch, facts):
        return -(F.one_hot(batch.y, 10) * outputs.log_softmax(1)).sum(1)

class Penalty(Good):
    def penalty_gradient(self, parameters, facts):
        return 0.1 * (parameters - facts.received).square().sum()

class Clipped(Good):
    def after_step(self, parameters, facts):
        return parameters.clamp(-1, 1).mean()

class Weighed(Good):
    def batch_loss(self, outputs, batch, facts):
        return batch.mean(self.example_losses(outputs, batch, facts), outputs[:, :1])

class Moved(Good):
    def example_losses(self, outputs, batch, facts):
        facts.received.mul_(0.5)
        return super().example_losses(outputs, batch, facts)

class Counted(Good):
    wants = frozenset({"class-counts"})
    def example_losses(self, outputs, batch, facts):
        counts = facts.class_counts
        counts += 1
        return super().example_losses(outputs + counts.log(), batch, facts)
"""
SAID = {
    "Mean": r"objective Mean: an objective must give one loss for each of 4 "
    r"examples.*got shape \[\]",
    "Shape": r"objective Shape: its loss has shape \[4\]. Return one number",
    "Wants": r"objective Wants: wants has 'class-count', which nobody tells. Did you "
    "mean 'class-counts'",
    "WantsText": r"objective WantsText: wants must be a tuple of names, got "
    r"'class-counts'. Write wants = \('class-counts',\)",
    "Hears": r"objective Hears: hears must be a tuple of names, got 'lambda'",
    "Untold": r"objective 'wrong_goals:Untold' hears 'lambda' from the strategy, and "
    r"FedAvg tells clients nothing. Choose the strategy that it belongs to, or another",
    "Tasks": r"objective Tasks: tasks has 'clasification', which there is not. Did you "
    "mean 'classification'",
    "Pools": r"objective Pools: pools must be rounds by the names of probes",
    "Unmeasured": r"objective Unmeasured: pools has 'transition-sum', which clients do "
    "not measure. Did you mean 'transition-sums'",
    "Features": r"objective Features: the outputs of its loss have shape \[4\]. Return "
    r"the model's outputs for the batch, \[4, 10\]",
    "Wide": r"objective Wide: the outputs of its loss have shape \[4, 30\]",
    "Listed": r"objective Listed: begin returned list. Return tensors by name",
    "Ends": r"objective Ends: wrong_goals.py, line \d+, .*SystemExit: no licence",
    "Unsaid": r"objective Unsaid: 'class-counts' is known only to one whose 'wants'",
    "Fails": r"objective Fails: wrong_goals.py, line \d+, 'return outputs @ "
    r"torch.ones\(7\)': RuntimeError: ",
    "Inside": r"objective Inside: wrong_goals.py, line \d+, 'return outputs @",
    "Nothing": r"objective Nothing: trains\(\) is False for every parameter .* "
    "layers.0.weight",
    "Kept": r"objective Kept: per_example must be first values, numbers by name",
    "Penalty": r"objective Penalty: penalty_gradient returned shape \[\], not a tensor "
    r"of the parameters' shape \[9610\]",
    "Clipped": r"objective Clipped: after_step returned shape \[\]",
    "Weighed": r"objective Weighed: batch.mean takes one weight for each of 4 examples"
    ", "
    r"shape \[4\], got shape \[4, 1\]",
    "Moved": r"objective Moved: it changes in place what facts tells",
    "Counted": r"objective Counted: it changes in place what facts tells",
    "Carried": r"objective Carried: what it carries has no 'mean' at the beginning",
}


@pytest.fixture(autouse=True)
def goals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong_goals.py").write_text(WRONG)
    monkeypatch.syspath_prepend(tmp_path)


def settings_of(name: str) -> dict[str, Any]:
    return {"objective.name": f"wrong_goals:{name}", "run.rounds": 1}


@pytest.mark.parametrize("name", SAID)
def test_a_mistake_is_one_line_and_nothing_is_written(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigurationError, match=SAID[name]) as caught:
        run(settings=settings_of(name), out=tmp_path / "run", report=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_flowers_own_strategies_tell_no_objective_anything(tmp_path: Path) -> None:
    settings = settings_of("Untold")
    settings["strategy.name"] = "flwr.serverapp.strategy:FedMedian"
    with pytest.raises(ConfigurationError, match="FedMedian tells clients nothing"):
        run(settings=settings, out=tmp_path / "run", report=False)


def test_what_is_told_by_another_name_ends_the_run_at_once(tmp_path: Path) -> None:
    said = (
        r"Telling.tell gives no 'lambda', which the clients' objective hears. Did you "
        "mean 'lamda'"
    )
    settings = settings_of("Untold") | {"strategy.name": "wrong_goals:Telling"}
    with pytest.raises(ConfigurationError, match=said):
        run(settings=settings, out=tmp_path / "run", report=False)


def test_so_it_is_in_a_personal_method(tmp_path: Path) -> None:
    settings = {"personal.name": "wrong_goals:Tuned", "run.rounds": 1}
    with pytest.raises(ConfigurationError, match=r"objective Fails: wrong_goals.py"):
        run(settings=settings, out=tmp_path / "run", report=False)


def checked(tmp_path: Path, name: str) -> Any:
    file = tmp_path / "one.toml"
    file.write_text(f'[objective]\nname = "wrong_goals:{name}"\n')
    return check_file(file)


def test_a_check_says_what_cannot_be_batched_and_what_to_write(tmp_path: Path) -> None:
    found = checked(tmp_path, "OneHot")
    assert not found.refused
    [note] = [note for note in found.notes if "OneHot" in note]
    assert "one client after another" in note
    assert "F.one_hot(batch.y, 10)" in note
    assert "write fedweight.clients.batchable.one_hot" in note
    assert not [n for n in checked(tmp_path, "Good").notes if "objective" in n]
    [refused] = checked(tmp_path, "Mean").refused
    assert "one loss for each" in refused


def test_what_is_wrong_with_the_model_is_not_the_objective(tmp_path: Path) -> None:
    (tmp_path / "wrong_model.py").write_text(
        """
from torch import nn

class Stubborn(nn.Linear):
    def __init__(self, input_shape, num_classes):
        super().__init__(64, num_classes)

    def forward(self, x):
        if self.training:
            raise ValueError("not now")
        return super().forward(x.flatten(1))
"""
    )
    settings = settings_of("Good") | {"model.name": "wrong_model:Stubborn"}
    found = run(settings=settings, out=tmp_path / "run", report=False)
    assert found.clients["reason"].str.contains("not now").any()


def test_what_it_wants_may_be_any_collection_of_names(tmp_path: Path) -> None:
    (tmp_path / "wanting.py").write_text(
        """
from fedweight.clients.objectives import SAM
from wrong_goals import Good

class Balanced(Good):
    wants = ("class-counts",)
    def example_losses(self, outputs, batch, facts):
        outputs = outputs + (facts.class_counts + 1).log()
        return super().example_losses(outputs, batch, facts)

class Frozen(Balanced):
    wants = frozenset({"class-counts"})

class Listed(Balanced):
    wants = ["class-counts"]
"""
    )
    made = {}
    for name in ("Balanced", "Frozen", "Listed", "Inner", "InnerFrozen"):
        objective: dict[str, Any] = {"name": f"wanting:{name}"}
        if name.startswith("Inner"):
            inner = name.removeprefix("Inner") or "Balanced"
            objective = {"name": "sam", "inner": f"wanting:{inner}"}
        settings = {"objective": objective, "run.rounds": 1, "partition.clients": 3}
        found = run(settings=settings, out=tmp_path / name, report=False)
        made[name] = (found.folder / "model.safetensors").read_bytes()
    assert made["Balanced"] == made["Frozen"] == made["Listed"]
    assert made["Inner"] == made["InnerFrozen"] != made["Balanced"]
