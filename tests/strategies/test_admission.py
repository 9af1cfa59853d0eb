"""What of a reply is believed, and what one client can do at most."""

from __future__ import annotations

import copy
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedweight import Run
from fedweight.core.errors import AggregationError, ConfigurationError
from fedweight.messages import _flower, keys
from fedweight.server.admission import size_of
from fedweight.server.known_errors import MOST
from fedweight.strategies import PerParameter, Vector, WeightingStrategy
from fedweight.strategies.checks import LARGEST_VALUE
from fedweight.strategies.fedavg import FedAvg
from fedweight.strategies.fedce import FedCE
from fedweight.strategies.feddisco import FedDisco
from fedweight.strategies.fedlaw import FedLAW
from fedweight.strategies.ida import IDA
from fedweight.strategies.server_optimizers import ServerAdam
from fedweight.strategies.weights import cap, size_weights
from fedweight.studies.columns import CLIENT_COLUMNS
from fedweight.studies.folder import Table
from fedweight.studies.records import client_row


def federation(kit, strategy, rows, sizes=None, dtype=np.float64):
    rows = [np.asarray(row, dtype) for row in rows]
    clients = {
        k: kit.Client(row, 10.0 if sizes is None else sizes[k])
        for k, row in enumerate(rows)
    }
    start = kit.record({"w": np.zeros(len(rows[0]), dtype)})
    return kit.Federation(strategy, clients, start)


# What a reply may hold.


def crafted(kind):
    """Bytes that claim to be an array of two numbers, as any program can send them."""
    header = {
        "nested": b"(" * 9_000,
        "minus": b"-" * 9_000 + b"1",
        "long": b"{'descr': '<f8', 'fortran_order': False, 'shape': (2,), }" * 200,
        "objects": b"{'descr': '|O', 'fortran_order': False, 'shape': (2,), }",
        "names": b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,), }",
        "huge": b"{'descr': '<f8', 'fortran_order': False, 'shape': (%d,), }" % 10**15,
    }[kind]
    size = len(header) + 1
    return (
        b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + header + b"\n" + bytes(16)
    )


def replace_reply(kit, run, client, change):
    """Let one client's reply be changed on its way."""

    def arrange(replies):
        for reply in replies:
            if run.grid.client_of(reply.metadata.src_node_id) == client:
                change(reply)
        return replies

    run.grid.arrange = arrange


@pytest.mark.parametrize(
    "kind", ["nested", "minus", "long", "objects", "names", "huge"]
)
def test_a_crafted_array_is_that_clients_own_trouble(kit, kind):
    run = federation(kit, FedAvg(), [[1.0, 2.0]] * 3)

    def change(reply):
        reply.content["arrays"] = ArrayRecord(
            {"w": Array("float64", (2,), "numpy.ndarray", crafted(kind))}
        )

    replace_reply(kit, run, 1, change)
    record = run.round()
    assert [c.status for c in record.clients] == ["ok", "rejected", "ok"]
    assert record.status == "ok"
    np.testing.assert_allclose(run.vector, [1, 2])


def test_a_reply_that_is_something_else_is_rejected(kit):
    def empty(reply):
        reply.content = RecordDict()

    def two_records(reply):
        reply.content["more"] = MetricRecord({"num-examples": 3})

    def no_arrays(reply):
        del reply.content["arrays"]

    run = federation(kit, FedAvg(), [[1.0]] * 4)
    for client, change in ((0, empty), (1, two_records), (2, no_arrays)):
        replace_reply(kit, run, client, change)
        record = run.round()
        assert record.clients[client].status == "rejected"
        assert record.status == "ok"


@pytest.mark.parametrize("size", [-1.0, math.nan, math.inf, [3], -(10**400), 10**400])
def test_a_size_that_is_none_is_rejected(kit, size):
    run = federation(kit, FedAvg(), [[1.0]] * 3, [4, size, 4])
    record = run.round()
    assert record.clients[1].status == "rejected"
    assert "'num-examples' must be a number of 0 or more" in record.clients[1].reason


