"""What is recorded of clients' statistics where the strategy is not ours."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict

from fedweight.messages import _flower
from fedweight.metrics import Statistics, task_named
from fedweight.studies.listener import Listener

REGRESSION = Statistics(task_named("regression"))


def evaluated(listener: Listener, rows: list[Any]) -> None:
    """Let clients answer an evaluation with these sums, or ``None`` for an error."""
    with _flower.task_identity(run_id=0):
        sent = RecordDict({"arrays": ArrayRecord([np.zeros(5, np.float32)])})
        answers = []
        for node, row in enumerate(rows, 10):
            asked = Message(sent, node, "evaluate")
            if row is None:
                answers.append(Message(Error(2, "no power"), reply_to=asked))
                continue
            metrics = MetricRecord({"num-examples": 10, "statistics": row})
            told = RecordDict({"metrics": metrics})
            answers.append(Message(told, reply_to=asked))
    given = listener.measures(REGRESSION, lambda number, replies: replies)(1, answers)
    assert given == answers


def test_the_rows_tell_what_is_measured_and_whose_sums_cannot_be(
    caplog: pytest.LogCaptureFixture,
) -> None:
    records: list[Any] = []
    listener = Listener(records, lambda node: node - 10, ["Bern", "", ""].__getitem__)
    good, odd = [10.0, 40.0, 40.0, 0.0, 10.0], [10.0, 40.0, -1.0, 0.0, 10.0]
    evaluated(listener, [good, odd, good])
    assert listener.measured == {"evaluate-rmse": 2.0, "evaluate-r2": -3.0}
    (record,) = records
    why = "its statistics have impossible 'squared-error'"
    assert [(c.client, c.name, c.status, c.reason) for c in record.clients] == [
        (0, "Bern", "evaluated", ""),
        (1, "", "evaluated", f"evaluation: {why}"),
        (2, "", "evaluated", ""),
    ]
    measures = {"evaluate-rmse": 2.0, "evaluate-r2": -3.0}
    assert [c.metrics for c in record.clients] == [measures, {}, measures]
    lines = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert lines == [f"round 1: client 1 failed: evaluation: {why}"]


@pytest.mark.parametrize("rows", [[], [None, None]])
def test_where_every_evaluation_fails_nothing_is_measured(rows: list[Any]) -> None:
    records: list[Any] = []
    listener = Listener(records, lambda node: node - 10)
    listener.measured = {"evaluate-rmse": 1.0}
    evaluated(listener, rows)
    assert listener.measured == {}
    assert records == []
