"""What a run says at its end: each kind of line, and none without need."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import fedweight
from fedweight.data import DataSet, Examples
from fedweight.studies import endings
from fedweight.studies.result import Run

MakeRun = Any
Row = dict[str, Any]
Tell = Callable[..., list[str]]


@pytest.fixture
def tell(tmp_path: Path) -> Tell:
    """Write a run's folder of some rows; return what it says at its end."""

    def write(
        clients: Iterable[Row],
        rounds: Iterable[Row] | None = None,
        *,
        data: dict[str, Any] | None = None,
        strategy: str = "",
        sizes: dict[int, int] | None = None,
        names: dict[int, str] | None = None,
    ) -> list[str]:
        (tmp_path / "config.toml").write_text(f"[strategy]\nname = 'x'\n{strategy}")
        (tmp_path / "environment.json").write_text(json.dumps({"data": data or {}}))
        table = pd.DataFrame([{"status": "ok", "reason": ""} | row for row in clients])
        if names:
            table["name"] = table["client"].map(names)
        table.to_csv(tmp_path / "clients.csv", index=False)
        if rounds is None:
            rounds = [{"round": number} for number in sorted(set(table["round"]))]
        pd.DataFrame([{"status": "ok"} | row for row in rounds]).to_csv(
            tmp_path / "rounds.csv", index=False
        )
        if sizes is not None:
            rows = [{"client": k, "train_examples": n} for k, n in sizes.items()]
            pd.DataFrame(rows).to_csv(tmp_path / "partition.csv", index=False)
        return Run(tmp_path).warnings

    return write


def asked(rounds: int, clients: int, **bad: Any) -> list[Row]:
    """Return rows of clients that all take part; ``bad`` gives some another one."""
    rows = []
    for number in range(1, rounds + 1):
        for client in range(clients):
            other = bad.get(f"client_{client}", {})
            rows.append({"round": number, "client": client, **other})
    return rows


ERROR = "client {}, train: ValueError: odd batch\nTraceback ..."


# Clients that fail.


def test_all_is_well(tell: Tell) -> None:
    assert tell(asked(20, 5), sizes=dict.fromkeys(range(5), 10)) == []


@pytest.mark.parametrize("status", ["failed", "rejected", "missing", "dropped"])
def test_a_client_that_always_failed_is_named_with_the_reason(
    tell: Tell, status: str
) -> None:
    lost = {"status": status, "reason": "it is one example, the model needs two"}
    (line,) = tell(asked(3, 30, client_7=lost))
    assert line.startswith("client 7 failed in every round it was asked (3 rounds): ")
    assert line.endswith("it is one example, the model needs two")


def test_a_client_that_failed_once_of_many_is_no_line(tell: Tell) -> None:
    rows = asked(3, 30)
    rows[4]["status"] = "failed"
    assert tell(rows) == []


def test_a_site_without_examples_is_named_and_a_number_is_not(tell: Tell) -> None:
    empty = {"status": "dropped", "reason": "it has no examples"}
    rows = asked(2, 30, client_2=empty)
    sizes = {k: 0 if k == 2 else 9 for k in range(30)}
    assert tell(rows, sizes=sizes) == []
    (line,) = tell(rows, sizes=sizes, names={2: "Lone", 3: "B"})
    assert line == "client 2 (Lone) has no examples to train on, and did not count"


def test_weights_that_are_none_of_a_mean_are_told(tell: Tell) -> None:
    rows = [row | {"weight": 1.0} for row in asked(3, 5)]
    (line,) = tell(rows)
    assert line == (
        "the weights summed to 5 and not to 1 (rounds 1 to 3); the global model's "
        "step is scaled by it"
    )
    rows = [row | {"weight": -0.5 if row["client"] == 1 else 0.375} for row in rows]
    line, *_ = tell(rows)
    assert line == "client 1 had a negative weight (rounds 1 to 3)"