def test_a_variance_below_zero_is_rejected(kit):
    shapes = {"w": np.zeros(2), "bn.running_var": np.ones(2)}
    clients = {k: kit.Client({**shapes, "w": np.ones(2)}) for k in range(3)}
    clients[2].model = {"w": np.ones(2), "bn.running_var": np.array([1.0, -1e-3])}
    run = kit.Federation(FedAvg(), clients, kit.record(shapes))
    record = run.round()
    assert record.clients[2].status == "rejected"
    assert "'bn.running_var', a variance, has negative" in record.clients[2].reason


def test_what_admit_cannot_take_rejects_the_reply(kit):
    class Careless(FedAvg):
        request = ("note",)

        def admit(self, report):
            _ = report.profile["note"][0] / report.metrics["num-examples"]

    run = federation(kit, Careless(), [[1.0]] * 3)
    for client, note in zip(run.clients.values(), (["a"], [1.0], []), strict=True):
        client.profile = {"note": note}
    record = run.round()
    assert [c.status for c in record.clients] == ["rejected", "ok", "rejected"]
    assert "Careless.admit cannot take it: TypeError" in record.clients[0].reason
    assert "IndexError" in record.clients[2].reason


def test_an_error_in_flowers_form_is_told_in_ours(kit):
    run = federation(kit, FedAvg(), [[1.0]] * 4)
    raised = "<class 'fedweight.core.errors.DataError'>:<'site.csv is empty'>"
    run.clients[1].error = raised
    run.clients[2].error = "<class 'KeyError'>:<''a''>"
    record = run.round()
    assert record.clients[1].reason == "DataError: site.csv is empty"
    assert record.clients[2].reason == "KeyError: 'a'"


@pytest.mark.parametrize("code", [3, 4, 5])
def test_a_reply_that_will_not_come_is_missing(kit, code):
    run = federation(kit, FedAvg(), [[1.0]] * 3)

    def arrange(replies):
        asked = Message(RecordDict(), dst_node_id=101, message_type="train")
        _flower.set_message_id(asked, "message-1")
        error = Message(Error(code, "Error: Unavailable"), reply_to=asked)
        return [replies[0], error, replies[2]]

    run.grid.arrange = arrange
    record = run.round()
    assert [c.status for c in record.clients] == ["ok", "missing", "ok"]
    assert record.clients[1].reason.startswith("no reply: ")


def test_a_reason_has_a_length_and_no_controls(kit):
    run = federation(kit, FedAvg(), [[1.0]] * 3)
    run.clients[1].error = "\x1b[2Jno power " + "x" * 10**6
    record = run.round()
    assert len(record.clients[1].reason) < 30_000
    assert "\x1b" not in record.clients[1].reason


def test_each_different_error_is_logged_once(kit, caplog):
    run = federation(kit, FedAvg(), [[1.0]] * 9)
    for k in range(1, 8):
        run.clients[k].error = "no power\nTraceback: a long one"
    run.clients[8].silent = True
    for _ in range(3):
        run.round()
    lines = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert lines == [
        "round 1: clients 1, 2, 3 and 4 others failed: no power",
        "round 1: client 8 missing: no reply in time",
    ]


def test_no_more_than_so_many_errors_are_logged_and_all_are_recorded(kit, caplog):
    run = federation(kit, FedAvg(), [[1.0]] * (MOST + 9))
    for k in range(1, len(run.clients)):
        run.clients[k].error = f"no power in ward {'x' * k}"
    record = run.round()
    run.round()
    assert record.count("failed") == len(run.clients) - 1
    lines = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(lines) == MOST + 1
    assert lines[-1] == "further errors are not shown; the record has them"


def test_bytes_are_those_of_the_models_down_also_to_evaluate(kit):
    run = federation(kit, FedAvg(), [[1.0, 2.0]] * 4)
    run.clients[1].model = [1.0, math.nan]
    run.clients[2].error = "no power"
    run.clients[3].silent = True
    record = run.round()
    size = 2 * 8
    assert [c.bytes_up for c in record.clients] == [size, size, 0, 0]
    assert [c.bytes_down for c in record.clients] == [size] * 4
    evaluated = run.strategy.configure_evaluate(1, run.arrays, run.config, run.grid)
    run.strategy.aggregate_evaluate(1, run.grid.send_and_receive(evaluated))
    assert [c.bytes_down for c in record.clients] == [2 * size] * 4
    assert [c.bytes_up for c in record.clients] == [size, size, 0, 0]


