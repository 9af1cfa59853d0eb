"""What local training is given, and what it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ...core.errors import ClientError, check_range
from ...core.layout import FlatModel
from ...data.examples import Examples
from ...data.parts import Parts

_NOTHING: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Known:
    """What an objective knows of a client, and what the client has kept for it.

    Attributes
    ----------
    facts : Mapping[str, Tensor]
        What the objective wants to know.
    carry : Mapping[str, Tensor], optional
        What the client carries from earlier rounds; ``None`` before its first one.
    kept : Mapping[str, Tensor]
        ``[n]`` each: what was kept of its examples in earlier rounds.
    groups : ndarray, optional
        ``[n]``: the group of each example, where the objective wants it.
    shared : Mapping[str, Tensor]
        ``[P]`` each: what the server tells all clients alike.
    """

    facts: Mapping[str, Tensor] = field(default_factory=dict)
    carry: Mapping[str, Tensor] | None = None
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    groups: npt.NDArray[np.int64] | None = None
    shared: Mapping[str, Tensor] = field(default_factory=dict)


NOTHING_KNOWN = Known()


@dataclass(frozen=True)
class Task:
    """One client's local training in one round.

    Attributes
    ----------
    examples : Examples
        Its training data.
    epochs : int
        Passes over them, 1 or more.
    order_key : int
        The key of the stream that orders the examples of every pass.
    noise_key : int
        The key, below 2**63, of the noise inside the model, such as dropout's.
    known : Known
        What the objective knows of the client.
    own : FlatModel, optional
        What it trains, where that is not the received model.
    """

    examples: Examples
    epochs: int
    order_key: int
    noise_key: int = 0
    known: Known = NOTHING_KNOWN
    own: FlatModel | None = None

    def __post_init__(self) -> None:
        """Check the range."""
        if self.epochs < 1:  # Asked first: there is one for each client and round.
            check_range("epochs", self.epochs, 1)


@dataclass(frozen=True, eq=False)
class Tasks(Sequence[Task]):
    """The tasks of several clients, as columns; each one is made when it is asked for.

    Attributes
    ----------
    examples : Sequence[Examples]
        Their training data: :class:`~fedweight.data.parts.Parts` where those are rows
        of the same arrays.
    epochs : ndarray
        ``[C]``, int64.
    order_keys, noise_keys : ndarray
        ``[C]``, uint64.
    known : Sequence[Known], optional
        What the objective knows of each.
    own : Sequence[FlatModel or None], optional
        What each trains, where that is not the received model.
    """

    examples: Sequence[Examples]
    epochs: npt.NDArray[np.int64]
    order_keys: npt.NDArray[np.uint64]
    noise_keys: npt.NDArray[np.uint64]
    known: Sequence[Known] | None = None
    own: Sequence[FlatModel | None] | None = None

    @classmethod
    def of(cls, tasks: Sequence[Task]) -> Tasks:
        """Return tasks as columns."""
        if isinstance(tasks, Tasks):
            return tasks
        own = [task.own for task in tasks]
        return cls(
            [task.examples for task in tasks],
            np.array([task.epochs for task in tasks], np.int64),
            np.array([task.order_key for task in tasks], np.uint64),
            np.array([task.noise_key for task in tasks], np.uint64),
            [task.known for task in tasks],
            own if any(model is not None for model in own) else None,
        )

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """How many examples each client has, ``[C]``."""
        if isinstance(self.examples, Parts):
            return self.examples.sizes
        return np.array([len(one) for one in self.examples], np.int64)

    def __len__(self) -> int:
        """Return C."""
        return len(self.epochs)

    @overload
    def __getitem__(self, k: int) -> Task: ...
    @overload
    def __getitem__(self, k: slice) -> Tasks: ...
    def __getitem__(self, k: int | slice) -> Task | Tasks:
        if isinstance(k, slice):
            return self.take(range(*k.indices(len(self))))
        return Task(
            self.examples[k],
            int(self.epochs[k]),
            int(self.order_keys[k]),
            int(self.noise_keys[k]),
            NOTHING_KNOWN if self.known is None else self.known[k],
            None if self.own is None else self.own[k],
        )

    def take(self, clients: Sequence[int]) -> Tasks:
        """Return those of some of the clients, by their places here."""
        examples = self.examples
        some = np.asarray(clients, np.int64)
        return Tasks(
            examples.take(some)
            if isinstance(examples, Parts)
            else [examples[k] for k in clients],
            self.epochs[some],
            self.order_keys[some],
            self.noise_keys[some],
            None if self.known is None else [self.known[k] for k in clients],
            None if self.own is None else [self.own[k] for k in clients],
        )


class LocalResult(NamedTuple):
    """What local training made.

    ``loss`` and ``accuracy`` are means over the examples as training met them; NaN
    for a client without data, whose model is the received one. Where numbers are
    predicted the accuracy means nothing. ``carry`` and ``kept`` are what it takes along
    to its next round.
    """

    model: FlatModel
    loss: float
    accuracy: float
    num_steps: int
    carry: Mapping[str, Tensor] = _NOTHING
    kept: Mapping[str, Tensor] = _NOTHING


def groups_of(task: Task) -> npt.NDArray[np.int64]:
    """Return the group of each example of a client whose objective wants them."""
    if task.known.groups is None:
        raise ClientError(
            "objective: it wants the groups of examples, and these have none."
        )
    return task.known.groups
