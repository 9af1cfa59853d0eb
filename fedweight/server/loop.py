"""The server's loop: rounds over Flower's four public hooks, from any state on.

For Flower's strategies it gives the bits of their own ``start``. What the loop holds
between two rounds is one value, so a run can stop, be written down and go on.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from ..core.errors import ConfigurationError
from ..core.memory import settled
from ..messages.grids import staged
from .schedules import Clock, Schedule


@dataclass(frozen=True)
class ServerState:
    """What the loop holds between two rounds.

    Attributes
    ----------
    arrays : ArrayRecord
        The global model; of one with frozen or tied tensors the part that travels.
    round : int
        How many rounds are over.
    train_config, evaluate_config : ConfigRecord
        What the strategy is given to send. A strategy may change them, and finds them
        in the next round as it left them.
    schedule : Any
        What the schedule carries; ``None`` at first, and where there is none.
    train_metrics, evaluate_metrics : MetricRecord
        What the strategy made of the clients' metrics in the last round; empty before
        the first, and where it made nothing. Those of evaluation are measured on the
        clients' held-out data, of the new global model: ``loss`` and ``accuracy``.
    """

    arrays: ArrayRecord
    round: int = 0
    train_config: ConfigRecord = field(default_factory=ConfigRecord)
    evaluate_config: ConfigRecord = field(default_factory=ConfigRecord)
    schedule: Any = None
    train_metrics: MetricRecord = field(default_factory=MetricRecord)
    evaluate_metrics: MetricRecord = field(default_factory=MetricRecord)


class Callback(Protocol):
    """Called after every round; what it returns says whether to stop."""

    def __call__(self, state: ServerState) -> bool | None:
        """Return True to end the loop."""
        ...


@runtime_checkable
class ReadsAlone(Protocol):
    """A strategy that may have local models added up, where nobody else reads them."""

    def alone(self) -> AbstractContextManager[None]:
        """Return a ``with`` block in which nobody else reads the replies."""
        ...


@runtime_checkable
class Follows(Protocol):
    """A strategy that takes the updates that a schedule says."""

    def following(self, clock: Clock) -> AbstractContextManager[None]:
        """Return a ``with`` block in which a schedule says whose updates come."""
        ...


def federate(
    strategy: Strategy,
    grid: Grid,
    state: ServerState,
    *,
    until: int,
    timeout: float | None = None,
    schedule: Schedule | None = None,
    callbacks: Iterable[Callback] = (),
) -> ServerState:
    """Run rounds until so many are over.

    Parameters
    ----------
    strategy : Strategy
        Any Flower strategy.
    grid : Grid
        Where the clients are.
    state : ServerState
        What to go on from.
    until : int
        How many rounds are over at the end, those before ``state`` included.
    timeout : float, optional
        Seconds to wait for a round's replies.
    schedule : Schedule, optional
        When the next model is made, and of whose updates; by default of all clients
        that were asked, once they have answered. Others need one of this library's
        strategies, which no other strategy wraps.
    callbacks : Iterable[Callback]
        Called after every round, in this order; the first that returns True ends the
        loop after the others were called.

    Returns
    -------
    ServerState
        After the last round.
    """
    several = list(callbacks)
    itself = has_itself(strategy, ReadsAlone, "alone")
    alone = strategy.alone() if itself else nullcontext()  # type: ignore[attr-defined]
    if schedule is not None and not has_itself(strategy, Follows, "following"):
        raise ConfigurationError(
            f"schedule: {type(schedule).__name__} needs a strategy that is derived "
            "from fedweight.strategies.WeightingStrategy, and not inside another; got "
            f"{type(strategy).__name__}. Leave the schedule out."
        )
    with alone, settled():
        while state.round < until:
            state = _scheduled_round(strategy, grid, state, timeout, schedule)
            stops = [callback(state) for callback in several]
            if any(stops):
                break
    return state


def has_itself(strategy: Strategy, protocol: type, name: str) -> bool:
    """Tell whether a strategy can do something, and not what it wraps."""
    return hasattr(type(strategy), name) and isinstance(strategy, protocol)


def _scheduled_round(
    strategy: Strategy,
    grid: Grid,
    state: ServerState,
    timeout: float | None,
    schedule: Schedule | None,
) -> ServerState:
    if schedule is None:
        return _round(strategy, grid, state, timeout)
    clock = Clock(schedule, state.schedule)
    with strategy.following(clock):  # type: ignore[attr-defined]
        state = _round(strategy, grid, state, timeout)
    return replace(state, schedule=clock.state)


def _round(
    strategy: Strategy, grid: Grid, state: ServerState, timeout: float | None
) -> ServerState:
    """Train and aggregate, then evaluate the new global model."""
    number, arrays = state.round + 1, state.arrays
    messages = strategy.configure_train(number, arrays, state.train_config, grid)
    # What clients keep of a round that fails is dropped with it.
    with staged(grid) as keep:
        replies = grid.send_and_receive(messages, timeout=timeout)
        aggregated, trained = strategy.aggregate_train(number, replies)
        if aggregated is not None:
            arrays = aggregated
            keep()
    messages = strategy.configure_evaluate(number, arrays, state.evaluate_config, grid)
    replies = grid.send_and_receive(messages, timeout=timeout)
    evaluated = strategy.aggregate_evaluate(number, replies)
    return replace(
        state,
        round=number,
        arrays=arrays,
        train_metrics=trained or MetricRecord(),
        evaluate_metrics=evaluated or MetricRecord(),
    )
