"""What a schedule of one's own may answer."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from fedweight.core.errors import ConfigurationError
from fedweight.core.layout import FlatModel, Layout
from fedweight.server import Arrival, Moment, Schedule, Timetable
from fedweight.server.schedules import Clock


def model(size: int = 2) -> FlatModel:
    layout = Layout.of({"w": ((size,), "float32")}, ())
    return FlatModel(layout, torch.zeros(size), torch.zeros(0))


START = model()
NOW = Moment(2, START, 1, 4, lambda clients: None)


class Own(Schedule):
    """Answers whatever a test says."""

    def __init__(self, answer: Any, chooses: bool, discounts: bool) -> None:
        self.answer = answer
        self.own = chooses, discounts

    @property
    def chooses(self) -> bool:
        return self.own[0]

    @property
    def discounts(self) -> bool:
        return self.own[1]

    def next(self, moment: Moment, state: Any) -> Any:
        return self.answer


def clock(answer: Any, chooses: bool = True, discounts: bool = False) -> Clock:
    return Clock(Own(answer, chooses, discounts))


def table(arrivals: Any, late: Any = None, seconds: Any = 1.0) -> tuple[Any, Any]:
    return Timetable(arrivals, lambda passes: late or {}, lambda passes: seconds), None


def arrival(client: Any = 1, round: Any = 2, start: Any = START, s: Any = 1.0) -> Any:
    return Arrival(client, round, start, s)


ANSWERS: list[tuple[Any, str]] = [
    (None, "Own.next must return a Timetable and the schedule's next state, got None."),
    (table([arrival()])[0], "Own.next must return a Timetable and the schedule's"),
    (("soon", None), "Own.next must return a Timetable and the schedule's next state"),
    (table(None), "Own.next gave no arrivals, but Own.chooses is True."),
    (table(()), "Own.next must give one arrival or more, got ()."),
    (table(3), "Own.next must give one arrival or more, got 3."),
    (table([1, 2]), "Own.next must give arrivals as Arrival(client, round, start, di"),
    (table([arrival(4)]), "client must be a whole number from 0 to 3, got 4."),
    (table([arrival(-1)]), "client must be a whole number from 0 to 3, got -1."),
    (table([arrival("a")]), "client must be a whole number from 0 to 3, got 'a'."),
    (table([arrival(True)]), "client must be a whole number from 0 to 3, got True."),
    (table([arrival(), arrival()]), "Own.next gave client 1 twice."),
    (table([arrival(round=0)]), "round must be one from 1 to 2, got 0."),
    (table([arrival(round=3)]), "round must be one from 1 to 2, got 3."),
    (table([arrival(start=None)]), "start must be the moment.model of a round, got N"),
    (table([arrival(start=model(3))]), "start must be the moment.model of a round"),
    (table([arrival(s=float("nan"))]), "discount must be a finite number of 0 or mor"),
    (table([arrival(s=-1.0)]), "discount must be a finite number of 0 or more, got -"),
    (table([arrival(s=0.5)]), "discount is 0.5, but Own.discounts is False; it must"),
]


@pytest.mark.parametrize(("answer", "said"), ANSWERS)
def test_what_no_round_can_be_is_refused(answer: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)) as caught:
        clock(answer).next(NOW)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("Own.next ")


def test_arrivals_of_a_schedule_that_does_not_choose_are_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"arrivals, but Own\.chooses is False"
    ):
        clock(table([arrival()]), chooses=False).next(NOW)


def test_numbers_of_numpy_are_taken() -> None:
    one = arrival(np.int64(3), np.int32(1), START, np.float64(0.5))
    found = clock(table([one]), discounts=True).next(NOW)
    assert found.arrivals == (Arrival(3, 1, START, 0.5),)
    assert type(found.arrivals[0].client) is int


@pytest.mark.parametrize("late", [{9: "late"}, {1: 3.0}, [1], "late", {"1": "late"}])
def test_who_is_late_is_told_by_number_with_a_reason(late: Any) -> None:
    own = clock(table(None, late=late), chooses=False)
    own.next(NOW)
    with pytest.raises(ConfigurationError, match=r"^Own: late\(passes\) must return a"):
        own.late({1: 1, 2: 1})


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, None, "1", True])
def test_a_round_takes_a_finite_time(seconds: Any) -> None:
    own = clock(table(None, seconds=seconds), chooses=False)
    own.next(NOW)
    with pytest.raises(
        ConfigurationError, match=r"^Own: seconds\(passes\) must return"
    ):
        own.seconds({1: 1})


def test_what_fits_is_given_as_it_is() -> None:
    own = clock(table(None, late={1: "asleep"}, seconds=np.float32(2)), chooses=False)
    own.next(NOW)
    assert own.late({1: 1, 2: 1}) == {1: "asleep"}
    assert own.seconds({1: 1}) == 2.0