def test_the_weights_of_each_of_several_models_sum_to_one(tell: Tell) -> None:
    several = {0: (0, 0.25), 1: (0, 0.75), 2: (1, 1.0), 3: (2, 0.5), 4: (2, 0.5)}
    names = "model", "weight"
    rows = [
        row | dict(zip(names, several[row["client"]], strict=True))
        for row in asked(3, 5)
    ]
    assert tell(rows) == []
    rows = [row | ({"weight": 2.0} if row["client"] == 4 else {}) for row in rows]
    (line,) = tell(rows)
    assert line.startswith("the weights summed to 2.5 and not to 1 (rounds 1 to 3);")


def test_a_client_without_data_is_not_lost(tell: Tell) -> None:
    empty = {"status": "dropped", "reason": "it has no examples"}
    assert tell(asked(2, 30, client_2=empty)) == []


def test_clients_that_failed_alike_are_one_line(tell: Tell) -> None:
    rows = asked(2, 200)
    for row in rows:
        if row["client"] % 30 == 3:
            row |= {"status": "failed", "reason": ERROR.format(row["client"])}
        if row["client"] == 5:
            row |= {"status": "missing", "reason": "no reply in time"}
    alike, other = tell(rows)
    assert alike == (
        "clients 3, 33, 63 and 4 others failed in every round they were asked (2 "
        "rounds): train: ValueError: odd batch"
    )
    assert other.startswith("client 5 failed in every round it was asked (2 rounds)")


def test_many_different_reasons_are_few_lines(tell: Tell) -> None:
    rows = asked(1, 200)
    for row, letter in zip(rows[:10], "abcdefghij", strict=True):
        row |= {"status": "rejected", "reason": f"its column is {letter}"}
    lines = tell(rows)
    assert len(lines) == endings.MOST_REASONS + 1
    assert "for other reasons; clients.csv has them" in lines[-1]
    assert "3, 4, 5 and 4 others" in lines[-1]


def test_only_rounds_it_was_asked_count(tell: Tell) -> None:
    rows = [{"round": n, "client": k} for n in range(1, 13) for k in range(n, n + 12)]
    for row in rows:
        if row["client"] == 23:
            row |= {"status": "missing", "reason": "no reply in time"}
    (line,) = tell([*rows, {"round": 1, "client": 23, "status": "evaluated"}])
    assert line.startswith("client 23 failed in every round it was asked (1 round)")


def test_names_stand_for_numbers(tell: Tell) -> None:
    lost = {"status": "failed", "reason": ERROR.format(1)}
    (line,) = tell(asked(1, 20, client_1=lost), names={1: "Ward \x1b[31m1", 2: "B"})
    assert line.startswith("client 1 (Ward \\x1b[31m1) failed in every round")


def test_a_name_that_is_another_clients_number_is_no_number(tell: Tell) -> None:
    lost = {"status": "failed", "reason": ERROR.format(1)}
    names = {k: str(k + 1) for k in range(20)}
    (line,) = tell(asked(1, 20, client_1=lost), names=names)
    assert line.startswith("client 1 (2) failed in every round")


def test_rounds_in_which_many_failed_are_one_line(tell: Tell) -> None:
    rows = asked(6, 10)
    for row in rows:
        if (row["round"], row["client"]) in [(2, 1), (3, 4), (4, 5), (4, 6), (6, 2)]:
            reason = ERROR.format(row["client"])
            row |= {"status": "failed", "reason": reason}
    (line,) = tell(rows)
    assert line == (
        "a tenth or more of the clients failed in 4 of 6 rounds (rounds 2 to 4 and 6), "
        "at worst 2 of 10 in round 4; most often: train: ValueError: odd batch"
    )


def test_stragglers_that_are_dropped_are_no_failure_of_the_round(tell: Tell) -> None:
    rows = asked(4, 10)
    for row in rows:
        if (row["client"] + row["round"]) % 2:
            row |= {"status": "dropped", "reason": "straggler"}
    assert tell(rows) == []


def test_a_client_that_is_always_a_dropped_straggler_did_not_fail(tell: Tell) -> None:
    late = {"status": "dropped", "reason": "straggler"}
    assert tell(asked(3, 20, client_4=late)) == []


