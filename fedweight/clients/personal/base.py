"""What a personal model is trained by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from ...core.errors import ConfigurationError, check_choice
from ...core.texts import shown
from ..objectives.base import Objective


class Personal(ABC):
    """A model of each client's own, trained after the local training of every round.

    The client keeps it; nobody else sees it. A client that has none yet begins with the
    global model that it received. The random numbers are others than those of the local
    training, which therefore is the same with and without personal models.

    Attributes
    ----------
    start : {"personal", "trained"}
        What the training begins with: the client's personal model, or what the round's
        local training has just made of the global one.
    epochs : int
        Passes over the client's data, 1 or more.
    """

    start: ClassVar[Literal["personal", "trained"]] = "personal"

    epochs: int = 1

    @abstractmethod
    def objective(self, local: Objective) -> Objective:
        """Return what the personal model minimises.

        Parameters
        ----------
        local : Objective
            What local training minimises. With ``facts.received`` an objective sees
            the global model that the client received in this round.
        """


def objective_of(personal: Personal, local: Objective) -> Objective:
    """Return what a personal model minimises.

    Raises
    ------
    ConfigurationError
        If that is no objective, or what is said of its training does not fit.
    """
    name = type(personal).__name__
    check_choice(f"personal {name}: start", personal.start, ("personal", "trained"))
    epochs: Any = personal.epochs
    if type(epochs) is not int or epochs < 1:
        raise ConfigurationError(
            f"personal {name}: epochs must be a whole number from 1, got "
            f"{shown(epochs)}."
        )
    objective: Any = personal.objective(local)
    if not isinstance(objective, Objective):
        raise ConfigurationError(
            f"personal {name}: objective must return an objective, got "
            f"{shown(objective)}."
        )
    return objective


def nothing() -> None:
    """Keep no personal models."""
