"""The shipped objectives: their golden values, alone and among other clients."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedweight.clients import TrainingSettings, objective
from fedweight.clients.coding import Coding
from fedweight.clients.objectives import (
    OBJECTIVES,
    Around,
    Batch,
    Facts,
    Loss,
    Objective,
    Plain,
    Proximal,
)
from fedweight.clients.objectives.balanced_softmax import BalancedSoftmax
from fedweight.clients.objectives.base import TOLD
from fedweight.clients.objectives.class_balanced import ClassBalanced
from fedweight.clients.objectives.dynamic import Dynamic
from fedweight.clients.objectives.fair_error_bound import FairErrorBound
from fedweight.clients.objectives.fedlc import FedLC
from fedweight.clients.objectives.focal import Focal
from fedweight.clients.objectives.group_dro import GroupDRO
from fedweight.clients.objectives.ldam import LDAM
from fedweight.clients.objectives.ldr import ALDR, LDR
from fedweight.clients.objectives.noisy_labels import DWS, RENT
from fedweight.clients.objectives.sam import SAM
from fedweight.clients.steps.batched import BatchedTrainer
from fedweight.clients.steps.loop import train
from fedweight.clients.steps.task import Known, Task
from fedweight.clients.task_objectives import for_task
from fedweight.core.errors import ClientError, ConfigurationError
from fedweight.core.module import FlatModule
from fedweight.data import Examples
from fedweight.metrics import task_named
from fedweight.strategies.agnostic_fair import KernelWeighted
from fedweight.strategies.global_group_dro import GroupWeighted

CLASSES, GROUPS = 3, 4
CODING = Coding(CLASSES, {"site": GROUPS})

LOGITS = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
COUNTS = torch.tensor([100.0, 10.0, 1.0], dtype=torch.float64)


def value(goal, y, **known):
    facts = Facts(torch.zeros(0), {k.replace("_", "-"): v for k, v in known.items()})
    batch = Batch(torch.zeros(1, 1), torch.tensor([y]))
    return float(goal.example_losses(LOGITS, batch, facts)[0])


# ------------------------------------------------------------------ golden values


def test_focal_loss_has_its_golden_value():
    assert value(Focal(2.0), 0) == pytest.approx(0.0456778, abs=1e-7)
    assert value(Focal(0.0), 0) == pytest.approx(0.40760596, abs=1e-8)


def test_balanced_softmax_has_its_golden_value():
    own = value(BalancedSoftmax(counts="own"), 2, class_counts=COUNTS)
    assert own == pytest.approx(6.64260209, abs=1e-8)
    assert value(BalancedSoftmax(), 2, class_totals=COUNTS) == own
    plain = value(BalancedSoftmax(tau=0.0), 2, class_totals=COUNTS)
    assert plain == pytest.approx(2.40760596, abs=1e-8)


def test_fedlc_has_its_golden_value():
    assert value(FedLC(), 2, class_counts=COUNTS) == pytest.approx(2.98825645, abs=1e-8)


def test_a_class_that_the_client_has_not_is_left_out_of_fedlcs_softmax():
    counts = torch.tensor([100.0, 0.0, 1.0], dtype=torch.float64)
    with_it = value(FedLC(), 2, class_counts=counts)
    logits = torch.tensor([[2 - 100**-0.25, 0.0 - 1]], dtype=torch.float64)
    expected = F.cross_entropy(logits, torch.tensor([1]))
    assert with_it == pytest.approx(float(expected), abs=1e-12)
    lone = torch.tensor([0.0, 0.0, 5.0], dtype=torch.float64)
    assert value(FedLC(), 2, class_counts=lone) == 0


@pytest.mark.parametrize(
    ("y", "margin", "temperature", "expected"),
    [
        (0, 1.0, 0.1, -0.04054424),
        (0, 1.0, 1.0, -0.23661748),
        (0, 1.0, 10.0, -0.32234866),
        (2, 1.0, 0.1, 2.89014331),
        (2, 1.0, 1.0, 2.25039993),
        (2, 1.0, 10.0, 1.74306624),
        (0, 0.0, 1.0, -0.69100632),
    ],
)
def test_ldr_has_its_golden_values(y, margin, temperature, expected):
    goal = LDR(temperature=temperature, margin=margin, normalise=False)
    assert value(goal, y) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
    ("y", "expected"),
    [
        (0, [0.30231377, 0.14442846, 0.12500551]),
        (2, [1.93105733, 1.46318209, 1.19981098]),
    ],
)
def test_ldr_with_the_authors_logits_has_its_golden_values(y, expected):
    found = [value(LDR(temperature=t, margin=1.0), y) for t in (0.1, 1.0, 10.0)]
    assert found == pytest.approx(expected, abs=3e-7)


def test_ldr_has_the_limits_that_it_tells():
    hinge = value(LDR(temperature=1e-6, margin=1.0, normalise=False), 2)
    assert hinge == pytest.approx(3, abs=1e-4)
    mean = value(LDR(temperature=1e6, margin=1.0, normalise=False), 2)
    assert mean == pytest.approx(5 / 3, abs=1e-4)
    plain = value(LDR(temperature=1.0, margin=0.0, normalise=False), 1)
    cross = float(F.cross_entropy(LOGITS, torch.tensor([1])))
    assert plain == pytest.approx(cross - math.log(3), abs=1e-12)


def test_aldr_has_its_golden_values():
    goal = ALDR(margin=0.1, temperature=1.0, a=2.0, normalise=False)
    before = torch.ones(1, dtype=torch.float64)
    new = goal.temperatures(LOGITS, before)
    assert float(new) == pytest.approx(0.87884, abs=1e-5)
    losses = [float(goal.losses(LOGITS, torch.tensor([y]), new)) for y in (0, 2)]
    assert losses == pytest.approx([-0.64052, 1.42168], abs=1e-5)


def test_aldr_begins_with_logits_of_zeros():
    """As of a linear model that starts at 0, which have no size to divide by."""
    logits = torch.zeros(2, 3, requires_grad=True)
    state = {"temperature": torch.ones(2)}
    batch = Batch(torch.zeros(2, 1), torch.tensor([0, 2]), state=state)
    found = ALDR(margin=0.0).loss(lambda x: logits, batch, Facts(torch.zeros(0)))
    assert found.value.item() == pytest.approx(0.0, abs=1e-6)
    (gradient,) = torch.autograd.grad(found.value, logits)
    expected = (torch.full((2, 3), 1 / 3) - torch.eye(3)[[0, 2]]) / 2
    torch.testing.assert_close(gradient, expected)
    assert found.state["temperature"].tolist() == pytest.approx([1.0, 1.0])


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=6), st.floats(1.01, 50))
def test_aldrs_temperatures_stay_within_the_bounds_that_it_tells(logits, a):
    goal = ALDR(a=a, temperature=3.0)
    z = torch.tensor([logits], dtype=torch.float64)
    new = float(goal.temperatures(z, torch.tensor([3.0], dtype=torch.float64)))
    assert 3 * (1 - 1 / a) - 1e-9 <= new <= 3 + 1e-9


@pytest.mark.parametrize(
    ("eta", "expected"),
    [
        (0.01, [0.33611618, 0.33277176, 0.33111206]),
        (1.0, [0.62853172, 0.2312239, 0.14024438]),
        (0.0, [1 / 3] * 3),
    ],
)
def test_group_dro_has_its_golden_values(eta, expected):
    before = torch.full((3,), 1 / 3, dtype=torch.float64)
    losses = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    found = GroupDRO("site", eta).weights(before, losses, torch.ones(3) > 0)
    assert found.tolist() == pytest.approx(expected, abs=1e-7)


def test_a_group_that_is_not_in_the_batch_keeps_its_share_of_the_others():
    before = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    present = torch.tensor([True, False, True])
    losses = torch.tensor([1.0, 9.0, 1.0], dtype=torch.float64)
    found = GroupDRO("site", 1.0).weights(before, losses, present)
    assert float(found[1] / found.sum()) == pytest.approx(
        0.3 / (0.7 * math.e + 0.3), abs=1e-12
    )


class Parabola(Objective):
    """``(w1 ** 2 + 10 w2 ** 2) / 2``."""

    def batch_loss(self, outputs, batch, facts):
        return 0.5 * (outputs[0] ** 2 * torch.tensor([1.0, 10.0])).sum()


class Direct(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 1.0]))

    def forward(self, x):
        return self.w.expand(len(x), 2)


def test_sam_has_its_golden_values():
    part = Examples(np.zeros((1, 1), np.float32), np.zeros(1, np.int64))
    settings = TrainingSettings(batch_size=1)
    module = FlatModule(Direct())
    start = module.save()
    result = train(
        module,
        start,
        Task(part, 1, 0),
        SAM(0.05, Parabola()),
        settings,
        learning_rate=1.0,
    )
    step = start.parameters - result.model.parameters
    assert step.tolist() == pytest.approx([1.00497519, 10.4975186], abs=1e-5)
    assert result.loss == pytest.approx(5.5)  # At w, where the client is.


# ------------------------------------------------- alone and among other clients


class Normed(nn.Module):
    """With running statistics and noise."""

    def __init__(self):
        super().__init__()
        # No bias: after it the statistics would take it away again.
        self.first, self.norm = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(8, CLASSES)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.last(self.drop(self.norm(self.first(x)).relu()))


class Distils(Objective):
    """Calls the received model on the same examples, and draws random numbers."""

    def loss(self, model, batch, facts):
        outputs = model(batch.x)
        with torch.no_grad():
            teacher = model(batch.x, facts.received).softmax(1)
        pull = (outputs.softmax(1) - teacher).square().sum(1)
        noise = batch.uniform(len(batch.y)).to(outputs.dtype)
        losses = F.cross_entropy(outputs, batch.y, reduction="none")
        return Loss(batch.mean((losses + pull) * (0.5 + noise)), outputs)


class Carries(Objective):
    """Pulls towards a slow mean of the client's own gradients' signs."""

    def begin(self, facts):
        return {"slow": torch.zeros_like(facts.received), "steps": torch.zeros(())}

    def loss(self, model, batch, facts):
        outputs = model(batch.x)
        value = batch.mean(F.cross_entropy(outputs, batch.y, reduction="none"))
        steps = facts.carry["steps"] + 1
        return Loss(value * (1 + 0.1 / steps), outputs, carry={"steps": steps})

    def penalty_gradient(self, parameters, facts):
        return 0.01 * (parameters - facts.received) + facts.carry["slow"]


class Masks(Objective):
    """Trains every second weight only, and keeps the others where they were."""

    def example_losses(self, outputs, batch, facts):
        return F.cross_entropy(outputs, batch.y, reduction="none")

    def gradient(self, gradient_at, parameters, facts):
        places = torch.arange(len(parameters), device=parameters.device)
        return torch.where(places % 2 == 0, gradient_at(parameters), 0)

    def after_step(self, parameters, facts):
        places = torch.arange(len(parameters), device=parameters.device)
        return torch.where(places % 2 == 0, parameters, facts.received)


ROUND = 7

GOALS = {
    "plain": Plain(),
    "proximal": Proximal(0.5),
    "focal": Focal(),
    "balanced": BalancedSoftmax(),
    "class-balanced": ClassBalanced(),
    "class-balanced-own": ClassBalanced(counts="own"),
    "ldam": LDAM(scale=2.0),
    "ldam-reweighted": LDAM(scale=2.0, counts="own", reweight_from=ROUND),
    "linupper": Dynamic(),
    "mid": Dynamic("mid", 0.3),
    "extremes": Dynamic("extremes", start=ROUND),
    "upper": Dynamic("upper", start=ROUND + 1),
    "rent": RENT(start=ROUND),
    "rent-later": RENT(start=ROUND + 1),
    "rent-pooled": RENT(start=1, estimate="pooled"),
    "dws": DWS(start=1, flip=0.2, concentration=5.0),
    "fair-error-bound": FairErrorBound("site"),
    "sam-rent": SAM(0.05, RENT(start=1)),
    "sam-ldam": SAM(0.05, LDAM(scale=2.0)),
    "balanced-own": BalancedSoftmax(counts="own"),
    "fedlc": FedLC(),
    "ldr": LDR(),
    "aldr": ALDR(),
    "group-dro": GroupDRO("site", 0.5),
    "sam": SAM(0.05),
    "sam-aldr": SAM(0.1, ALDR()),
    "sam-group-dro": SAM(0.1, GroupDRO("site", 0.5)),
    "proximal-sam": Proximal(0.3, SAM(0.05, FedLC())),
    "sam-proximal": SAM(0.05, Proximal(0.3)),
    "distils": Distils(),
    "sam-distils": SAM(0.05, Distils()),
    "carries": Carries(),
    "masks": Masks(),
    "group-weighted": GroupWeighted("site", Focal()),
    "kernel-weighted": KernelWeighted("site", 0.5, Focal()),
    "sam-kernel-weighted": SAM(0.05, KernelWeighted()),
    "sam-group-weighted": SAM(0.05, GroupWeighted("site")),
}

SETTINGS = {
    "sgd": {"learning_rate": 0.1},
    "momentum": {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 1e-2},
    "adam": {"optimizer": "adam", "learning_rate": 0.01, "clip_norm": 0.5},
}


# What clients of 50, 20 and 9 examples of a class add up to, a third of them wrong.
RIGHT, TOTALS = torch.eye(3) / 2 + 1 / 6, torch.tensor([50.0, 20.0, 9.0])
POOLED = torch.cat([(RIGHT * TOTALS).flatten(), TOTALS])


def tasks_of(goal, sizes, epochs=2):
    rng = np.random.default_rng(3)
    tasks = []
    for k, n in enumerate(sizes):
        examples = Examples(
            rng.normal(size=(n, 6)),
            rng.integers(0, CLASSES, n),
            {"site": rng.integers(0, GROUPS, n)},
        )
        facts = CODING.facts(goal, examples, [50, 20, 9], ROUND)
        heard = goal.unheard(torch.from_numpy(examples.x), Facts(torch.zeros(0), facts))
        heard = {**heard, **dict.fromkeys(goal.pools, POOLED)}
        facts |= {TOLD + name: value for name, value in heard.items()}
        groups = CODING.groups(goal, examples)
        tasks.append(Task(examples, epochs, k, k + 9, Known(facts, groups=groups)))
    return tasks


def made():
    torch.manual_seed(0)
    return FlatModule(Normed().double())


def assert_alike(one, other, tolerance=1e-9):
    for found, expected in zip(one, other, strict=True):
        for name in ("parameters", "buffers"):
            np.testing.assert_allclose(
                getattr(found.model, name),
                getattr(expected.model, name),
                rtol=0,
                atol=tolerance,
            )
        assert found.loss == pytest.approx(expected.loss, abs=max(tolerance, 1e-6))
        assert found.accuracy == expected.accuracy
        for part in ("carry", "kept"):
            mine, theirs = getattr(found, part), getattr(expected, part)
            assert mine.keys() == theirs.keys()
            for name, values in mine.items():
                np.testing.assert_allclose(values, theirs[name], rtol=0, atol=tolerance)


RAGGED = [13, 5, 20, 8]


@pytest.mark.parametrize(
    ("optimizer", "sizes"),
    [("sgd", [16, 16]), ("sgd", RAGGED), ("momentum", RAGGED), ("adam", RAGGED)],
)
@pytest.mark.parametrize("name", GOALS)
def test_many_at_once_are_each_alone(name, optimizer, sizes):
    goal, settings = GOALS[name], TrainingSettings(batch_size=8, **SETTINGS[optimizer])
    tasks, start = tasks_of(goal, sizes), made().save()
    rate = settings.learning_rate
    trainer = BatchedTrainer(made(), goal, settings, least=2, compiled=name == "sam")
    found = trainer.train(start, tasks, learning_rate=rate)
    module = made()
    alone = [
        train(module, start, task, goal, settings, learning_rate=rate, least=2)
        for task in tasks
    ]
    # Adam makes much of what ought to be 0.
    assert_alike(found, alone, 1e-7 if optimizer == "adam" else 1e-9)


def test_what_is_added_up_over_clients_counts():
    """Otherwise the test above would be of the cross-entropy."""
    settings, start = TrainingSettings(batch_size=8, learning_rate=0.1), made().save()
    found = [
        train(made(), start, task, goal, settings, learning_rate=0.1, least=2)
        for goal in (GOALS["rent-pooled"], GOALS["plain"])
        for task in tasks_of(goal, [13])
    ]
    assert not torch.allclose(*(one.model.parameters for one in found))


@pytest.mark.parametrize("name", ["aldr", "group-dro", "sam-aldr", "carries"])
def test_what_is_carried_goes_on_in_the_next_round(name):
    goal, settings = GOALS[name], TrainingSettings(batch_size=8, learning_rate=0.1)
    start = made().save()

    def round(tasks, trainer):
        return trainer.train(start, tasks, learning_rate=0.1)

    first = tasks_of(goal, [13, 5])
    trainer = BatchedTrainer(made(), goal, settings, least=2)
    before = round(first, trainer)
    tasks = [
        replace(t, epochs=1, known=replace(t.known, carry=r.carry, kept=r.kept))
        for t, r in zip(first, before, strict=True)
    ]
    after = round(tasks, trainer)
    alone = [
        train(made(), start, task, goal, settings, learning_rate=0.1, least=2)
        for task in tasks
    ]
    assert_alike(after, alone)
    afresh = round([replace(t, epochs=1) for t in first], trainer)
    assert not torch.equal(after[0].model.parameters, afresh[0].model.parameters)


def test_what_is_kept_of_an_example_is_its_own():
    goal = ALDR(normalise=False)
    settings = TrainingSettings(batch_size=4, learning_rate=0.0)
    (task,) = tasks_of(goal, [11], epochs=1)
    start = made().save()
    result = train(made(), start, task, goal, settings, learning_rate=0.0, least=2)
    kept = result.kept["temperature"]
    assert kept.shape == (11,)
    assert len(set(kept.tolist())) == 11
    # A second pass moves each from where it is now, and to the same in any company.
    known = replace(task.known, kept=result.kept)
    again = replace(task, known=known, order_key=99)
    shuffled = train(made(), start, again, goal, settings, learning_rate=0.0, least=2)
    assert not torch.equal(shuffled.kept["temperature"], kept)


def test_proximal_inside_sam_and_around_it_are_the_same():
    settings = TrainingSettings(batch_size=8, learning_rate=0.1)
    one, other = SAM(0.05, Proximal(0.3)), Proximal(0.3, SAM(0.05))
    start = made().save()
    (task,) = tasks_of(one, [13])
    found = [
        train(made(), start, task, goal, settings, learning_rate=0.1, least=2)
        for goal in (one, other)
    ]
    assert torch.equal(found[0].model.parameters, found[1].model.parameters)


@pytest.mark.parametrize("least", [SAM(0.0), Proximal(0.0), Masks()])
def test_running_statistics_are_those_of_the_first_gradient(least):
    settings = TrainingSettings(batch_size=8, learning_rate=0.1)
    start = made().save()
    (task,) = tasks_of(Plain(), [16], epochs=1)
    plain, other = (
        train(made(), start, task, goal, settings, learning_rate=0.0, least=2)
        for goal in (Plain(), least)
    )
    assert torch.equal(plain.model.buffers, other.model.buffers)
    assert plain.loss == pytest.approx(other.loss, rel=1e-12)


def test_sam_at_0_is_the_other_objective_to_the_last_bit():
    settings = TrainingSettings(batch_size=8, learning_rate=0.1, momentum=0.9)
    start = made().save()
    (task,) = tasks_of(Plain(), [16])
    found = [
        train(made(), start, task, goal, settings, learning_rate=0.1, least=2)
        for goal in (Plain(), SAM(0.0))
    ]
    assert torch.equal(found[0].model.parameters, found[1].model.parameters)


class Doubled(Plain):
    def example_losses(self, outputs, batch, facts):
        return 2 * super().example_losses(outputs, batch, facts)


def test_what_is_made_of_plain_minimises_its_own_losses():
    settings = TrainingSettings(batch_size=8, learning_rate=0.1)
    start = made().save()
    (task,) = tasks_of(Plain(), [16])
    own, plain = (
        train(made(), start, task, goal, settings, learning_rate=rate, least=2)
        for goal, rate in ((Doubled(), 0.05), (Plain(), 0.1))
    )
    assert torch.allclose(own.model.parameters, plain.model.parameters, atol=1e-9)
    assert own.loss == pytest.approx(2 * plain.loss)


# ---------------------------------------------------------------------- mistakes


class Wrong(Objective):
    def __init__(self, how):
        self.how = how

    def begin(self, facts):
        return {"q": torch.ones(2)}

    def loss(self, model, batch, facts):
        outputs = model(batch.x)
        losses = F.cross_entropy(outputs, batch.y, reduction="none")
        return {
            "tensor": lambda: losses.mean(),
            "vector": lambda: Loss(losses, outputs),
            "float": lambda: Loss(1.0, outputs),
            "unknown": lambda: Loss(losses.mean(), outputs, {"p": torch.ones(2)}),
            "shape": lambda: Loss(losses.mean(), outputs, {"q": torch.ones(3)}),
            "counts": lambda: Loss(facts.class_counts.sum(), outputs),
        }[self.how]()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("tensor", r"loss returned Tensor. Return fedweight.clients.Loss\(value"),
        ("vector", r"its loss has shape \[8\]. Return one number"),
        ("float", "the value of its loss is float, not a tensor"),
        ("unknown", r"has no 'p' at the beginning, only \['q'\]"),
        ("shape", r"'q' has shape \[3\], and had \[2\]"),
        ("counts", "'class-counts' is known only to one whose 'wants' has it"),
    ],
)
def test_a_wrong_loss_is_told(how, said):
    goal, settings = Wrong(how), TrainingSettings(batch_size=8)
    (task,) = tasks_of(goal, [8])
    with pytest.raises((ClientError, ConfigurationError), match=said):
        train(made(), made().save(), task, goal, settings, learning_rate=0.1)


class NoGradient(Plain):
    def __init__(self, how):
        self.how = how

    def gradient(self, gradient_at, parameters, facts):
        if self.how == "none":
            return parameters
        return gradient_at(parameters)[:3]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("none", "must call gradient_at, once or more"),
        ("short", r"returned shape \[3\]"),
    ],
)
def test_a_wrong_gradient_is_told(how, said):
    settings = TrainingSettings(batch_size=8)
    (task,) = tasks_of(Plain(), [8])
    with pytest.raises(ClientError, match=said):
        train(made(), made().save(), task, NoGradient(how), settings, learning_rate=0.1)


def test_an_objective_that_defines_no_loss_is_refused(tmp_path, monkeypatch):
    (tmp_path / "own_nothing.py").write_text(
        "from fedweight.clients import Objective\nclass Nothing(Objective): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError, match="must define example_losses"):
        objective("own_nothing:Nothing")


@pytest.mark.parametrize("name", OBJECTIVES.entries)
def test_every_shipped_objective_has_a_card(name):
    cards = (Path(__file__).parents[2] / "clients" / "README.md").read_text()
    assert f"`{name}`" in cards


def test_one_around_another_leaves_all_else_to_it():
    inner = GroupDRO("site", 0.5)
    around = Around()
    around.inner = inner
    assert around.wants == inner.wants
    assert around.group == "site"


class Twice(Around):
    """Minimises twice what another one does, by its examples or by its batches."""

    def __init__(self, inner):
        self.inner = inner


class TwiceExamples(Twice):
    def example_losses(self, outputs, batch, facts):
        return 2 * self.inner.example_losses(outputs, batch, facts)


class TwiceBatches(Twice):
    def batch_loss(self, outputs, batch, facts):
        return 2 * self.inner.batch_loss(outputs, batch, facts)


OF_LOGITS = Facts(torch.zeros(0), {"class-counts": COUNTS})


def of_batch(goal, facts=OF_LOGITS):
    batch = Batch(LOGITS, torch.tensor([1]), torch.ones(1))
    return float(goal.loss(lambda x: x, batch, facts).value)


@pytest.mark.parametrize("twice", [TwiceExamples, TwiceBatches])
def test_what_one_around_another_makes_of_losses_counts(twice):
    plain = of_batch(Plain())
    assert of_batch(twice(Plain())) == pytest.approx(2 * plain)
    assert of_batch(twice(twice(Plain()))) == pytest.approx(4 * plain)
    assert of_batch(SAM(0.1, twice(Proximal(0.1, Focal(1.0))))) == pytest.approx(
        2 * of_batch(Focal(1.0))
    )
    goal = SAM(0.1, twice(Focal(1.0)))
    assert for_task(goal, task_named("classification")) is goal


@pytest.mark.parametrize(
    ("twice", "inner"),
    [
        (TwiceExamples, GroupDRO("site")),
        (TwiceExamples, SAM(0.1, TwiceBatches(Plain()))),
        (TwiceExamples, ClassBalanced()),
        (TwiceBatches, ALDR()),
    ],
)
def test_what_would_leave_out_another_ones_loss_is_refused(twice, inner):
    said = f"{twice.__name__} changes .* of {{}}, which makes its loss in another way"
    name = type(inner.inner if isinstance(inner, SAM) else inner).__name__
    for goal in (twice(inner), Proximal(0.1, twice(inner))):
        with pytest.raises(ConfigurationError, match=said.format(name)):
            for_task(goal, task_named("classification"))
    assert of_batch(TwiceBatches(ClassBalanced(counts="own"))) == pytest.approx(
        2 * of_batch(ClassBalanced(counts="own"))
    )


@pytest.mark.parametrize("shape", [(), (4, 4), (4, 1), (3,)])
def test_losses_that_are_not_one_for_each_example_are_refused(shape):
    batch = Batch(torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(ClientError, match=r"one loss for each of 4 examples"):
        batch.mean(torch.zeros(shape))