class Telling(FedAvg):
    """Tells something of every kind."""

    def tell(self, selection):
        return {
            "rate": 0.5,
            "kind": "für",
            "own": [1.0, None, 3, None],
            "rates": Vector([1.0, 2.0, 3.0]),
            "guide": PerParameter(torch.ones(2)),
            "some": PerParameter(torch.tensor([True, False])),
        }


def test_bytes_are_those_of_what_is_told_too(kit):
    run = federation(kit, Telling(class_totals=False), [[1.0, 2.0]] * 4)
    record = run.round()
    alike = 2 * 8 + 8 + len("für".encode()) + 3 * 8 + 2 * 8 + 1
    assert [c.bytes_down for c in record.clients] == [alike + 8, alike] * 2
    assert [c.bytes_up for c in record.clients] == [16] * 4
    evaluated = run.strategy.configure_evaluate(1, run.arrays, run.config, run.grid)
    run.strategy.aggregate_evaluate(1, run.grid.send_and_receive(evaluated))
    assert [c.bytes_down for c in record.clients] == [alike + 24, alike + 16] * 2


class Asking(FedAvg):
    """Asks for a number, and half of the clients for a list too."""

    request = ("train-loss-before",)

    def ask(self, selection):
        some = [client % 2 == 0 for client in selection.clients]
        return {"train-loss-before": True, "label-counts": some}


def test_bytes_are_those_of_what_is_asked_for_too(kit):
    run = federation(kit, Asking(), [[1.0, 2.0]] * 4)
    for client in run.clients.values():
        client.metrics |= {"train-loss-before": 0.5, "train-loss": 0.25}
        client.profile = {"label-counts": [1, 2, 0, 4, 5]}
    run.clients[2].model = [1.0, math.nan]  # It has travelled all the same.
    run.clients[3].error = "no power"
    record = run.round()
    assert [c.status for c in record.clients] == ["ok", "ok", "rejected", "failed"]
    assert [c.bytes_up for c in record.clients] == [16 + 8 + 5 * 8, 16 + 8, 64, 0]


def test_clients_are_called_by_their_names(kit, caplog):
    run = federation(kit, FedAvg(), [[1.0]] * 3)
    run.grid.name_of = lambda client: ["Bern", "Genf", "2"][client]
    run.clients[1].error = "no power"
    record = run.round()
    assert [c.name for c in record.clients] == ["Bern", "Genf", ""]
    assert "client 1 (Genf) failed: no power" in caplog.text


# Metrics.


def test_a_clients_metrics_do_not_stand_under_the_servers_names(kit):
    run = federation(kit, FedAvg(), [[1.0]] * 3)

    def change(reply):
        reply.content["metrics"] = MetricRecord(
            {
                "num-examples": 10,
                "weight": 9.0,
                "effective-clients": 5.0,
                "train-accuracy": 87.5,
                "train-loss": [1.0, 2.0],
                "f1": math.inf,
            }
        )

    replace_reply(kit, run, 1, change)
    record = run.round()
    entry = record.clients[1]
    assert entry.status == "ok"
    assert entry.weight == pytest.approx(1 / 3)
    assert entry.metrics == {"num-examples": 10}
    assert entry.own_metrics == {
        "weight": 9.0,
        "effective-clients": 5.0,
        "train-accuracy": 87.5,
        "f1": math.inf,
    }
    assert record.metrics["effective-clients"] == pytest.approx(3)
    assert record.metrics["own-weight"] == 9.0
    # The one value out of range takes no mean's place.
    assert "train-accuracy" not in record.metrics
    assert "own-train-accuracy" not in record.metrics
    assert "own-f1" not in record.metrics