def test_failed_rounds_are_told(tell: Tell) -> None:
    rounds = [{"round": n} for n in range(4)]
    rounds[2] |= {"status": "failed", "reason": "0 good replies of 3"}
    (line,) = tell(asked(3, 3), rounds)
    assert line == "round 2 failed, and the global model was kept: 0 good replies of 3"


def test_a_client_whose_evaluations_all_failed_is_named(tell: Tell) -> None:
    rows = [row | {"accuracy": 0.5} for row in asked(2, 4)]
    for row in rows:
        if row["client"] == 3:
            row |= {"reason": "evaluation failed: client 3, evaluate: E: x"}
            row |= {"accuracy": None}
    (line,) = tell(rows)
    assert line == "every evaluation of client 3 failed: evaluate: E: x"


# Clients that never took part.


def test_a_client_that_nobody_asked_is_named(tell: Tell) -> None:
    (line,) = tell(asked(2, 3), sizes={0: 5, 1: 5, 2: 5, 3: 5, 4: 0})
    assert line == "client 3 never took part: there, but asked in no round"


def test_sampling_is_no_reason_for_a_line(tell: Tell) -> None:
    sizes = dict.fromkeys(range(9), 5)
    assert tell(asked(2, 3), strategy="fraction-train = 0.5", sizes=sizes) == []
    rows = [{"round": n, "client": k} for n in (1, 2) for k in (n, n + 3)]
    assert tell(rows, sizes=sizes) == []  # A strategy of one's own chooses.


def test_a_node_that_connected_and_did_nothing_is_named(tell: Tell) -> None:
    site = 2**63 + 11
    lines = tell(asked(2, 2), data={"connected": [0, 1, site]})
    assert lines == [f"client {site} never took part: connected, but asked in no round"]


# Losses and accuracies.


def losses(*values: float | None) -> list[Row]:
    return [{"round": n, "train_loss": v, "ok": 2} for n, v in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ((2.0, 0.5, 1.0, 700.0, 3.0), "grew to 700 in round 4, from 0.5 before"),
        ((2.0, 1.0, float("inf")), "grew to inf in round 3, from 1 before"),
        ((2.0, 1.0, None, 0.5, None), "became NaN in rounds 3 and 5"),
    ],
)
def test_a_loss_that_explodes_is_told(
    tell: Tell, values: tuple[float | None, ...], line: str
) -> None:
    assert tell(asked(len(values), 2), losses(*values)) == [f"the training loss {line}"]


@pytest.mark.parametrize(
    "values",
    [
        (2.0, 1.0, 0.5),
        (0.001, 0.5),  # not a thousandfold
        (2.3, 1e-7, 5e-3, 1e-7),  # It is next to nothing all the time.
        (None, None, None),  # Nobody reports one.
        (None, 1.0, 0.5),
    ],
)
def test_other_losses_are_not(tell: Tell, values: tuple[float | None, ...]) -> None:
    assert tell(asked(len(values), 2), losses(*values)) == []


def test_a_failed_round_has_no_loss_and_that_is_no_nan(tell: Tell) -> None:
    rounds = losses(2.0, None, 1.0)
    rounds[1] |= {"status": "failed", "reason": "why"}
    assert len(tell(asked(3, 2), rounds)) == 1


DIVERGED = (
    "training diverged: try a smaller training.learning-rate, or limit gradients by "
    "training.clip-norm; and look for NaN and for very large numbers in these clients' "
    "data"
)


def test_a_loss_that_is_nan_from_the_first_round_is_told(tell: Tell) -> None:
    rows = asked(3, 4, client_1={"steps": 2, "train_loss": None})
    rows = [{"steps": 2, "train_loss": 0.5} | row for row in rows]
    assert tell(rows) == []  # An app of one's own may report none.
    training = "[training]\nlearning-rate = 30.0"
    which = DIVERGED.replace("rate,", "rate, which is 30,", 1)
    assert tell(rows, strategy=training) == [
        "the training loss of client 1 was NaN in rounds 1 to 3",
        which,
    ]
    for row in rows:
        row |= {"train_loss": None, "steps": 2 if row["client"] else 0}
    assert tell(rows, strategy=training) == [
        "the training loss of clients 1, 2 and 3 was NaN in rounds 1 to 3",
        which,
    ]


