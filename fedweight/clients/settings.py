"""How a client trains: epochs, batches, optimiser, learning rate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from pydantic import Field

from ..core.errors import ConfigurationError
from ..core.options import ANY, MOST, checked_fields, options_of
from .optimizers import FILLED_IN, OPTIMIZERS, Foreign, Optimizer, optimizer_of
from .rate_schedules import (
    RATE_SCHEDULES,
    Constant,
    Cosine,
    RateSchedule,
    rate_schedule_of,
)


@checked_fields
@dataclass(frozen=True)
class TrainingSettings:
    """How a client trains.

    Parameters
    ----------
    epochs : int
        Passes over the client's data in a round, 1 or more.
    batch_size : int
        Examples in a step, 1 or more; the last step of a pass takes what is left. One
        that is left alone joins the step before, for a model that needs two.
    optimizer : {"sgd", "adam", "adamw", "adagrad", "rmsprop"} or Optimizer
        Fresh in every round. A name, or an object that has options, such as
        ``SGD(momentum=0.9, nesterov=True)`` of :mod:`fedweight.clients.optimizers`.
        ``"module:Class"`` is any ``torch.optim.Optimizer``; clients then train one
        after another.
    learning_rate : float
        0 or more.
    learning_rate_decay : float
        In (0, 1]; round t trains with ``learning_rate * decay ** (t - 1)``.
    learning_rate_schedule : {"constant", "exponential", "step", "cosine", "warm-up"} \