def test_a_function_for_the_metrics_that_returns_something_else_is_named(kit, caplog):
    run = federation(kit, FedAvg(train_metrics_aggr_fn=lambda *_: None), [[1.0]] * 3)
    assert run.round().status == "ok"
    assert "a round has no metrics: <lambda> raised TypeError" in caplog.text


def test_a_screen_that_fails_rejects_the_replies(kit):
    class Broken(FedAvg):
        def screen(self, reports, state):
            raise KeyError("nobody")

    record = federation(kit, Broken(), [[1.0]] * 3).round()
    assert record.status == "failed"
    assert {c.status for c in record.clients} == {"rejected"}
    assert "Broken.screen cannot take the replies: KeyError" in record.clients[0].reason


def test_a_screen_may_name_clients_that_are_not_there(kit):
    class Careful(FedAvg):
        def screen(self, reports, state):
            return {1: "odd", 99: "odd"}

    record = federation(kit, Careful(), [[1.0]] * 3).round()
    assert [c.status for c in record.clients] == ["ok", "rejected", "ok"]


def test_an_evaluation_after_a_second_reply_is_of_the_first(kit):
    run = federation(kit, FedAvg(), [[1.0]] * 3)
    run.clients[1].twice = True
    record = run.round()
    run.clients[1].twice = False
    evaluated = run.strategy.configure_evaluate(1, run.arrays, run.config, run.grid)
    run.strategy.aggregate_evaluate(1, run.grid.send_and_receive(evaluated))
    first, second = (c for c in record.clients if c.client == 1)
    assert (first.status, second.status) == ("ok", "rejected")
    assert first.bytes_down > second.bytes_down


def test_a_function_for_the_metrics_that_fails_costs_them_alone(kit, caplog):
    def strict(contents, key):
        raise KeyError("f1")

    run = federation(kit, FedAvg(train_metrics_aggr_fn=strict), [[1.0]] * 3)
    assert run.round().status == "ok"
    assert "a round has no metrics: strict raised KeyError" in caplog.text


class Reading(WeightingStrategy):
    """Weighs by a metric that it may not have asked for."""

    name: str
    asked: tuple[str, ...] = ()

    def ask(self, selection):
        return dict.fromkeys(self.asked, True)

    def weights(self, round):
        values = round.metric(self.name)
        return values / values.sum()


def test_a_metric_that_nobody_reports_is_named_with_what_there_is(kit):
    run = federation(kit, Reading(name="loss"), [[1.0]] * 3)
    with pytest.raises(ConfigurationError) as caught:
        run.round()
    said = str(caught.value)
    assert "round.metric('loss'): no client reports it" in said
    assert "They report num-examples" in said
    assert "`request` may name label-counts, loss-before" in said


def test_a_metric_that_some_lack_fails_the_round_or_rejects_them(kit):
    rows = [[1.0]] * 3

    def told(run):
        for k in (0, 2):
            run.clients[k].metrics[keys.LOSS] = 1.0 + k
        return run

    record = told(federation(kit, Reading(name=keys.LOSS), rows)).round()
    assert record.status == "failed"
    assert "1 of 3 clients do not report it, such as client 1" in record.reason
    run = told(federation(kit, Reading(name=keys.LOSS, asked=[keys.LOSS]), rows))
    record = run.round()
    assert record.status == "ok"
    assert record.clients[1].status == "rejected"
    assert [c.weight for c in record.clients if c.status == "ok"] == [0.25, 0.75]


def test_side_data_of_another_length_fails_the_round(kit):
    round = kit.make_round([[1.0]] * 3)
    given = ({"v": [1, 2]}, {"v": [1, 2, 3]}, {"v": [3, 4]})
    round = type(round)(**{**vars(round), "profiles": given})
    with pytest.raises(
        AggregationError, match="client 1 did not give a list of 2 numbers"
    ):
        round.profile("v")


@pytest.mark.parametrize("name", ["status", "train-loss", "evaluate-x", "own-x"])
def test_a_method_cannot_log_under_the_records_names(kit, name):
    with pytest.raises(ConfigurationError, match=f"uses the name '{name}' itself"):
        kit.make_round([[1.0]]).log(name, 1.0)


