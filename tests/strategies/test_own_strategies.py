"""Strategies of a user's that are wrong: what is wrong, in one line that names them."""

from __future__ import annotations

import re
import textwrap

import numpy as np
import pytest
import torch

from fedweight.cli import main
from fedweight.core.errors import ConfigurationError
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

    class Asking(FedAvg):
        request = "label-counts"

    with pytest.raises(ConfigurationError, match="Neither must define weights"):
        Neither()
    with pytest.raises(ConfigurationError, match="must define weights"):
        WeightingStrategy()
    with pytest.raises(ConfigurationError, match=r"Write \('label-counts',\)"):
        Asking()


def test_a_state_without_the_bases_own_is_enough_to_go_on(kit):
    class Forgetful(FedAvg):
        def state(self):
            return {}

    clients = {k: kit.Client(error="no power") for k in range(3)}
    run = kit.Federation(Forgetful(), clients, kit.record({"w": np.zeros(2)}))
    assert run.round().status == "failed"


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
