"""Probes: what a client measures for a strategy, besides training.

A strategy asks for probes by name. The client runs the function that it has under that
name itself, in :data:`~fedweight.clients.registries.PROBES` or in its app's ``probes``;
never one that a message brings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from torch import Tensor

from ..core.errors import ClientError, ConfigurationError
from ..core.layout import FlatModel, as_tensor
from ..core.registry import Registry
from ..core.texts import shown
from ..messages import keys
from ..messages.arrays import FlatRecord, flatten

if TYPE_CHECKING:
    from ..data.examples import Examples
    from ..data.federated import ClientData
    from .coding import Coding
    from .peers import Peers
    from .settings import TrainingSettings

# The last one is the held-out part, or the training data where there is none.
Part = Literal["train", "held-out", "held-out or train"]

# What every reply to a train message reports.
REPORTED = (keys.NUM_EXAMPLES, keys.TRAIN_LOSS, keys.TRAIN_ACCURACY, keys.NUM_STEPS)

# What every reply to an evaluate message reports besides its size.
EVALUATED = (keys.LOSS, keys.ACCURACY)

# What of it only examples that have a class can be asked.
OF_CLASSES = frozenset({keys.LABEL_COUNTS})

# What only a task can be asked in which a model's score lies between 0 and 1.
SCORES = frozenset(
    {
        keys.ACCURACY_BEFORE,
        keys.ACCURACY_AFTER,
        keys.HELD_OUT_ACCURACY_BEFORE,
        keys.HELD_OUT_ACCURACY_AFTER,
        keys.MINUS_ERROR,
    }
)


class Evaluation(NamedTuple):
    """A model's mean loss, accuracy and score; all NaN without examples.

    The loss is the task's, such as cross-entropy; the accuracy is NaN where a
    prediction is not simply right or wrong. The score is what the task calls so: the
    accuracy, or for masks of pixels Dice, which is NaN where there is nothing but
    background, and nothing else was found.
    """

    loss: float
    accuracy: float
    score: float = math.nan


@dataclass
class ClientRound:
    """What a probe sees: one client in one round, after its local training.

    Attributes
    ----------
    client : int
        The client's number.
    number : int
        The round, from 1.
    told : Mapping[str, Any]
        What the server told the client.
    data : ClientData
        The client's examples: ``data.train`` and ``data.held_out``, each with arrays
        ``x`` and ``y``.
    num_classes : int
        C; 0 where numbers are predicted.
    received : FlatModel
        The global model as received; to be read only.
    num_steps : int
        How many steps were made.
    settings : TrainingSettings
        What they were made with.
    learning_rate : float
        Of this round.
    """

    client: int
    number: int
    told: Mapping[str, Any]
    data: ClientData
    num_classes: int
    received: FlatModel
    _model: FlatModel | Callable[[], FlatModel]
    num_steps: int
    settings: TrainingSettings
    learning_rate: float
    _peers: Peers
    _coding: Coding
    _state: RecordDict
    _new: dict[str, ArrayRecord | MetricRecord] = field(default_factory=dict)

    @cached_property
    def trained(self) -> FlatModel:
        """The local model; to be read only."""
        return self._model() if callable(self._model) else self._model

    def evaluate(
        self, model: FlatModel | ClientModel, part: Part = "train"
    ) -> Evaluation:
        """Return a model's loss, accuracy and score on a part of the client's data.

        Clients that train at once are evaluated at once, when the first of them asks:
        the received model, their trained ones, or what a function makes of each.

        Parameters
        ----------
        model : FlatModel or Callable[[ClientRound], FlatModel or None]
            The :attr:`received` one, the :attr:`trained` one, another; or a function
            that makes the client's own, or ``None`` where it has none. It must be the
            same function for all.
        part : {"train", "held-out", "held-out or train"}
            Of which examples; the last is the training data where there are no others.
        """
        return self._peers.evaluation(self, model, part)

    def outputs(self, part: Part = "train") -> Tensor:
        """Return what the received model makes of a part's examples, ``[n, ...]``."""
        return self._peers.outputs(self, part)

    def losses(self, part: Part = "train") -> Tensor:
        """Return the task's loss of each of a part's examples, ``[n]``, likewise."""
        labels = as_tensor(self.part(part).y)
        if not len(labels):
            return torch.zeros(0)
        return self._coding.task.example_losses(self.outputs(part), labels)

    def groups(
        self, attribute: str, part: Part = "train"
    ) -> tuple[npt.NDArray[np.int64], int]:
        """Return the group of each example, ``[n]``, and how many groups there are.

        Raises
        ------
        ClientError
            If the examples have no groups by that attribute.
        """
        found = self._coding.groups_by(attribute, self.part(part), "group")
        return found, self._coding.num_groups[attribute]

    def part(self, name: Part) -> Examples:
        """Return a part of the client's data."""
        if name == "train" or (name != "held-out" and not len(self.data.held_out)):
            return self.data.train
        return self.data.held_out

    def kept_model(self, name: str) -> FlatModel | None:
        """Return what :meth:`keep` was given in an earlier round, if anything."""
        record: Any = self._state.get(name)
        return None if record is None else flatten(record, self.received.layout)

    def kept_numbers(self, name: str) -> list[float]:
        """Return what :meth:`keep` was given in an earlier round; else nothing."""
        record: Any = self._state.get(name)
        return [] if record is None else list(record["values"])

    def keep(self, name: str, value: FlatModel | Sequence[float]) -> None:
        """Keep a model or some numbers for later rounds, if this one succeeds.

        They stay with the client, in Flower's ``Context.state``. Begin the name with
        the probe's.
        """
        if isinstance(value, FlatModel):
            self._new[name] = FlatRecord(value)
        else:
            self._new[name] = MetricRecord({"values": [float(v) for v in value]})

    def commit(self) -> None:
        """Put what was kept into the client's state: nothing can fail any more."""
        for name, record in self._new.items():
            self._state[name] = record