def test_a_method_logs_one_number_for_each_client(kit):
    round = kit.make_round([[1.0]] * 3)
    round.log("distance", torch.ones(3))
    with pytest.raises(ConfigurationError, match="2 values for 3 clients"):
        round.log("distance", torch.ones(2))


# The number of classes.


def disco(kit, counts, **options):
    run = federation(kit, FedDisco(**options), [[1.0]] * len(counts))
    for client, own in zip(run.clients.values(), counts, strict=True):
        client.profile = {keys.LABEL_COUNTS: own}
    return run


def test_the_lowest_client_does_not_decide_how_many_classes_there_are(kit):
    run = disco(kit, [[5, 5, 5], [1, 9], [8, 2], [5, 5]])
    record = run.round()
    assert [c.status for c in record.clients] == ["rejected", "ok", "ok", "ok"]
    assert "has 3 entries for 2 classes" in record.clients[0].reason
    run.clients[0].profile = {keys.LABEL_COUNTS: [7, 7]}
    assert run.round().count("ok") == 4  # It is asked again.


def test_where_it_is_told_the_number_is_the_servers(kit):
    run = disco(kit, [[5, 5, 5], [1, 9], [8, 2], [5, 5]], num_classes=3)
    record = run.round()
    assert [c.status for c in record.clients] == ["ok", *["rejected"] * 3]
    with pytest.raises(ConfigurationError, match="num_classes must be in"):
        FedDisco(num_classes=0)


def test_a_tie_names_the_numbers_that_are_tied(kit):
    many = [1] * 10
    run = disco(kit, [[5, 5, 5], [5, 5, 5], [1, 9], [1, 9], many])
    run.round()
    reasons = {c.reason for c in run.strategy.history[-1].clients}
    assert reasons == {
        "as many clients count 2 classes as 3; tell FedDisco num_classes"
    }


def test_a_tie_says_what_to_do(kit):
    run = disco(kit, [[5, 5, 5], [1, 9]])
    record = run.round()
    assert record.status == "failed"
    assert "as many clients count 2 classes as 3; tell FedDisco num_classes" in (
        record.clients[0].reason
    )
    assert not run.strategy.state["method"]


@pytest.mark.parametrize(
    "counts", [[], [0, 0], [1, -1], [1.0, math.inf], [10**400, 1], [1e300, 1.0], "ab"]
)
def test_counts_that_are_none_are_rejected(kit, counts):
    record = disco(kit, [[5, 5], counts, [3, 1]]).round()
    assert [c.status for c in record.clients] == ["ok", "rejected", "ok"]


# What one client can do at most.


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=12).filter(any),
    st.floats(0.01, 1),
)
def test_capped_weights(raw, most):
    weights = torch.tensor(raw, dtype=torch.float64)
    found = cap(weights, most)
    total = weights.sum()
    assert float(found.sum()) == pytest.approx(float(total))
    limit = max(most, 1 / len(raw)) * total
    assert (found <= limit * (1 + 1e-9)).all()
    order = torch.argsort(weights)
    assert (found[order].diff() >= -1e-9 * total).all()
    if (weights <= most * total).all():
        torch.testing.assert_close(found, weights)


def test_weights_below_zero_have_no_share():
    with pytest.raises(AggregationError, match=r"weights of 0 or more, got -1\.5"):
        cap(torch.tensor([2.0, -1.5, 0.3, 0.2]), 0.5)
    assert cap(torch.tensor([2.0, -1.0]), 1.0).tolist() == [2.0, -1.0]


def test_weights_per_tensor_are_capped_in_each():
    weights = torch.tensor([[0.9, 0.2], [0.05, 0.3], [0.05, 0.5]], dtype=torch.float64)
    found = cap(weights, 0.5)
    for column in range(2):
        torch.testing.assert_close(found[:, column], cap(weights[:, column], 0.5))
    with_zeros = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert cap(with_zeros, 0.5).tolist() == [0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    "make", [FedAvg, lambda **o: IDA(fedavg=True, **o), lambda **o: FedAvg(**o)]
)
def test_a_client_that_claims_a_trillion_examples(kit, make):
    rows, sizes = [[1.0, 0], [0, 1.0], [9, 9], [1, 1]], [10, 10, 10**18, 10]
    record = federation(kit, make(), rows, sizes).round()
    assert record.clients[2].weight == pytest.approx(1)
    record = federation(kit, make(max_share=0.4), rows, sizes).round()
    weights = [c.weight for c in record.clients]
    assert weights[2] == pytest.approx(0.4)
    assert sum(weights) == pytest.approx(1)


