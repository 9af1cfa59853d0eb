"""Schedules of the learning rate: over the rounds, or over a client's steps in one.

A schedule is a pure function of what it counts; a client keeps nothing of it. They are
``torch.optim.lr_scheduler``'s where those have the same.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from ..core.errors import ConfigurationError
from ..core.options import MOST, check_options, checked_fields
from ..core.registry import Registry

RATE_SCHEDULES = Registry(
    "learning-rate schedule",
    {
        "constant": f"{__name__}:Constant",
        "exponential": f"{__name__}:Exponential",
        "step": f"{__name__}:Step",
        "cosine": f"{__name__}:Cosine",
        "warm-up": f"{__name__}:WarmUp",
    },
)


@dataclass(frozen=True, kw_only=True)
class RateSchedule(ABC):
    """What the learning rate is multiplied by."""

    @property
    def over_steps(self) -> bool:
        """Whether it counts a client's steps within a round, and not the rounds."""
        return False

    @abstractmethod
    def factor(self, place: int, total: int) -> float:
        """Return the factor, in [0, 1].

        Parameters
        ----------
        place : int
            The round or the step, from 0.
        total : int
            How many steps the client makes in the round; of rounds it is not known, 0.
        """


@checked_fields
@dataclass(frozen=True, kw_only=True)
class Constant(RateSchedule):
    """The same learning rate always."""

    def factor(self, place: int, total: int) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Counting(RateSchedule):
    """A schedule that counts either rounds or steps.

    Parameters
    ----------
    schedule_over : {"rounds", "steps"}
        What is counted: the rounds, or a client's steps within each round.
    """

    schedule_over: Annotated[
        Literal["rounds", "steps"],
        Field(description="what is counted: rounds, or a client's steps in a round"),
    ] = "rounds"

    @property
    def over_steps(self) -> bool:
        """Whether it counts a client's steps within a round."""
        return self.schedule_over == "steps"


@checked_fields
@dataclass(frozen=True, kw_only=True)
class Exponential(Counting):
    """A factor after every round or step.

    ``learning-rate-decay`` is this one over rounds, and multiplies any other.

    Parameters
    ----------
    schedule_factor : float
        In (0, 1].
    """

    schedule_factor: Annotated[
        float, Field(gt=0, le=1, description="factor after every round or step")
    ] = 0.99

    def factor(self, place: int, total: int) -> float:
        """Return ``factor ** place``."""
        return float(self.schedule_factor**place)


@checked_fields
@dataclass(frozen=True, kw_only=True)
class Step(Counting):
    """A factor after every so many rounds or steps.

    Parameters
    ----------
    schedule_factor : float
        In (0, 1].
    schedule_every : int
        1 or more.
    """

    schedule_factor: Annotated[
        float, Field(gt=0, le=1, description="factor on the rate")
    ] = 0.1
    schedule_every: Annotated[
        int, Field(ge=1, le=MOST, description="after so many rounds or steps")
    ] = 10

    def factor(self, place: int, total: int) -> float:
        """Return ``factor ** (place // every)``."""
        return float(self.schedule_factor ** (place // self.schedule_every))


@checked_fields
@dataclass(frozen=True, kw_only=True)
class Cosine(Counting):
    """Half a wave of a cosine, from the learning rate down to a share of it.

    Ilya Loshchilov and Frank Hutter, "SGDR: Stochastic Gradient Descent with Warm
    Restarts", ICLR 2017; without restarts.

    Parameters
    ----------
    schedule_length : int
        0 or more rounds or steps, after which the rate stays; 0 is all of the run's
        rounds, or of a client's steps in a round.
    schedule_least : float
        In [0, 1]; the share of the learning rate at the end.
    """

    schedule_length: Annotated[
        int,
        Field(
            ge=0,
            le=MOST,
            description="rounds or steps until the least rate; 0 is all of them",
        ),
    ] = 0
    schedule_least: Annotated[
        float, Field(ge=0, le=1, description="share of the rate at the end")
    ] = 0.0

    def factor(self, place: int, total: int) -> float:
        """Return ``least + (1 - least) (1 + cos(pi place / length)) / 2``."""
        length = self.schedule_length or total
        if not length:
            raise ConfigurationError(
                "schedule_length of a cosine over rounds must be 1 or more, got 0: a "
                "client does not know how many rounds there will be."
            )
        wave = (1 + math.cos(math.pi * min(place, length) / length)) / 2
        return self.schedule_least + (1 - self.schedule_least) * wave


@checked_fields
@dataclass(frozen=True, kw_only=True)
class WarmUp(Counting):
    """From a share of the learning rate up to all of it, in a line; then constant.

    Priya Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour",
    arXiv 2017.

    Parameters
    ----------
    schedule_start : float
        In (0, 1]; the share of the learning rate in the first round or step.
    schedule_length : int
        1 or more rounds or steps, after which it is the learning rate.
    """

    schedule_start: Annotated[
        float, Field(gt=0, le=1, description="share of the rate at the start")
    ] = 0.1
    schedule_length: Annotated[
        int, Field(ge=1, le=MOST, description="rounds or steps until the whole rate")
    ] = 5

    def factor(self, place: int, total: int) -> float:
        """Return ``start + (1 - start) place / length``, and 1 from there on."""
        done = min(place / self.schedule_length, 1.0)
        return self.schedule_start + (1 - self.schedule_start) * done


def rate_schedule_of(name: str, options: Mapping[str, Any]) -> RateSchedule:
    """Make a schedule of the learning rate by name, or the user's own.

    Examples
    --------
    >>> rate_schedule_of("step", {"schedule_every": 2}).factor(3, 0)
    0.1
    """
    chosen = RATE_SCHEDULES.resolve(name)
    what = f"learning-rate schedule '{name}'"
    if not (isinstance(chosen, type) and issubclass(chosen, RateSchedule)):
        raise ConfigurationError(
            f"{what} is not derived from fedweight.clients.rate_schedules.RateSchedule."
        )
    checked = check_options(what, chosen, options, ())
    return chosen(**checked)
