import math

import pytest

from fedweight.strategies import ClientRecord, RoundRecord
from fedweight.studies.columns import CLIENT_COLUMNS, ROUND_COLUMNS
from fedweight.studies.records import client_row, first_line, round_row, snake_case


def test_a_clients_metrics_become_columns():
    record = ClientRecord(7, "ok", weight=0.25, bytes_down=8, bytes_up=4)
    record.metrics = {
        "num-examples": 12.0,
        "num-steps": 3.0,
        "train-loss": 0.5,
        "cosine": -0.1,
        "evaluate-num-examples": 2.0,
        "evaluate-loss": 1.5,
        "evaluate-accuracy": 0.5,
    }
    assert client_row(4, record) == {
        "round": 4,
        "client": 7,
        "status": "ok",
        "reason": "",
        "weight": 0.25,
        "examples": 12,
        "steps": 3,
        "train_loss": 0.5,
        "cosine": -0.1,
        "held_out_examples": 2,
        "loss": 1.5,
        "accuracy": 0.5,
        "bytes_down": 8,
        "bytes_up": 4,
    }


def test_no_metric_of_a_client_can_hide_what_the_server_saw():
    record = ClientRecord(7, "rejected", "why", weight=0.5)
    record.metrics = dict.fromkeys(CLIENT_COLUMNS, 99.0)
    row = client_row(2, record)
    seen = {k: row[k] for k in ("round", "client", "status", "reason", "weight")}
    assert seen == {
        "round": 2,
        "client": 7,
        "status": "rejected",
        "reason": "why",
        "weight": 0.5,
    }


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_count_that_is_none_does_not_stop_the_record(value):
    record = ClientRecord(0, "ok", metrics={"num-steps": value})
    assert not math.isfinite(client_row(1, record)["steps"])


def test_a_round_counts_its_clients_and_spreads_their_accuracies():
    record = RoundRecord(3, "ok")
    statuses = ("ok", "ok", "rejected", "failed", "missing", "dropped", "evaluated")
    record.clients = [
        ClientRecord(k, status, bytes_down=10, bytes_up=1)
        for k, status in enumerate(statuses)
    ]
    record.clients[0].metrics["evaluate-accuracy"] = 0.2
    record.clients[6].metrics["evaluate-accuracy"] = 0.8
    record.metrics = {"num-steps": 5.0, "train-loss": 0.1, "effective-clients": 1.9}
    row = round_row(record, {"loss": 0.3, "accuracy": 0.9})
    assert row["asked"] == 6
    counted = ("ok", "rejected", "failed", "missing", "dropped")
    assert [row[status] for status in counted] == [2, 1, 1, 1, 1]
    assert (row["test_loss"], row["test_accuracy"]) == (0.3, 0.9)
    assert row["client_accuracy_mean"] == pytest.approx(0.5)
    assert row["client_accuracy_worst10"] == 0.2
    assert row["client_accuracy_best10"] == 0.8
    assert (row["train_loss"], row["effective_clients"]) == (0.1, 1.9)
    assert (row["bytes_down"], row["bytes_up"]) == (70, 7)
    assert "num_steps" not in row
    assert set(row) <= set(ROUND_COLUMNS)


def test_a_round_without_tests_has_no_test_columns_filled():
    row = round_row(RoundRecord(1, "failed", "line one\nline two"), {})
    assert row["status"] == "failed"
    assert row["reason"] == "line one"
    assert "test_accuracy" not in row
    assert math.isnan(row["client_accuracy_mean"])


def test_texts():
    assert snake_case("proxy-loss") == "proxy_loss"
    assert first_line("\n a, b\nc") == "a, b"
    assert first_line("") == ""