def test_a_method_that_makes_the_model_itself_has_to_observe_the_share(kit):
    class Own(FedAvg):
        def aggregate(self, round):
            return super().aggregate(round)

    with pytest.raises(ConfigurationError, match=r"max_share is 0\.5, but Own makes"):
        Own(max_share=0.5)
    assert Own(max_share=1.0)
    assert FedLAW.caps_weights


@pytest.mark.parametrize("share", [0, -1, 1.5, math.nan])
def test_a_share_has_its_range(share):
    with pytest.raises(ConfigurationError, match="max_share must be in"):
        FedAvg(max_share=share)


def test_sizes_too_large_to_add_up_are_shares_still():
    found = size_weights(torch.tensor([1e308, 1e308, 0.0, 5e307], dtype=torch.float64))
    assert found.tolist() == [0.4, 0.4, 0.0, 0.2]


def test_an_update_that_is_too_long_is_rejected(kit):
    rows = [[1.0, 0], [0, 1.0], [300, 400], [1, 1]]
    run = federation(kit, FedAvg(max_update_norm=499.0), rows)
    record = run.round()
    assert record.clients[2].status == "rejected"
    assert record.clients[2].reason == (
        "its update has norm 500, above max_update_norm 499"
    )
    np.testing.assert_allclose(run.vector, [2 / 3, 2 / 3])
    assert federation(kit, FedAvg(max_update_norm=500.0), rows).round().count("ok") == 4
    with pytest.raises(ConfigurationError, match="max_update_norm must be in"):
        FedAvg(max_update_norm=0)


def test_an_update_a_thousand_times_the_median_is_told(kit, caplog):
    run = federation(kit, FedAvg(), [[1.0], [2.0], [3.0], [2e6]])
    record = run.round()
    assert record.status == "ok"
    assert record.clients[3].metrics["update-times-median"] == 1e6
    assert "the update of client 3 is 1e+06 times as long as the median" in caplog.text
    calm = federation(kit, FedAvg(), [[1.0], [2.0], [3.0], [1500.0]]).round()
    assert not any("update-times-median" in c.metrics for c in calm.clients)


@pytest.mark.parametrize("make", [FedAvg, FedCE, IDA])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_model_that_training_cannot_start_from_fails_the_round(kit, make, dtype):
    rows = [[1.0, 2.0], [2.0, 1.0], [1e30, -1e30], [1.5, 1.5], [1.0, 1.0]]
    options = {
        FedAvg: {"server_optimizer": ServerAdam()},
        IDA: {"base": "previous", "epsilon": 1e40},  # Nearly uniform weights.
    }
    strategy = make(**options.get(make, {}))
    run = federation(kit, strategy, rows, dtype=dtype)
    for client in run.clients.values():
        client.metrics[keys.MINUS_ERROR] = 0.5
    record = run.round()
    if make is FedAvg:  # Adam's step is bounded, whatever the update.
        assert run.vector.max() < LARGEST_VALUE
        return
    assert record.status == "failed"
    assert "from which training cannot start" in record.reason
    assert "client 2 has the longest update" in record.reason
    np.testing.assert_array_equal(run.vector, [0, 0])


def test_weights_that_are_all_zero_fail_the_round(kit):
    class Nothing(FedAvg):
        def weights(self, round):
            return torch.zeros(round.num_clients)

    record = federation(kit, Nothing(), [[1.0]] * 3).round()
    assert record.status == "failed"
    assert "Nothing gave every client the weight 0" in record.reason


# What the methods do and do not stand against, as their table of it says.


