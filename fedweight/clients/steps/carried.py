"""What clients of a chunk know and carry besides their models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from ...core.errors import ClientError
from ...core.layout import as_tensor
from ...data.examples import Examples
from ..objectives.base import Facts, Objective, defines, tracks
from ..objectives.checks import check_carry
from .task import Task

Named = Mapping[str, Tensor]
Predict = Callable[[Examples], Tensor]


@dataclass(frozen=True)
class Carried:
    """What an objective knows of C clients, and what they carry.

    Attributes
    ----------
    facts, carry : dict[str, Tensor]
        ``[C, ...]``, by name.
    kept : dict[str, Tensor]
        ``[C, N + 1]``: a value of each example of the client that has most, N, and a
        place for padding.
    shared : dict[str, Tensor]
        ``[P]`` each: what all clients are told alike.
    """

    facts: dict[str, Tensor] = field(default_factory=dict)
    carry: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        objective: Objective,
        tasks: Sequence[Task],
        received: Tensor,
        device: torch.device,
        predict: Predict,
    ) -> Self:
        """Lay out what some clients know and carry.

        Parameters
        ----------
        objective : Objective
            Says what is carried at first.
        tasks : Sequence[Task]
            With what they carry from earlier rounds.
        received : Tensor
            ``[P]``: the parameters of the global model.
        device : torch.device
            Where it is put.
        predict : Callable[[Examples], Tensor]
            Returns the global model's logits, for an objective that looks at them.
        """
        if not tracks(objective):
            return cls()
        of_clients = [facts_of(task, received) for task in tasks]
        carries = [carry_of(objective, task, received, predict) for task in tasks]
        kept = {}
        for name, value in objective.per_example.items():
            longest = max(len(task.examples) for task in tasks)
            rows = torch.full((len(tasks), longest + 1), value, dtype=received.dtype)
            for row, task in zip(rows, tasks, strict=True):
                row[:-1][: len(task.examples)] = kept_of(name, value, task)
            kept[name] = rows.to(device)
        shared = shared_of(tasks[0], received)
        return cls(
            _stacked(of_clients, device),
            _stacked(carries, device),
            kept,
            # A copy: memory that is kept is written to.
            {name: shared[name].to(device, copy=True) for name in sorted(shared)},
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All of it."""
        parts = (self.facts, self.carry, self.kept, self.shared)
        return [tensor for part in parts for tensor in part.values()]

    @property
    def shapes(self) -> tuple[Any, ...]:
        """The shapes of all of it."""
        return tuple(tensor.shape for tensor in self.tensors)

    def on_cpu(self) -> Carried:
        """Return what is carried and kept, of all clients brought to the CPU."""
        parts = self.carry, self.kept
        carry, kept = ({n: v.cpu() for n, v in part.items()} for part in parts)
        return Carried(carry=carry, kept=kept)

    def of_client(self, k: int, size: int) -> tuple[Named, Named]:
        """Return what client k of the chunk carries, and keeps of its examples."""
        carry = {name: values[k] for name, values in self.carry.items()}
        return carry, {name: rows[k, :size] for name, rows in self.kept.items()}


def facts_of(task: Task, received: Tensor) -> Named:
    """Return what the objective knows of a client, in the model's dtype."""
    return {name: value.to(received.dtype) for name, value in task.known.facts.items()}


def shared_of(task: Task, received: Tensor) -> Named:
    """Return what all clients are told alike, in the model's dtype."""
    return {name: value.to(received.dtype) for name, value in task.known.shared.items()}


def carry_of(
    objective: Objective, task: Task, received: Tensor, predict: Predict
) -> Named:
    """Return what a client carries into a round.

    Parameters
    ----------
    objective : Objective
        Says what that is at first.
    task : Task
        The client's.
    received : Tensor
        ``[P]``: the parameters of the global model.
    predict : Callable[[Examples], Tensor]
        Returns the global model's logits on some examples, ``[n, C]``.
    """
    carry = task.known.carry
    if carry is None:
        facts = Facts(received, facts_of(task, received), {}, shared_of(task, received))
        carry = objective.begin(facts)
        if not isinstance(carry, Mapping):
            raise ClientError(
                f"objective {type(objective).__name__}: begin returned "
                f"{type(carry).__name__}. Return tensors by name."
            )
        for name, value in carry.items():
            if not isinstance(value, Tensor):
                raise ClientError(
                    f"objective {type(objective).__name__}: begin returned "
                    f"{type(value).__name__} for '{name}'. Return tensors by name."
                )
    if defines(objective, "look"):
        facts = Facts(
            received, facts_of(task, received), carry, shared_of(task, received)
        )
        labels = as_tensor(task.examples.y).clone()  # Its own, whatever it does.
        found = objective.look(partial(predict, task.examples), labels, facts)
        check_carry(objective, "look", found, carry)
        carry = {**carry, **found}
    return carry


def kept_of(name: str, value: float, task: Task) -> Tensor | float:
    """Return what is kept of a client's examples, ``[n]``, or what it is at first."""
    kept = task.known.kept.get(name)
    if kept is not None and len(kept) != len(task.examples):
        raise ClientError(
            f"objective: '{name}' was kept of {len(kept)} examples, and the client has "
            f"{len(task.examples)} now. Its data must stay the same over the rounds."
        )
    return value if kept is None else kept


def _stacked(parts: Sequence[Named], device: torch.device) -> dict[str, Tensor]:
    """Return what several clients have, ``[C, ...]`` by name, always in one order.

    A traced step takes tensors by their places, and is used again in later rounds.
    """
    return {
        name: torch.stack([part[name] for part in parts]).to(device)
        for name in sorted(parts[0])
    }
