"""How classes and groups are coded, and what an objective wants to know of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core.errors import ClientError
from ..core.texts import shown
from ..data.examples import Examples
from ..data.tasks import CLASSIFICATION
from ..metrics import TASKS, LearningTask
from .objectives.base import TOLD, Objective


@dataclass(frozen=True)
class Coding:
    """How many classes and groups there are, and what is predicted.

    Attributes
    ----------
    num_classes : int
        C; labels are codes ``0 .. C - 1``.
    num_groups : Mapping[str, int]
        By attribute of the examples, how many groups its codes name.
    task : LearningTask
        What is predicted.
    """

    num_classes: int = 0
    num_groups: Mapping[str, int] = field(default_factory=dict)
    task: LearningTask = TASKS[CLASSIFICATION]

    def facts(
        self,
        objective: Objective,
        examples: Examples,
        totals: Sequence[int] | None,
        round: int,
    ) -> dict[str, Tensor]:
        """Return what an objective wants to know of a client with some examples.

        Parameters
        ----------
        objective : Objective
            Says what that is.
        examples : Examples
            The client's training data.
        totals : Sequence[int], optional
            How many examples of each class all clients have, if the server told.
        round : int
            The number of the round, from 1.

        Raises
        ------
        ClientError
            If it is not known.
        """
        facts: dict[str, Tensor] = {}
        if "class-counts" in objective.wants:
            facts["class-counts"] = _counts(examples.y, self.num_classes)
        if "class-totals" in objective.wants:
            if totals is None or len(totals) != self.num_classes:
                raise ClientError(
                    f"objective {type(objective).__name__} wants to know how many "
                    f"examples of each of {self.num_classes} classes all clients have, "
                    "and the server does not tell: its strategy takes "
                    "class_totals=True."
                )
            facts["class-totals"] = torch.tensor(totals, dtype=torch.float32)
        groups = self.groups(objective, examples)
        if groups is not None:
            facts["groups"] = _counts(groups, self.num_groups[objective.group])
        if "round" in objective.wants:
            facts["round"] = torch.tensor(float(round))
        return facts

    def heard(
        self, objective: Objective, told: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what an objective hears of what the server told a client.

        Numbers and lists of them, and by themselves values of each parameter, which all
        clients have in common. Of what is pooled nothing, where it is not known yet.

        Raises
        ------
        ClientError
            If it is not told, or is no number and no list of numbers.
        """
        heard: dict[str, Tensor] = {}
        of_parameters: dict[str, Tensor] = {}
        for name in objective.hears:
            value = told.get(name)
            if isinstance(value, Tensor):
                of_parameters[name] = value
                continue
            if value is None and name in objective.pools:
                continue
            if not isinstance(value, int | float | list) or value == []:
                raise ClientError(
                    f"objective {type(objective).__name__} hears '{name}' from the "
                    f"strategy, which tells {shown(value)}. Choose the strategy that "
                    "it belongs to, or another objective."
                )
            heard[TOLD + name] = torch.tensor(value, dtype=torch.float32)
        return heard, of_parameters

    def groups(
        self, objective: Objective, examples: Examples
    ) -> npt.NDArray[np.int64] | None:
        """Return the group of each example, ``[n]``, for an objective that wants it.

        Raises
        ------
        ClientError
            If the examples have no such attribute, or one that is no code of a group.
        """
        if "groups" not in objective.wants:
            return None
        return self.groups_by(objective.group, examples, "objective.group")

    def groups_by(
        self, name: str, examples: Examples, asked_by: str
    ) -> npt.NDArray[np.int64]:
        """Return the group of each example by an attribute, ``[n]``.

        Parameters
        ----------
        name : str
            The attribute's.
        examples : Examples
            Whose.
        asked_by : str
            Who wants to know, as a message begins.

        Raises
        ------
        ClientError
            If the examples have no such attribute, or one that is no code of a group.
        """
        if name not in examples.attributes or name not in self.num_groups:
            known = sorted(examples.attributes.keys() & self.num_groups.keys())
            raise ClientError(
                f"{asked_by}: the data have no groups '{name}'; they have "
                f"{', '.join(known) or 'none'}."
            )
        groups, number = examples.attributes[name], self.num_groups[name]
        if len(groups) and not 0 <= groups.min() <= groups.max() < number:
            raise ClientError(
                f"{asked_by}: the codes of '{name}' reach from {groups.min()} to "
                f"{groups.max()}, but there are {number} groups."
            )
        return groups.astype(np.int64)


def _counts(codes: npt.NDArray[np.int64], number: int) -> Tensor:
    return torch.from_numpy(np.bincount(codes, minlength=number).astype(np.float32))
