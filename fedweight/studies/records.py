"""From what a strategy recorded to the rows of ``rounds.csv`` and ``clients.csv``."""

from __future__ import annotations

import math
from typing import Any

from ..metrics import client_spread
from ..strategies import ClientRecord, RoundRecord

Row = dict[str, Any]

ROUND_COLUMNS = (
    "round",
    "status",
    "reason",
    "asked",
    "ok",
    "rejected",
    "failed",
    "missing",
    "dropped",
    "effective_clients",
    "train_loss",
    "train_accuracy",
    "evaluate_loss",
    "evaluate_accuracy",
    "test_loss",
    "test_accuracy",
    "client_accuracy_mean",
    "client_accuracy_std",
    "client_accuracy_worst10",
    "client_accuracy_best10",
    "bytes_down",
    "bytes_up",
)

CLIENT_COLUMNS = (
    "round",
    "client",
    "status",
    "reason",
    "weight",
    "examples",
    "steps",
    "train_loss",
    "train_accuracy",
    "held_out_examples",
    "loss",
    "accuracy",
    "bytes_down",
    "bytes_up",
)

# A client's metrics whose column is not simply the name in snake_case.
CLIENT_NAMES = {
    "num-examples": "examples",
    "num-steps": "steps",
    "evaluate-num-examples": "held_out_examples",
    "evaluate-loss": "loss",
    "evaluate-accuracy": "accuracy",
}

COUNTS = {"examples", "steps", "held_out_examples"}


def client_row(number: int, record: ClientRecord) -> Row:
    """Return one client's row of a round."""
    row: Row = {}
    for name, value in record.metrics.items():
        column = CLIENT_NAMES.get(name, snake_case(name))
        whole = column in COUNTS and math.isfinite(value)
        row[column] = int(value) if whole else value
    row |= {f"own_{snake_case(name)}": v for name, v in record.own_metrics.items()}
    return row | {
        "round": number,
        "client": record.client,
        "status": record.status,
        "reason": first_line(record.reason),
        "weight": record.weight,
        "bytes_down": record.bytes_down,
        "bytes_up": record.bytes_up,
    }


def round_row(record: RoundRecord, test: dict[str, float]) -> Row:
    """Return a round's row; ``test`` is what the server measured, or empty."""
    statuses: list[str] = [c.status for c in record.clients]
    spread = client_spread(
        c.metrics.get("evaluate-accuracy", math.nan) for c in record.clients
    )
    counted = ("ok", "rejected", "failed", "missing", "dropped")
    return {
        **{
            snake_case(name): value
            for name, value in record.metrics.items()
            if name != "num-steps"
        },
        "round": record.number,
        "status": record.status,
        "reason": first_line(record.reason),
        "asked": sum(status != "evaluated" for status in statuses),
        **{status: statuses.count(status) for status in counted},
        **{f"test_{name}": value for name, value in test.items()},
        **{f"client_accuracy_{name}": value for name, value in spread.items()},
        "bytes_down": sum(c.bytes_down for c in record.clients),
        "bytes_up": sum(c.bytes_up for c in record.clients),
    }


def snake_case(name: str) -> str:
    """Return a metric's name as a column's.

    Examples
    --------
    >>> snake_case("proxy-loss")
    'proxy_loss'
    """
    return name.replace("-", "_")


def first_line(text: str) -> str:
    """Return the first line of a reason; a traceback is for the log."""
    return text.strip().split("\n", 1)[0]
