"""Strategies of a user's that are wrong: what is wrong, in one line that names them."""

from __future__ import annotations

import re
import textwrap
from dataclasses import FrozenInstanceError
from typing import Annotated

import numpy as np
import pytest
import torch
from pydantic import Field

from fedweight.cli import main
from fedweight.core.errors import AggregationError, ConfigurationError
from fedweight.strategies import WeightingStrategy
from fedweight.strategies.fedavg import FedAvg
from fedweight.strategies.weights import size_weights


def aggregating(make):
    class Own(WeightingStrategy):
        def aggregate(self, round):
            round.log("weight", round.size_weights)
            return make(round.model.parameters)

    return Own()


def weighing(make):
    class Own(WeightingStrategy):
        def weights(self, round):
            return make(size_weights(round.num_examples))

    return Own()


def logging(name, value):
    class Own(FedAvg):
        def weights(self, round):
            round.log(name, value)
            return super().weights(round)

    return Own()


WRONG = [
    (aggregating(lambda w: None), "aggregate must return .* got NoneType"),
    (aggregating(lambda w: w.numpy()), "aggregate must return .* got ndarray"),
    (aggregating(lambda w: w.tolist()), "aggregate must return .* got list"),
    (aggregating(lambda w: w.long()), r"got torch\.int64"),
    (aggregating(lambda w: w[:1]), r"of shape \[2\], got shape \[1\]"),
    (aggregating(lambda w: w[0]), r"of shape \[2\], got shape \[\]"),
    (aggregating(lambda w: w[None]), r"of shape \[2\], got shape \[1, 2\]"),
    (weighing(lambda p: p + 0j), "weights must return numbers.*complex"),
    (weighing(lambda p: p.numpy() + 0j), "weights must return numbers.*complex"),
    (weighing(lambda p: "p"), "weights must return numbers"),
    (weighing(lambda p: None), "weights must return numbers"),
    (logging("d", torch.ones(4)), r"round.log\('d'\): 4 values for 3 clients"),
    (logging("d", torch.ones(3, 1)), r"round.log\('d'\): the value must be a number"),
    (logging("d", None), r"round.log\('d'\): the value must be a number"),
    (logging("d", "much"), r"round.log\('d'\): the value must be a number"),
    (logging("d", 10**400), r"round.log\('d'\): the value must be a number"),
    (logging(3, 1.0), "the name must be a text, got 3"),
]


@pytest.mark.parametrize(("strategy", "said"), WRONG)
def test_what_a_method_gives_is_looked_at(kit, strategy, said):
    clients = {k: kit.Client(np.ones(2), 10) for k in range(3)}
    run = kit.Federation(strategy, clients, kit.record({"w": np.zeros(2)}))
    with pytest.raises(ConfigurationError, match=said) as caught:
        run.round()
    assert "\n" not in str(caught.value)


def test_what_is_no_method_is_refused_when_it_is_made():
    class Neither(WeightingStrategy):
        pass

    with pytest.raises(ConfigurationError, match="Neither must define weights"):
        Neither()
    with pytest.raises(ConfigurationError, match="must define weights"):
        WeightingStrategy()
    with pytest.raises(ConfigurationError, match=r"Write \('label-counts',\)"):

        class Asking(FedAvg):
            request = "label-counts"


class Counting(WeightingStrategy):
    """Counts the rounds that succeeded, in its state."""

    def begin(self):
        return 0

    def weights(self, round):
        if round.state == 1 and round.num_clients < 3:
            raise AggregationError("too few for this one")
        return round.size_weights, round.state + 1


def test_a_state_is_replaced_when_a_round_succeeds_and_only_then(kit):
    clients = {k: kit.Client(np.ones(2), 10) for k in range(3)}
    run = kit.Federation(Counting(), clients, kit.record({"w": np.zeros(2)}))
    assert run.strategy.state["method"] == 0
    assert run.round().status == "ok"
    assert run.strategy.state["method"] == 1
    clients[0].error = "no power"
    assert run.round().status == "failed"
    assert run.strategy.state["method"] == 1
    clients[0].error = ""
    assert run.round().status == "ok"
    assert run.strategy.state["method"] == 2


def test_options_are_fields_by_name_and_stay_as_they_are():
    class Own(FedAvg):
        tolerance: Annotated[float, Field(gt=0)] = 2.0

    own = Own(tolerance=np.float32(0.5), fraction_train=0.1)
    assert (own.tolerance, own.fraction_train) == (0.5, 0.1)
    assert repr(own) == "Own(fraction_train=0.1, tolerance=0.5)"
    with pytest.raises(ConfigurationError, match=r"tolerance must be in \(0, inf\)"):
        Own(tolerance=0)
    with pytest.raises(TypeError, match=r"no option 'tolerence'\. Did you mean 'tole"):
        Own(tolerence=1)
    with pytest.raises(TypeError, match=r"Name them, as in Own\(tolerance=...\)"):
        Own(3.0)
    with pytest.raises(FrozenInstanceError):
        own.tolerance = 3.0


def test_another_default_needs_its_type():
    class Told(FedAvg):
        min_replies: int = 3

    assert Told().min_replies == 3
    with pytest.raises(ConfigurationError, match="as in `min_replies: int = 3`"):

        class Bare(FedAvg):
            min_replies = 3


def test_columns_have_a_value_for_each_client(kit):
    class Short(FedAvg):
        def tell(self, selection):
            return {"epochs-left": [1, 2]}

    clients = {k: kit.Client(np.ones(2), 10) for k in range(3)}
    run = kit.Federation(Short(), clients, kit.record({"w": np.zeros(2)}))
    with pytest.raises(ConfigurationError, match="2 values for 'epochs-left' and 3"):
        run.round()


def test_nobody_gives_what_was_not_requested(kit):
    class Curious(FedAvg):
        def weights(self, round):
            return round.profile("label-counts").sum(1)

    clients = {k: kit.Client(np.ones(2), 10) for k in range(3)}
    run = kit.Federation(Curious(), clients, kit.record({"w": np.zeros(2)}))
    assert (
        "no client gives it. Name it in the strategy's `request`" in run.round().reason
    )


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("def __init__(self, **a): pass", 2, "its __init__ must call super"),
        ("def weights(self, round): return None", 1, "weights must return numbers"),
    ],
)
def test_the_status_says_whether_anything_was_written(
    tmp_path, monkeypatch, capsys, body, status, said
):
    code = f"""
    from fedweight.strategies.fedavg import FedAvg

    class Own(FedAvg):
        {body}
    """
    (tmp_path / f"own_{status}.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    chosen = ["--strategy", f"own_{status}:Own", "--set", "run.rounds=1"]
    assert main(["run", *chosen, "--out", "x"]) == status
    error = capsys.readouterr().err
    assert re.search(said, error)
    assert ("What was recorded is in x" in error) == (status == 1)
    assert (tmp_path / "x").exists() == (status == 1)


def test_a_factory_that_ends_the_program_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for key in ("data.name", "strategy.name", "model.name"):
        assert main(["run", "--set", f"{key}=sys:exit", "--out", "x"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x").exists()
