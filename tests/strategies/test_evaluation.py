"""What clients' statistics say of the global model, and which are believed."""

from __future__ import annotations

import logging

from fedweight.metrics import Statistics, task_named
from fedweight.server.known_errors import KnownErrors
from fedweight.strategies.fedavg import FedAvg


def evaluated(kit, rows, **metrics):
    """Evaluate a regression by clients of 10 examples each, who send these sums."""
    which = Statistics(task_named("regression"))
    clients = {k: kit.Client([1.0], 10) for k in range(len(rows))}
    strategy = FedAvg(statistics=which)
    run = kit.Federation(strategy, clients, kit.record({"w": [0.0]}))
    record = run.round()
    messages = run.strategy.configure_evaluate(1, run.arrays, run.config, run.grid)
    replies = run.grid.send_and_receive(messages)
    for k, (reply, row) in enumerate(zip(replies, rows, strict=True)):
        own = reply.content.metric_records["metrics"]
        own["statistics"] = row
        for name, values in metrics.items():
            own[name] = values[k]
    return record, run.strategy.aggregate_evaluate(1, replies)


# Of 10 examples: loss, squared error, targets, squared targets.
BELIEVED = [10.0, 40.0, 40.0, 0.0, 10.0]


def test_an_evaluation_whose_statistics_cannot_be_is_rejected(kit):
    odd = [10.0, 1e7, -1.0, 0.0, 10.0]
    record, found = evaluated(kit, [BELIEVED, odd, BELIEVED], loss=[4.0, 1e6, 4.0])
    assert dict(found) == {"loss": 4.0, "rmse": 2.0, "r2": -3.0}
    assert record.metrics["evaluate-loss"] == 4.0
    why = "evaluation failed: its statistics have impossible 'squared-error'"
    assert [c.reason for c in record.clients] == ["", why, ""]
    assert not [n for n in record.clients[1].metrics if n.startswith("evaluate")]
    assert record.clients[0].metrics["evaluate-rmse"] == 2.0


def test_where_no_evaluation_is_believed_there_is_none(kit):
    record, found = evaluated(kit, [[10.0], [9.0, *BELIEVED[1:]]], loss=[1.0, 1.0])
    assert found is None
    assert "list of 5 numbers" in record.clients[0].reason
    assert record.clients[1].reason == (
        "evaluation failed: its statistics are not of as many examples as it says"
    )
    assert not [n for n in record.metrics if n.startswith("evaluate")]


def test_a_measure_that_is_left_out_is_told_once(kit, caplog):
    alike = [10.0, 40.0, 40.0, 10.0, 10.0]  # Targets without spread have no R2.
    _, found = evaluated(kit, [alike, alike], loss=[4.0, 4.0])
    assert dict(found) == {"loss": 4.0, "rmse": 2.0}
    lines = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert lines == ["round 1: 'r2' of all clients together is not finite and left out"]
    errors = KnownErrors()
    caplog.clear()
    for number in (1, 2, 3):
        errors.left_out(number, ["r2"] if number < 3 else ["r2", "rmse"])
    lines = [r.message for r in caplog.records]
    assert [line.split(" of ")[0] for line in lines] == [
        "round 1: 'r2'",
        "round 3: 'rmse'",
    ]
