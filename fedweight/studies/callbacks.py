"""What is done after each round: stop early, keep the best model, ask the user's own.

All of it is decided by what clients measure on their own data, and none of it by the
test set.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord

from ..core.errors import ConfigurationError, DataError
from ..core.texts import plain, shown
from ..messages import keys
from ..metrics import measures
from ..server.loop import Callback, ServerState
from ..server.reported import as_number
from .columns import DECISIVE

log = logging.getLogger("fedweight")

BEST = "best-model.safetensors"
BEST_MODELS = "best-models.safetensors"


def _evaluated(name: str) -> Callable[[ServerState], Any]:
    return lambda state: state.evaluate_metrics.get(name)


@dataclass(frozen=True)
class Measure:
    """A metric of a round that a decision may rest on.

    Attributes
    ----------
    of : Callable
        Takes it from the loop's state.
    sign : int
        1 where more is better, -1 where less is.
    """

    of: Callable[[ServerState], Any]
    sign: int


MEASURES = {
    **{
        key: Measure(_evaluated(name), measures.MEASURES[name].sign)
        for key, name in DECISIVE.items()
    },
    keys.TRAIN_LOSS: Measure(
        lambda state: state.train_metrics.get(keys.TRAIN_LOSS), -1
    ),
}


class Best:
    """The best value of a metric so far, and the round it was measured in.

    Parameters
    ----------
    metric : str
        One of :data:`MEASURES`.
    delta : float
        What is better by no more than this is not better.

    Examples
    --------
    >>> best = Best("evaluate-loss", delta=0.1)
    >>> [best.improves(n, v) for n, v in enumerate([3.0, 2.95, 2.0, 2.0], 1)]
    [True, False, True, False]
    >>> best.round, best.value
    (3, 2.0)
    """

    def __init__(self, metric: str, delta: float = 0.0) -> None:
        self.metric = metric
        self.delta = delta
        self.round = 0
        self.value = math.nan
        self._told = False

    def hears(self, state: ServerState) -> bool:
        """Take in a round; return whether it is the best so far."""
        value = as_number(MEASURES[self.metric].of(state))
        value = math.nan if value is None else value
        if not math.isfinite(value) and not self._told:
            self._told = True
            log.warning(
                "round %d: the clients measured no %s, which counts as no improvement",
                state.round,
                self.metric,
            )
        return self.improves(state.round, value)

    def improves(self, number: int, value: float) -> bool:
        """Take in a round's value; return whether it is the best so far.

        Of equal values the first is. What is not finite never is.
        """
        if not math.isfinite(value):
            return False
        sign = MEASURES[self.metric].sign
        if self.round and not sign * (value - self.value) > self.delta:
            return False
        self.round, self.value = number, value
        return True

    @property
    def state(self) -> dict[str, Any]:
        """What is remembered, for :meth:`restore`."""
        return {"round": self.round, "value": self.value, "told": self._told}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what another one remembered."""
        self.round, self.value = state["round"], state["value"]
        self._told = state["told"]


class EarlyStopping:
    """Ends a run that has not improved for so many rounds; a callback of the loop.

    It counts from the first round on, so no run is shorter than ``after`` + 1 rounds.

    Parameters
    ----------
    metric : str
        One of :data:`MEASURES`.
    after : int
        So many rounds; 0 never ends a run.
    delta : float
        What is better by no more than this is no improvement.
    """

    def __init__(self, metric: str, after: int, delta: float = 0.0) -> None:
        self.best = Best(metric, delta)
        self.after = after
        self.reason = ""

    def __call__(self, state: ServerState) -> bool:
        """Take in a round; return whether to stop."""
        if not self.after:
            return False
        self.best.hears(state)
        waited = state.round - max(self.best.round, 1)
        if waited >= self.after:
            self.reason = self._why(state.round)
        return bool(self.reason)

    def _why(self, number: int) -> str:
        best = self.best
        if not best.round:
            return f"{best.metric} was not measured in any of {number} rounds"
        by = f" by more than {best.delta:g}" if best.delta else ""
        return (
            f"{best.metric} was {best.value:.4g} in round {best.round} and not "
            f"better{by} in the {self.after} round{'s' if self.after > 1 else ''} since"
        )

    @property
    def state(self) -> dict[str, Any]:
        """What is remembered, for :meth:`restore`."""
        return self.best.state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what another one remembered."""
        self.best.restore(state)


class BestModel:
    """Keeps the model that the clients' held-out data like best; a callback.

    Where a method keeps several global models, all of them: each client measures its
    own.

    Parameters
    ----------
    metric : str
        One of :data:`MEASURES`; empty: none is kept.
    folder : Path
        The run's.
    write : Callable
        Writes what clients use, given the round and the global model.
    """

    def __init__(
        self,
        metric: str,
        folder: Path,
        write: Callable[[int, ArrayRecord], None],
    ) -> None:
        self.best = Best(metric) if metric else None
        self.folder = folder
        self.write = write

    def __call__(self, state: ServerState) -> None:
        """Write the model if it is the best so far."""
        best = self.best
        if best is not None and best.hears(state):
            self.write(best.round, state.arrays)

    @property
    def state(self) -> dict[str, Any] | None:
        """What is remembered, for :meth:`restore`."""
        return None if self.best is None else self.best.state

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on with what another one remembered.

        The file may be of a later round than the checkpoint: then that round comes
        again, and writes the same.
        """
        if self.best is None or state is None:
            return
        self.best.restore(state)
        files = [self.folder / name for name in (BEST, BEST_MODELS)]
        if self.best.round and not any(path.is_file() for path in files):
            raise DataError(
                f"{files[0]} is missing, which was there when the checkpoint was "
                "written. Put it back, or run anew."
            )


class OwnCallbacks:
    """A user's callbacks, as one.

    Parameters
    ----------
    callbacks : Iterable[Callback]
        Called after every round, in this order, whatever the others return.
    """

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.callbacks = checked_callbacks(callbacks)
        self.reason = ""

    def __call__(self, state: ServerState) -> bool:
        """Call all; return whether one of them wants to stop."""
        for callback in self.callbacks:
            answer: Any = callback(state)
            if answer is not None and not isinstance(answer, bool | np.bool_):
                raise ConfigurationError(
                    f"callback {_name_of(callback)} returned {shown(answer)}. Return "
                    "True to stop, and False or nothing to go on."
                )
            if answer and not self.reason:
                self.reason = f"callback {_name_of(callback)} asked for it"
        return bool(self.reason)


def checked_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """Return a user's callbacks, if they are any."""
    if isinstance(callbacks, str) or not isinstance(callbacks, Iterable):
        raise ConfigurationError(
            f"callbacks must be a list of functions, got {shown(callbacks)}. Write "
            "callbacks=[f]."
        )
    several = tuple(callbacks)
    for number, callback in enumerate(several):
        if not callable(callback):
            raise ConfigurationError(
                f"callbacks[{number}] must be a function of the loop's state, got "
                f"{shown(callback)}."
            )
    return several


def _name_of(callback: Any) -> str:
    return plain(getattr(callback, "__qualname__", type(callback).__qualname__))
