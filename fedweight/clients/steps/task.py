"""What local training is given, and what it makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ...core.errors import ClientError, check_range
from ...core.layout import FlatModel
from ...data.examples import Examples

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