def check_named(kind: str, owner: str, given: Any, registered: Registry) -> None:
    """Refuse probes or queries that are not functions by names of their own.

    Raises
    ------
    ConfigurationError
        With the one that is not.
    """
    many = f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"
    if not isinstance(given, Mapping):
        raise ConfigurationError(
            f"{owner}: {many} must be a dictionary of functions by name, got "
            f"{shown(given)}."
        )
    for name, function in given.items():
        if name in registered.entries or name in (*REPORTED, *EVALUATED):
            raise ConfigurationError(
                f"{owner}: there is a {kind} '{name}' already, or a metric of this "
                "name. Choose another name."
            )
        if not isinstance(name, str) or not name or not callable(function):
            raise ConfigurationError(
                f"{owner}: {many} must be functions by name, got {shown(function)} for "
                f"{shown(name)}."
            )


ClientModel = Callable[[ClientRound], "FlatModel | None"]
"""Makes a model of a client's own."""

Probe = Callable[[ClientRound], "float | Sequence[float]"]
"""Measures a number, or a list of numbers, which is sent as side data."""


def class_counts(examples: Examples, num_classes: int) -> list[int]:
    """Return how many examples are of each class, ``[C]``; refuse those without one."""
    if examples.y.ndim != 1 or examples.y.dtype.kind == "f":
        raise ClientError(
            f"its examples have no class each to count: their targets are "
            f"{examples.y.dtype} of shape {list(examples.y.shape)}"
        )
    return [int(c) for c in np.bincount(examples.y, minlength=num_classes)]


def label_counts(client: ClientRound) -> list[int]:
    """Return how many training examples of each class the client has: ``[C]``."""
    return class_counts(client.data.train, client.num_classes)


def loss_before(client: ClientRound) -> float:
    """Return the received model's mean loss on the training examples."""
    return client.evaluate(client.received).loss


def loss_after(client: ClientRound) -> float:
    """Return the locally trained model's mean loss on the training examples."""
    return client.evaluate(client.trained).loss


def accuracy_before(client: ClientRound) -> float:
    """Return the received model's accuracy on the training examples."""
    return client.evaluate(client.received).accuracy


def accuracy_after(client: ClientRound) -> float:
    """Return the locally trained model's accuracy on the training examples."""
    return client.evaluate(client.trained).accuracy


def held_out_loss_before(client: ClientRound) -> float:
    """Return the received model's mean loss on the held-out examples."""
    return client.evaluate(client.received, "held-out").loss


def held_out_loss_after(client: ClientRound) -> float:
    """Return the locally trained model's mean loss on the held-out examples."""
    return client.evaluate(client.trained, "held-out").loss


def held_out_accuracy_before(client: ClientRound) -> float:
    """Return the received model's accuracy on the held-out examples."""
    return client.evaluate(client.received, "held-out").accuracy


def held_out_accuracy_after(client: ClientRound) -> float:
    """Return the locally trained model's accuracy on the held-out examples."""
    return client.evaluate(client.trained, "held-out").accuracy


def group_counts(client: ClientRound) -> list[int]:
    """Return how many training examples of each group the client has: ``[G]``.

    Groups are those of the attribute that the server tells as ``group``.
    """
    codes, number = client.groups(str(client.told.get(keys.GROUP)))
    return [int(n) for n in np.bincount(codes, minlength=number)]


def group_losses(client: ClientRound) -> list[float]:
    """Return the sum of the received model's losses on each group's, ``[G]``."""
    codes, number = client.groups(str(client.told.get(keys.GROUP)))
    losses = client.losses().double().numpy()
    return [float(v) for v in np.bincount(codes, losses, minlength=number)]
