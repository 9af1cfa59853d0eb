"""What a client trains for itself: which model, and what it is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...core.errors import ConfigurationError, check_choice, check_range
from ...core.texts import shown
from ..objectives.base import Objective, defines

When = Literal["rounds", "end"]


@dataclass(frozen=True)
class Phase:
    """A part of the training of a personal model.

    Attributes
    ----------
    objective : Objective
        What it minimises. :class:`~fedweight.clients.objectives.Part` trains some
        layers only.
    epochs : int
        Passes over the client's data, 1 or more.
    learning_rate : float, optional
        Above 0; by default that of the local training.
    """

    objective: Objective
    epochs: int = 1
    learning_rate: float | None = None


class Personal:
    """A model of each client's own, trained in every round, or after the last one.

    The client keeps it; nobody else sees it. A client that has none yet begins with the
    global model that it received. The random numbers are others than those of the local
    training, which therefore is the same with and without personal models.

    Attributes
    ----------
    when : {"rounds", "end"}
        Whether a client trains it after its local training of every round, or all
        clients do once, after the rounds, from the last global model.
    start : {"personal", "trained"}
        What the training in a round begins with: the client's personal model, or what
        the round's local training has just made of the global one.
    epochs : int
        Passes over the client's data, 1 or more.
    layers : tuple of str
        What of the model is the client's own, by names as
        :class:`~fedweight.clients.objectives.Part` takes them; also what no round
        trains may be. All else is the global model's. Empty: all that rounds train.
    advice : str
        What to do where a model has no such layers.
    """

    when: When = "rounds"
    start: ClassVar[Literal["personal", "trained"]] = "personal"
    layers: ClassVar[tuple[str, ...]] = ()
    advice: ClassVar[str] = ""

    epochs: int = 1

    def objective(self, local: Objective) -> Objective:
        """Return what the personal model minimises; by default what clients minimise.

        Parameters
        ----------
        local : Objective
            What local training minimises, but for what hears the strategy: that makes a
            client train for others. With ``facts.received`` an objective sees the
            global model that the client received in this round.
        """
        return local

    def phases(self, local: Objective) -> Sequence[Phase]:
        """Return the parts of the training, which follow each other.

        One, by default: :attr:`epochs` passes with :meth:`objective`. Each begins with
        an optimiser of its own.

        Parameters
        ----------
        local : Objective
            What local training minimises.
        """
        return [Phase(self.objective(local), self.epochs)]


def phases_of(personal: Personal, local: Objective) -> list[Phase]:
    """Return the parts of a personal model's training, checked.

    Raises
    ------
    ConfigurationError
        If what is said of the training does not fit.
    """
    name = f"personal {type(personal).__name__}"
    check_choice(f"{name}: when", personal.when, ("rounds", "end"))
    check_choice(f"{name}: start", personal.start, ("personal", "trained"))
    layers: Any = personal.layers
    if not isinstance(layers, tuple) or not all(isinstance(n, str) for n in layers):
        raise ConfigurationError(
            f"{name}: layers must be a tuple of names, got {shown(layers)}."
        )
    phases: Any = personal.phases(local)
    if not isinstance(phases, Sequence) or not phases:
        raise ConfigurationError(
            f"{name}: phases must return one Phase or more, got {shown(phases)}."
        )
    for phase in phases:
        _check(name, phase, len(phases))
    return list(phases)


def _check(name: str, phase: Any, phases: int) -> None:
    """Refuse a phase that cannot be."""
    if not isinstance(phase, Phase):
        raise ConfigurationError(f"{name}: phases must be Phase, got {shown(phase)}.")
    goal, epochs = phase.objective, phase.epochs
    if type(epochs) is not int or epochs < 1:
        raise ConfigurationError(
            f"{name}: epochs must be a whole number from 1, got {shown(epochs)}."
        )
    if not isinstance(goal, Objective):
        raise ConfigurationError(
            f"{name}: objective must return an objective, got {shown(goal)}."
        )
    if phase.learning_rate is not None:
        check_range(f"{name}: learning_rate", phase.learning_rate, 0)
    if phases > 1 and (goal.per_example or defines(goal, "begin")):
        raise ConfigurationError(
            f"{name}: {type(goal).__name__} keeps or carries something from step to "
            f"step, which it can where there is one phase; there are {phases}. Return "
            "one Phase, or give the phases an objective without memory, as Plain() is."
        )


def nothing() -> None:
    """Keep no personal models."""