or RateSchedule
        What else the learning rate is multiplied by, over rounds or over steps. A name,
        or an object, such as ``Cosine(schedule_over="steps")`` of
        :mod:`fedweight.clients.rate_schedules`.
    momentum : float
        In [0, 1); for an optimiser that is named and has one: ``sgd``, ``rmsprop``.
    weight_decay : float
        0 or more; the strength of the L2 term, in the gradient; for ``adamw`` what each
        step shrinks the weights by, times the learning rate.
    clip_norm : float
        0 or more; a longer gradient of a client is made so long before the optimiser
        has it. 0 makes none shorter.
    """

    epochs: Annotated[
        int, Field(ge=1, le=MOST, description="passes over a client's data in a round")
    ] = 1
    batch_size: Annotated[
        int, Field(ge=1, le=MOST, description="examples in a step")
    ] = 32
    optimizer: Annotated[
        str | Optimizer,
        Field(description="sgd, adam, adamw, adagrad, rmsprop or 'module:Class'"),
    ] = "sgd"
    learning_rate: Annotated[
        float, Field(ge=0, description="of the client's optimiser")
    ] = 0.1
    learning_rate_decay: Annotated[
        float, Field(gt=0, le=1, description="factor on the rate after every round")
    ] = 1.0
    learning_rate_schedule: Annotated[
        str | RateSchedule,
        Field(description="constant, exponential, step, cosine or warm-up"),
    ] = "constant"
    momentum: Annotated[
        float, Field(ge=0, lt=1, description="of an optimiser that has one, as sgd")
    ] = 0.0
    weight_decay: Annotated[
        float, Field(ge=0, description="strength of the L2 term")
    ] = 0.0
    clip_norm: Annotated[
        float, Field(ge=0, description="longest gradient of a client; 0 is any")
    ] = 0.0

    def __post_init__(self) -> None:
        """Look up what is named, and check what goes together."""
        if isinstance(self.optimizer, Optimizer) and self.momentum:
            raise ConfigurationError(
                f"momentum is {self.momentum:g}, but the optimizer is an object, which "
                "has its own. Give it there."
            )
        _ = self.rule
        self.rate_schedule.factor(0, int(self.rate_schedule.over_steps))

    @cached_property
    def rule(self) -> Optimizer:
        """The optimiser, with its parameters."""
        if isinstance(self.optimizer, Optimizer):
            return self.optimizer
        takes = options_of(OPTIMIZERS.resolve(self.optimizer))
        own = {"momentum": self.momentum} if "momentum" in takes else {}
        return optimizer_of(self.optimizer, own)

    @cached_property
    def rate_schedule(self) -> RateSchedule:
        """The schedule of the learning rate, with its parameters."""
        if isinstance(self.learning_rate_schedule, RateSchedule):
            return self.learning_rate_schedule
        return rate_schedule_of(self.learning_rate_schedule, {})

    @classmethod
    def of_keys(cls, keys: Mapping[str, Any], rounds: int = 0) -> TrainingSettings:
        """Make settings of the keys of a simulation file's table.

        Parameters
        ----------
        keys : Mapping[str, Any]
            By names in snake_case; the options of the optimiser and of the schedule
            stand beside them.
        rounds : int
            How many the run has; what a cosine over all rounds needs. 0: not known.

        Examples
        --------
        >>> made = TrainingSettings.of_keys({"optimizer": "sgd", "dampening": 0.1})
        >>> made.rule
        SGD(momentum=0.0, dampening=0.1, nesterov=False)
        """
        fixed = {one.name for one in dataclasses.fields(cls)}
        given = {key: value for key, value in keys.items() if key in fixed}
        name = given.get("optimizer", cls.optimizer)
        scheduled = given.get("learning_rate_schedule", cls.learning_rate_schedule)
        if isinstance(name, str):
            own = _taken(OPTIMIZERS.resolve(name), keys)
            given["optimizer"] = optimizer_of(name, own)
            given["momentum"] = 0.0  # The optimiser has it now, if it has one.
        if isinstance(scheduled, str):
            own = _taken(RATE_SCHEDULES.resolve(scheduled), keys)
            schedule = rate_schedule_of(scheduled, own)
            endless = isinstance(schedule, Cosine) and not schedule.schedule_length
            if rounds and endless and not schedule.over_steps:
                schedule = dataclasses.replace(schedule, schedule_length=rounds)  # type: ignore[call-arg]
            given["learning_rate_schedule"] = schedule
        return cls(**given)

    def to_keys(self) -> dict[str, Any]:
        """Return the keys of a simulation file's table, as :meth:`of_keys` takes them.

        Examples
        --------
        >>> from fedweight.clients.optimizers import Adagrad
        >>> keys = TrainingSettings(optimizer=Adagrad(initial_sum=0.1)).to_keys()
        >>> keys["optimizer"], keys["initial_sum"]
        ('adagrad', 0.1)
        """
        found = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        rule, schedule = self.rule, self.rate_schedule
        found["learning_rate_schedule"] = RATE_SCHEDULES.name_of(type(schedule))
        found |= dataclasses.asdict(schedule)
        if isinstance(rule, Foreign):
            return found | {"optimizer": rule.path, **rule.options}
        named = {"optimizer": OPTIMIZERS.name_of(type(rule))}
        return found | named | dataclasses.asdict(rule)

    def learning_rate_in(self, round: int) -> float:
        """Return the learning rate that a round begins with; rounds count from 1.

        What comes before them begins as the first one.
        """
        round = max(round, 1)
        rate = float(self.learning_rate * self.learning_rate_decay ** (round - 1))
        schedule = self.rate_schedule
        if schedule.over_steps or isinstance(schedule, Constant):
            return rate
        return rate * schedule.factor(round - 1, 0)

    def learning_rate_at(self, rate: float, step: int, total: int) -> float:
        """Return the rate of a client's step, which count from 0, of ``total``.

        ``rate`` is that of the round.
        """
        if not self.rate_schedule.over_steps:
            return rate
        return rate * self.rate_schedule.factor(step, total)

    @property
    def descends(self) -> bool:
        """Whether a step is ``w - rate * gradient``, and nothing is remembered."""
        plain = self.rule.descends and not self.weight_decay
        return plain and not self.clip_norm

    @property
    def diverging_mu(self) -> float:
        """From which ``mu`` on a proximal term alone makes training diverge.

        A step of SGD multiplies the distance from the received model by ``1 -
        learning_rate * mu``, so it grows from ``2 / learning_rate`` on; with momentum
        from ``2 * (1 + momentum) / learning_rate`` on. The steps of adaptive methods,
        and clipped ones, do not grow.

        Examples
        --------
        >>> TrainingSettings(learning_rate=0.1).diverging_mu
        20.0
        """
        if self.clip_norm or not self.learning_rate:
            return math.inf
        return self.rule.diverging_curvature / self.learning_rate


def _taken(chosen: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a table's keys that what was chosen takes."""
    takes = options_of(chosen)
    fixed = {one.name for one in dataclasses.fields(TrainingSettings)} - {"momentum"}
    return {
        key: value
        for key, value in keys.items()
        if (key in takes or ANY in takes)
        and key not in FILLED_IN | fixed
        and (key != "momentum" or key in takes)
    }
