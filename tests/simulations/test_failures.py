"""What Flower's log has of clients that raise."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedweight.core.errors import describe_failure
from fedweight.simulations import simulate
from fedweight.simulations.failures import tracebacks_once

log = logging.getLogger("flwr")


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += record.getMessage().splitlines()


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Give the lines that Flower's logger writes."""
    handler = _Lines()
    log.addHandler(handler)
    yield handler.lines
    log.removeHandler(handler)


def train(message: Message, context: Context) -> Message:
    """Fail by the client's number: always, by the round, or never."""
    client = int(context.node_config["partition-id"])
    number = int(message.content["config"]["server-round"])
    if client == 1:
        raise ValueError(f"no such column in round {number}\nnor in another")
    if client == 2 and number == 2:
        raise ValueError("elsewhere")
    if client == 2:
        raise KeyError("fraction")
    arrays = ArrayRecord({"model": Array(np.ones(1))})
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@pytest.mark.parametrize(
    ("options", "grids"),
    [
        ({"isolation": "none"}, None),
        pytest.param({"workers": 2}, "processes", marks=pytest.mark.processes),
        pytest.param(
            {"engine": "ray", "workers": 1}, "ray_grids", marks=pytest.mark.ray
        ),
    ],
)
def test_a_traceback_is_logged_once_for_each_client_and_error(
    options: Any, grids: str | None, logged: list[str], request: pytest.FixtureRequest
) -> None:
    if grids is not None:
        request.getfixturevalue(grids)  # What is defined here travels along.
        request.getfixturevalue("ready_ray")
    reasons: list[str] = []
    client_app, server_app = ClientApp(), ServerApp()
    client_app.train()(train)

    class Noting(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            replies = list(replies)
            reasons.extend(str(r.error.reason) for r in replies if r.has_error())
            return super().aggregate_train(server_round, replies)

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Noting(fraction_evaluate=0.0, min_available_nodes=3)
        start = ArrayRecord({"model": Array(np.zeros(1))})
        strategy.start(grid, start, num_rounds=4)

    done = simulate(server_app, client_app, 3, **options)
    said = [line.partition(": ")[2] for line in logged if "Received error" in line]
    # Every time a line; a text of several lines by its first.
    assert sorted(said) == sorted([
        "client 1, train: ValueError: no such column in round 1",
        "client 2, train: KeyError: 'fraction'",
        "client 1, train: ValueError: no such column in round 2",
        "client 2, train: ValueError: elsewhere",
        "client 1, train: ValueError: no such column in round 3",
        "client 2, train: KeyError: 'fraction'",
        "client 1, train: ValueError: no such column in round 4",
        "client 2, train: KeyError: 'fraction'",
    ])  # fmt: skip
    traced = "Traceback (most recent call last):"
    heads = [line for line in logged if traced in line]
    assert sorted(heads) == [f"(client {k}) {traced}" for k in (1, 2, 2)]
    places = [line for line in logged if line.endswith(", in train")]
    whose = [line.partition(" File ")[0] for line in places]
    assert sorted(whose) == [f"(client {k})  " for k in (1, 2, 2)]
    assert len(set(places)) == 3
    assert "(client 1) nor in another" in logged
    # What is recorded is whole: for the ServerApp, and afterwards.
    kept = [told["error"] for told in done.metrics["train"] if "error" in told]
    assert kept == reasons == done.seen.failures
    assert [reason.count(traced) for reason in reasons] == [1] * 8
    assert not log.filters


def reason(client: int, message: str = "odd") -> str:
    try:
        raise ValueError(message)
    except ValueError as error:
        return describe_failure(client, "query.size", error)


def test_what_is_no_traceback_is_logged_as_it_is(logged: list[str]) -> None:
    said = ["client 3, train: its worker process died: OOM", "two\nlines", "100 %"]
    with tracebacks_once():
        for text in said:
            for _ in range(2):
                log.warning("%s: %s", 7, text)
        log.warning("%(a)s", {"a": reason(1)})
        log.warning("100 %")
    lines = [line for text in said for line in [*f"7: {text}".split("\n")] * 2]
    assert logged[: len(lines)] == lines
    assert logged[-1] == "100 %"


def test_clients_and_runs_are_told_apart(logged: list[str]) -> None:
    for _ in range(2):
        with tracebacks_once():
            for client in (0, 1, 0, 1):
                log.warning("%s", reason(client, f"a message of {client}"))
        heads = [line.split(" Tr")[0] for line in logged if "Traceback" in line]
        assert heads == ["(client 0)", "(client 1)"]
        assert len([line for line in logged if line.startswith("client ")]) == 4
        logged.clear()