def shares_of_an_odd_client(kit, odd, **options):
    """The share of one client of ten by method; the others go one way, more or less."""
    rng = np.random.default_rng(0)
    model = torch.nn.Linear(2, 3, bias=False).double()
    x = rng.normal(size=(30, 2))
    direction = np.array([3.0, 0, -3, 3, 0, -3])
    y = (x @ direction.reshape(3, 2).T).argmax(1)
    proxy = SimpleNamespace(x=x, y=y)
    found = {}
    for name, strategy in {
        "fedavg": FedAvg(**options),
        "feddisco": FedDisco(**options),
        "fedlaw": FedLAW(model=model, proxy=proxy, **options),
        "fedce": FedCE(**options),
        "ida": IDA(**options),
    }.items():
        rows = [direction + 0.3 * rng.normal(size=6) for _ in range(9)]
        clients = {
            k: kit.Client(
                row,
                10,
                {keys.MINUS_ERROR: 0.3},
                {keys.LABEL_COUNTS: [4, 3, 3]},
            )
            for k, row in enumerate([*rows, odd(direction)])
        }
        start = kit.record({"weight": np.zeros((3, 2))})
        record = kit.Federation(strategy, clients, start).round()
        found[name] = record.clients[9].weight
    return found


def test_what_a_huge_model_counts(kit):
    found = shares_of_an_odd_client(kit, lambda direction: 100 * direction[::-1])
    assert found["fedavg"] == found["feddisco"] == pytest.approx(0.1)
    assert found["ida"] < 0.02
    assert found["fedlaw"] < 0.08
    # It is what the others are held against, too: then it counts about as they do.
    assert 0.05 < found["fedce"] < 0.2


def test_what_a_reversed_model_counts(kit):
    found = shares_of_an_odd_client(kit, lambda direction: -direction)
    assert found["fedavg"] == found["feddisco"] == pytest.approx(0.1)
    assert found["ida"] < 0.05
    assert found["fedlaw"] < 0.09
    assert found["fedce"] > 0.3


def test_who_believes_a_claim_of_many_examples(kit):
    rows = [[1.0, 0], [0, 1.0], [9, 9], [1, 1]]
    claims = [10, 10, 10**6, 10]
    for strategy, believes in (
        (FedAvg(), True),
        (FedDisco(), True),
        (FedCE(), False),
        (IDA(), False),
        (IDA(fedavg=True), True),
    ):
        honest, lying = (
            federation(kit, copy.deepcopy(strategy), rows, sizes)
            for sizes in ([10] * 4, claims)
        )
        for run in (honest, lying):
            for client in run.clients.values():
                client.metrics[keys.MINUS_ERROR] = 0.5
                client.profile[keys.LABEL_COUNTS] = [5, 5]
        before, after = (run.round().clients[2].weight for run in (honest, lying))
        assert (after > 1.5 * before) == believes
        assert believes or after == before


# FedCE.


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fedce_knows_the_cosine_of_a_client_that_exploded(kit, dtype):
    run = federation(kit, FedCE(), [[2000.0, 0.0], [1.0, 1.0]], dtype=dtype)
    for client in run.clients.values():
        client.metrics[keys.MINUS_ERROR] = 1.0
    record = run.round()
    cosines = [c.metrics["cosine"] for c in record.clients]
    np.testing.assert_allclose(cosines, [0.5**0.5] * 2, rtol=1e-6)


@pytest.mark.parametrize("claim", [10**19, 2**63, 1e300, 2**64 - 1])
@pytest.mark.parametrize("name", ["num-examples", "num-steps"])
def test_a_count_that_nobody_has_leaves_the_table_readable(kit, tmp_path, name, claim):
    run = federation(kit, FedAvg(), [[1.0]] * 3)
    if name == "num-examples":
        run.clients[1].num_examples = claim
    else:
        run.clients[1].metrics[name] = claim
    record = run.round()
    lying = record.clients[1]
    if name == "num-examples":
        assert lying.status == "rejected"
        assert f"'{name}' must be a number of 0 or more, at most 1e+18" in lying.reason
    assert name not in lying.metrics
    rows = [client_row(1, client) for client in record.clients]
    assert all(row.get("examples", 0) <= 1e18 for row in rows)
    assert all(row.get("steps", 0) <= 1e18 for row in rows)
    table = Table(tmp_path / "clients.csv", CLIENT_COLUMNS, ["name"])
    table.append(rows)
    table.write()
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "rounds.csv").write_text("round\n1\n")
    frame = Run(tmp_path).clients
    assert frame["client"].tolist() == [0, 1, 2]
    assert str(frame["examples"].dtype) == str(frame["steps"].dtype) == "Int64"


