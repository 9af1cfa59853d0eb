"""What local training minimises where a task is not classification."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor

from ..core.errors import ConfigurationError
from ..metrics import LearningTask
from .objectives import OBJECTIVES
from .objectives.base import Around, Batch, Facts, Objective
from .objectives.checks import check_around
from .objectives.plain import Plain


@dataclass(frozen=True, eq=False)
class TaskLoss(Objective):
    """The mean of a task's own loss, such as the squared error.

    Parameters
    ----------
    task : LearningTask
        What is predicted.
    """

    task: LearningTask

    def example_losses(self, outputs: Tensor, batch: Batch, facts: Facts) -> Tensor:
        """Return the task's loss of each example."""
        return self.task.example_losses(outputs, batch.y)


def for_task(objective: Objective, task: LearningTask) -> Objective:
    """Return an objective as it is minimised for a task.

    Plain training minimises the task's loss, also inside another objective, such as a
    proximal one. One of the user's own is taken as it is.

    Raises
    ------
    ConfigurationError
        If the objective is for other tasks, or of examples that have a class each, and
        these have none; or if it leaves out the loss of one that it is around.
    """
    if isinstance(objective, Around):
        check_around(objective)
        inner = for_task(objective.inner, task)
        if inner is objective.inner:
            return objective
        changed = copy.copy(objective)
        object.__setattr__(changed, "inner", inner)
        return changed
    if type(objective) is Plain:
        return objective if task.has_classes else TaskLoss(task)
    name, others = OBJECTIVES.name_of(type(objective)), "'plain', 'proximal', 'sam'"
    if objective.tasks and task.name not in objective.tasks:
        raise ConfigurationError(
            f"objective '{name}' is for {' and '.join(objective.tasks)}, and the data "
            f"are for {task.name}. Choose {others}, or one of your own."
        )
    if not (task.has_classes or objective.tasks) and name in OBJECTIVES.entries:
        raise ConfigurationError(
            f"objective '{name}' is for examples that have a class, and those of "
            f"{task.name} {task.instead}. Choose {others}, or one of your own."
        )
    return objective
