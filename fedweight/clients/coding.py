"""How classes and groups are coded, and what an objective wants to know of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core.errors import ClientError
from ..data.examples import Examples
from ..data.tasks import CLASSIFICATION
from ..metrics import TASKS, LearningTask
from .objectives.base import Objective


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
        name = objective.group
        if name not in examples.attributes or name not in self.num_groups:
            known = sorted(examples.attributes.keys() & self.num_groups.keys())
            raise ClientError(
                f"objective.group: the data have no groups '{name}'; they have "
                f"{', '.join(known) or 'none'}."
            )
        groups, number = examples.attributes[name], self.num_groups[name]
        if len(groups) and not 0 <= groups.min() <= groups.max() < number:
            raise ClientError(
                f"objective.group: the codes of '{name}' reach from {groups.min()} to "
                f"{groups.max()}, but there are {number} groups."
            )
        return groups.astype(np.int64)


def _counts(codes: npt.NDArray[np.int64], number: int) -> Tensor:
    return torch.from_numpy(np.bincount(codes, minlength=number).astype(np.float32))
