"""Schedules of the learning rate against PyTorch's."""

import pytest
import torch
from torch.optim import lr_scheduler

from fedweight.clients import TrainingSettings
from fedweight.clients.rate_schedules import (
    RATE_SCHEDULES,
    Constant,
    Cosine,
    Exponential,
    RateSchedule,
    Step,
    WarmUp,
    rate_schedule_of,
)
from fedweight.core.errors import ConfigurationError

CASES = {
    "exponential": (
        Exponential(schedule_factor=0.8),
        lambda o: lr_scheduler.ExponentialLR(o, 0.8),
        30,
    ),
    "step": (
        Step(schedule_factor=0.5, schedule_every=7),
        lambda o: lr_scheduler.StepLR(o, 7, 0.5),
        30,
    ),
    "cosine": (
        Cosine(schedule_length=20, schedule_least=0.1),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 20, eta_min=0.1 * 0.3),
        21,  # PyTorch's goes up again.
    ),
    "warm-up": (
        WarmUp(schedule_length=6, schedule_start=0.25),
        lambda o: lr_scheduler.LinearLR(o, 0.25, total_iters=6),
        30,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_over_rounds_it_is_pytorchs(case):
    ours, theirs, length = CASES[case]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    scheduler = theirs(optimizer)
    settings = TrainingSettings(learning_rate=0.3, learning_rate_schedule=ours)
    for round in range(1, length + 1):
        found = settings.learning_rate_in(round)
        assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        assert settings.learning_rate_at(found, 3, 10) == found
        optimizer.step()
        scheduler.step()


def test_a_cosine_stays_where_it_has_arrived():
    cosine = Cosine(schedule_length=4, schedule_least=0.2)
    assert [cosine.factor(t, 0) for t in (4, 5, 100)] == [0.2] * 3


def test_a_cosine_over_steps_takes_all_of_a_clients_own():
    settings = TrainingSettings(learning_rate_schedule=Cosine(schedule_over="steps"))
    assert settings.learning_rate_in(7) == 0.1
    assert settings.learning_rate_at(0.1, 5, 10) == pytest.approx(0.05)
    assert settings.learning_rate_at(0.1, 5, 20) == pytest.approx(0.085355339)


def test_a_cosine_over_rounds_must_know_how_many():
    with pytest.raises(ConfigurationError, match="schedule_length of a cosine"):
        TrainingSettings(learning_rate_schedule="cosine")
    keys = {"learning_rate_schedule": "cosine"}
    made = TrainingSettings.of_keys(keys, rounds=20)
    assert made.rate_schedule == Cosine(schedule_length=20)


def test_the_decay_multiplies_a_schedule():
    step = Step(schedule_factor=0.1, schedule_every=1)
    settings = TrainingSettings(
        learning_rate=0.4, learning_rate_decay=0.5, learning_rate_schedule=step
    )
    rates = [settings.learning_rate_in(t) for t in (1, 2, 3)]
    assert rates == pytest.approx([0.4, 0.02, 0.001])


def test_a_constant_changes_no_bit():
    settings = TrainingSettings(learning_rate=0.3, learning_rate_decay=0.99)
    assert settings.rate_schedule == Constant()
    assert settings.learning_rate_in(9) == 0.3 * 0.99**8
    assert settings.learning_rate_at(0.3, 2, 9) == 0.3


@pytest.mark.parametrize("name", RATE_SCHEDULES.entries)
@pytest.mark.parametrize("place", [0, 1, 3, 50])
def test_factors_are_shares(name, place):
    assert 0 <= rate_schedule_of(name, {}).factor(place, 60) <= 1


class Triangle(RateSchedule):
    """A user's own."""

    def factor(self, place, total):
        return 0.5


def test_one_of_ones_own():
    settings = TrainingSettings(learning_rate_schedule=f"{__name__}:Triangle")
    assert settings.learning_rate_in(3) == 0.05


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("cosinus", {}, "Did you mean 'cosine'"),
        ("step", {"schedule_every": 0}, "schedule_every must be in"),
        ("constant", {"schedule_over": "steps"}, "has no option"),
        ("warm-up", {"schedule_over": "epochs"}, "one of 'rounds', 'steps'"),
        ("fractions:Fraction", {}, "is not derived from"),
    ],
)
def test_what_is_refused(name, options, said):
    with pytest.raises(ConfigurationError, match=said):
        rate_schedule_of(name, options)
