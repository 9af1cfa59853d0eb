"""What a client's objective takes along from round to round, in the client's state."""

from __future__ import annotations

from typing import Any

from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from ..core.layout import as_tensor
from .steps.task import LocalResult

# Records of a client's state.
CARRY = "objective.carry"
KEPT = "objective.kept"


def read_state(
    state: RecordDict,
) -> tuple[dict[str, Tensor] | None, dict[str, Tensor]]:
    """Return what a client carries, and keeps of its examples, from earlier rounds."""
    carry = _arrays(state, CARRY) if CARRY in state else None
    return carry, _arrays(state, KEPT) if KEPT in state else {}


def write_state(state: RecordDict, result: LocalResult) -> None:
    """Put what a client takes along into its state."""
    for name, values in ((CARRY, result.carry), (KEPT, result.kept)):
        if values:
            state[name] = ArrayRecord(
                {part: Array(value.numpy()) for part, value in values.items()}
            )


def _arrays(state: RecordDict, name: str) -> dict[str, Tensor]:
    record: Any = state[name]
    return {part: as_tensor(array.numpy()) for part, array in record.items()}