def test_an_evaluation_of_more_examples_than_there_are_is_none(kit):
    with pytest.raises(AggregationError, match=r"at most 1e\+18"):
        size_of({"num-examples": 10**19}, "num-examples")
    assert size_of({"num-examples": 10**18}, "num-examples") == 1e18
    assert size_of({"worth": 1e300}, "worth") == 1e300


class BySpread(WeightingStrategy):
    """Weigh clients by the sum of a list that they report."""

    request = ("v",)

    def weights(self, round):
        return round.profile("v").sum(1)


def spread(kit, lists):
    run = federation(kit, BySpread(), [[1.0]] * len(lists))
    for client, own in zip(run.clients.values(), lists, strict=True):
        if isinstance(own, list):
            client.profile = {"v": own, "unasked": ["x"]}
        else:
            client.metrics = {"v": own}
    return run.round()


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        ([1.0, math.nan], "its 'v' must be a list of at most 1,000,000 finite numbers"),
        (["a", "b"], "its 'v' must be a list of at most 1,000,000 finite numbers"),
        ([1.0], "its 'v' is not a list of 2 numbers, as most others' are"),
        ([], "its 'v' is not a list of 2 numbers, as most others' are"),
        (3.0, "its 'v' is a number, where most clients give a list"),
    ],
)
def test_odd_side_data_reject_their_client_only(kit, odd, why):
    record = spread(kit, [[1.0, 2.0], odd, [3.0, 4.0], [1, 1]])
    assert record.status == "ok"
    assert [c.status for c in record.clients] == ["ok", "rejected", "ok", "ok"]
    assert record.clients[1].reason.startswith(why)
    assert [c.weight for c in record.clients if c.status == "ok"] == [3, 7, 2]


def test_a_list_for_a_number_rejects_its_client_only(kit):
    class ByGain(BySpread):
        def weights(self, round):
            return round.metric("v")

    run = federation(kit, ByGain(), [[1.0]] * 3)
    run.clients[0].metrics = run.clients[2].metrics = {"v": 2.0}
    run.clients[1].profile = {"v": [2.0]}
    record = run.round()
    assert [c.status for c in record.clients] == ["ok", "rejected", "ok"]
    assert (
        record.clients[1].reason
        == "its 'v' is a list, where most clients give a number"
    )


def test_lists_of_two_lengths_alike_often_fail_the_round(kit):
    record = spread(kit, [[1.0, 2.0], [1.0], [3.0, 4.0], [1.0]])
    assert record.status == "failed"
    assert "did not give a list of" in record.reason
    record = spread(kit, [[1.0, 2.0], 3.0])
    assert record.status == "failed"
    assert {c.reason for c in record.clients} == {
        "as many clients give a list as a number for 'v'"
    }


def test_lists_of_different_lengths_are_there_as_they_are(kit):
    class Own(BySpread):
        def weights(self, round):
            return torch.tensor([float(len(p["v"])) for p in round.profiles])

    run = federation(kit, Own(), [[1.0]] * 3)
    for k, client in run.clients.items():
        client.profile = {"v": [0.5] * (k + 1)}
    assert [c.weight for c in run.round().clients] == [1, 2, 3]


def test_odd_replies_leave_what_is_carried(kit):
    class Counts(BySpread):
        def begin(self):
            return 0

        def weights(self, round):
            return round.profile("v").sum(1), round.state + 1

    run = federation(kit, Counts(), [[1.0]] * 3)
    for k, client in run.clients.items():
        client.profile = {"v": [1.0] * (1 + (k == 2))}
    run.round()
    assert run.strategy.state["method"] == 1