@pytest.mark.parametrize("whose", ["its model", "the aggregated model"])
def test_of_a_model_that_is_not_finite_it_is_said_what_may_help(
    tell: Tell, whose: str
) -> None:
    why = f"{whose} has NaN or infinite values"
    bad = {"status": "rejected", "reason": why} if whose == "its model" else {}
    rounds = [{"round": 1, "status": "failed" if not bad else "ok", "reason": why}]
    first, *_, last = tell(asked(1, 3, client_2=bad), rounds)
    assert why in first
    assert last == DIVERGED


def test_whatever_diverges_is_told_once_with_its_clients(tmp_path: Path) -> None:
    """Flower's FedAvg takes models that are NaN, from round 1 on."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 3)).astype(np.float32)
    every = Examples(x, (x[:, 0] > 0).astype(int))
    data = DataSet("p", every, every.take(slice(0, 30)), 2)
    given: dict[str, Any] = {
        **{"run.rounds": 2, "partition.clients": 3, "partition.name": "iid"},
        **{"model.name": "mlp", "training.epochs": 1, "training.learning-rate": 1e30},
        "engine.name": "local",
    }
    for name in ("flwr.serverapp.strategy:FedAvg", "fedavg"):
        made = fedweight.run(
            dataset=data,
            settings={**given, "strategy.name": name},
            out=tmp_path / name[:3],
            report=False,
            progress=False,
        )
        told = [line for line in made.warnings if "clients 0, 1 and 2" in line]
        assert len(told) == 1
        assert "NaN" in told[0]
        assert sum("diverged: try" in line for line in made.warnings) == 1


def test_a_clients_own_loss_is_told_with_its_name(tell: Tell) -> None:
    rows = asked(3, 12)
    for row in rows:
        row |= {"steps": 2, "train_loss": 2.0 / row["round"]}
        if row["client"] in (1, 4) and row["round"] == 3:
            row["train_loss"] = 5e3 * row["client"]
        if row["client"] == 5 and row["round"] > 1:
            row["train_loss"] = None
        if row["client"] == 6:  # It has nothing to train on.
            row |= {"steps": 0, "train_loss": None}
        if row["client"] == 7:  # It knows its few examples by heart.
            row["train_loss"] = 1e-9 if row["round"] < 3 else 1e-3
    assert tell(rows) == [
        "the training loss of clients 1 and 4 grew to 2e+04 in round 3, from 1 before; "
        "that was client 4",
        "the training loss of client 5 became NaN in rounds 2 and 3",
        DIVERGED,
    ]


def accuracies(last: float, rounds: int = 10) -> list[Row]:
    values = [0.5] * rounds + [last]
    return [{"round": n, "test_accuracy": v} for n, v in enumerate(values)]


DATA = {"classes": 4, "largest_test_class": 0.4, "test_examples": 600}


@pytest.mark.parametrize(
    ("last", "rounds", "data", "said"),
    [
        (0.4, 10, DATA, "most frequent class gives 0.4"),
        (0.41, 12, DATA, "most frequent class gives 0.4"),  # within a standard error
        (0.43, 10, DATA, ""),
        (0.2, 9, DATA, ""),  # too early to say
        (0.25, 10, {"classes": 4}, "guessing among 4 classes gives 0.25"),
        (0.3, 10, {"classes": 4}, ""),
        (0.1, 10, {}, ""),
        (1.0, 10, DATA | {"largest_test_class": 1.0}, ""),  # one class only
    ],
)
def test_an_accuracy_at_chance_is_told(
    tell: Tell, last: float, rounds: int, data: dict[str, Any], said: str
) -> None:
    lines = tell(asked(rounds, 2), accuracies(last, rounds), data=data)
    assert len(lines) == bool(said)
    for line in lines:
        assert f"accuracy after round {rounds}, {last:.3g}, is chance" in line
        assert said in line


def test_of_held_out_data_chance_is_one_of_the_classes(tell: Tell) -> None:
    rounds = [{"round": n, "evaluate_accuracy": 0.3} for n in range(11)]
    assert tell(asked(10, 2), rounds, data=DATA) == []


# Clients that rule.


def test_a_client_with_most_of_the_weight_is_named(tell: Tell) -> None:
    rows = asked(5, 4)
    for row in rows:
        row["weight"] = 0.25
        if row["round"] > 2:
            row["weight"] = 0.97 if row["client"] == 2 else 0.01
    assert tell(rows) == [
        "client 2 had more than half of the weight in 3 of 5 rounds, up to 97%"
    ]


@pytest.mark.parametrize(("rounds", "clients"), [(2, 4), (9, 2)])
def test_one_of_two_or_for_two_rounds_may_rule(
    tell: Tell, rounds: int, clients: int
) -> None:
    rows = [
        row | {"weight": 0.7 if not row["client"] else 0.1}
        for row in asked(rounds, clients)
    ]
    assert tell(rows) == []


def test_what_does_not_count_has_no_share(tell: Tell) -> None:
    rows = [row | {"weight": 0.5} for row in asked(4, 2)]
    empty = {"client": 9, "status": "dropped", "reason": "it has no examples"}
    empty |= {"weight": 0.0, "examples": 0}
    rows += [{"round": number, **empty} for number in range(1, 5)]
    rows += [row | {"round": row["round"] + 4, "weight": 0.0} for row in asked(3, 3)]
    assert tell(rows) == []


def test_a_huge_update_is_told_with_its_client(tell: Tell) -> None:
    rows = asked(4, 5)
    assert tell(rows) == []
    rows[8] = rows[8] | {"update_times_median": 500_000.0}
    (line,) = tell(rows)
    assert line == (
        "the update of client 3 was up to 500,000 times as long as the median (round 2)"
    )


# The rest.


def test_what_was_noticed_of_the_data_is_passed_on(tell: Tell) -> None:
    notes = ["column 'age' is 5,000 times wider than the others", "\x1b[2J=1"]
    assert tell(asked(1, 2), data={"notes": notes}) == [notes[0], "\\x1b[2J=1"]


def test_errors_in_full_are_pointed_to(tell: Tell, tmp_path: Path) -> None:
    (tmp_path / "errors.log").write_text("x")
    assert tell(asked(1, 2)) == [
        "errors.log, in the run's folder, has the errors in full"
    ]


def test_no_line_is_longer_than_it_may_be(tell: Tell) -> None:
    lost = {"status": "failed", "reason": "x" * 10_000}
    lines = tell(asked(1, 20, client_1=lost), names={1: "n" * 5000})
    assert max(map(len, lines)) <= endings.LINE_LENGTH


def test_a_large_table_is_read_in_no_time(make_run: MakeRun) -> None:
    folder = make_run(clients=1000, rounds=40)
    run = Run(folder)
    assert len(run.clients) == 41_000
    began = time.perf_counter()
    assert run.warnings
    assert time.perf_counter() - began < 3


def test_the_lines_are_in_summary_report_and_notebook(make_run: MakeRun) -> None:
    run = Run(make_run(reason="<script>alert(1)</script>"))
    assert run.summary()["warnings"] == run.warnings
    failed, many = run.warnings
    assert failed.startswith("round 3 failed")
    assert many.startswith("a tenth or more of the clients failed in 1 of 3 rounds")
    report = run.report().read_text("utf-8")
    for page in (report, run._repr_html_()):
        assert "1 of 3 rounds (round 2), at worst 1 of 4" in page
        assert "<script>alert" not in page
    assert report.index("a tenth or more") < report.index("Test accuracy")
