"""What a client's objective takes along from round to round, in the client's state."""

from __future__ import annotations

from typing import Any, Literal

from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from ..core.layout import as_tensor
from .steps.task import LocalResult

# Whose state it is: that of local training, or of the personal model's.
Owner = Literal["objective", "personal"]


def read_state(
    state: RecordDict, owner: Owner
) -> tuple[dict[str, Tensor] | None, dict[str, Tensor]]:
    """Return what a client carries, and keeps of its examples, from earlier rounds."""
    carry, kept = f"{owner}.carry", f"{owner}.kept"
    return (
        _arrays(state, carry) if carry in state else None,
        _arrays(state, kept) if kept in state else {},
    )


def write_state(state: RecordDict, owner: Owner, result: LocalResult) -> None:
    """Put what a client takes along into its state."""
    parts = {f"{owner}.carry": result.carry, f"{owner}.kept": result.kept}
    for name, values in parts.items():
        if values:
            state[name] = ArrayRecord(
                {part: Array(value.numpy()) for part, value in values.items()}
            )


def _arrays(state: RecordDict, name: str) -> dict[str, Tensor]:
    record: Any = state[name]
    return {part: as_tensor(array.numpy()) for part, array in record.items()}
