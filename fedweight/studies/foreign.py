"""What a run sees to around strategies that are not of this library."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from ..core.layout import Base
from ..messages.arrays import view
from ..messages.grids import staged

log = logging.getLogger("fedweight")


def keep_frozen(strategy: Strategy, base: Base) -> None:
    """Let what a strategy makes of whole models have the frozen tensors as they were.

    The mean of equal values is not always that value, to the bit.
    """
    log.warning(
        "the whole model travels, frozen and tied tensors too: %s is not derived "
        "from fedweight.strategies.WeightingStrategy",
        type(strategy).__name__,
    )
    aggregate = strategy.aggregate_train

    def aggregating(server_round: int, replies: Iterable[Message]) -> Any:
        arrays, metrics = aggregate(server_round, replies)
        return None if arrays is None else with_base(arrays, base), metrics

    strategy.aggregate_train = aggregating  # type: ignore[method-assign]


@contextmanager
def settling(strategy: Strategy, grid: Grid) -> Iterator[None]:
    """Drop in a ``with`` block what clients keep of rounds in which no model is made.

    For a strategy that runs its rounds itself: what clients have written since the last
    call of ``aggregate_train`` belongs to the next one.
    """
    aggregate, own = strategy.aggregate_train, vars(strategy)
    before = own.copy()
    with ExitStack() as stack:
        keep = stack.enter_context(staged(grid))

        def aggregating(server_round: int, replies: Iterable[Message]) -> Any:
            nonlocal keep
            found = aggregate(server_round, replies)
            if found[0] is not None:
                keep()
            stack.close()
            keep = stack.enter_context(staged(grid))
            return found

        own["aggregate_train"] = aggregating  # Ours are frozen dataclasses.
        try:
            yield
        finally:
            del own["aggregate_train"]
            if "aggregate_train" in before:
                own["aggregate_train"] = before["aggregate_train"]


def with_base(arrays: ArrayRecord, base: Base) -> ArrayRecord:
    """Return a record in which the frozen tensors have the bits of a base.

    Those that it leaves out stay out.
    """
    changed = {
        name: values
        for name, values in base.alone.named_arrays()
        if name in arrays and not _same_bits(view(arrays[name]), values)
    }
    if changed:
        arrays = arrays.copy()
        for name, values in changed.items():
            arrays[name] = Array(values)
    return arrays


def _same_bits(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and (
        one.tobytes() == other.tobytes()
    )
