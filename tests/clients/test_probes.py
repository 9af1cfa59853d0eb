"""What clients measure for a strategy, by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedweight.clients.evaluation import evaluate, sums_of_each
from fedweight.clients.probes import ClientRound
from fedweight.clients.registries import PROBES
from fedweight.core.layout import FlatModel
from fedweight.core.module import FlatModule
from fedweight.messages import keys
from fedweight.strategies.fedce import minus_error
from fedweight.strategies.fedprox import Proximal

EVALUATIONS = {
    f"{part}{what}-{when}": (part, what, when)
    for part in ("", "held-out-")
    for what in ("loss", "accuracy")
    for when in ("before", "after")
}


def test_every_name_that_servers_know_is_registered() -> None:
    expected = {*EVALUATIONS, keys.LABEL_COUNTS, keys.MINUS_ERROR}
    assert expected <= set(PROBES.entries)
    assert PROBES.resolve(keys.MINUS_ERROR) is minus_error
    for name in PROBES.entries:
        assert callable(PROBES.resolve(name))


@pytest.mark.parametrize("name", EVALUATIONS)
def test_loss_and_accuracy_are_measured_before_and_after(kit: Any, name: str) -> None:
    part, what, when = EVALUATIONS[name]
    app, context = kit.app(), kit.context()
    reply = app(kit.message(kit.start(), request=[name]), context)
    module = FlatModule(kit.linear())
    data = app.data(context)
    examples = data.held_out if part else data.train
    [record] = reply.content.array_records.values()
    model = module.save() if when == "before" else None
    if model is None:
        from fedweight.messages.arrays import flatten

        model = flatten(record, module.layout)
    loss, accuracy = evaluate(module, model, examples).values()
    expected = loss if what == "loss" else accuracy
    assert reply.content["metrics"][name] == expected


def test_a_model_is_evaluated_once_for_all_who_ask(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedweight.clients import peers

    seen = []

    def counted(module: FlatModule, model: FlatModel, *rest: Any) -> Any:
        seen.append(model)
        return sums_of_each(module, model, *rest)

    monkeypatch.setattr(peers, "sums_of_each", counted)
    kit.app()(kit.message(kit.start(), request=list(EVALUATIONS)), kit.context())
    assert len(seen) == 4


def half(client: ClientRound) -> np.float32:
    return np.float32(0.5)


def counts(client: ClientRound) -> np.ndarray:
    return np.array([client.client, client.number, client.num_steps])


def rounds(client: ClientRound) -> float:
    before = client.kept_numbers("rounds")
    client.keep("rounds", [*before, client.number])
    return len(before)


def test_an_apps_own_probes_may_be_asked_for(kit: Any) -> None:
    app = kit.app(probes={"half": half, "counts": counts, "rounds": rounds})
    context = kit.context()
    asked = {"request": ["half", "counts", "rounds", "nobody's"]}
    for round in (1, 2):
        reply = app(kit.message(kit.start(), server_round=round, **asked), context)
        metrics = reply.content["metrics"]
        assert metrics["half"] == 0.5
        assert metrics["rounds"] == round - 1
        steps = metrics[keys.NUM_STEPS]
        assert reply.content["profile"]["counts"] == [0, round, steps]
        assert "nobody's" not in metrics


def test_a_message_names_no_code(kit: Any) -> None:
    reply = kit.app()(kit.message(kit.start(), request=["os:getcwd"]), kit.context())
    assert "os:getcwd" not in reply.content["metrics"]
    assert "profile" not in reply.content


def test_what_a_failed_probe_kept_is_lost(kit: Any) -> None:
    def fails(client: ClientRound) -> float:
        client.keep("fails", [1.0])
        raise ValueError("no")

    app, context = kit.app(probes={"rounds": rounds, "fails": fails}), kit.context()
    with pytest.raises(ValueError, match="no"):
        app(kit.message(kit.start(), request=["rounds", "fails"]), context)
    assert not context.state


def test_the_proximal_term_stands_with_its_method() -> None:
    from fedweight.clients import objective

    assert type(objective("proximal", mu=0.5)) is Proximal


@pytest.mark.parametrize("value", [None, "high", np.ones((2, 2)), 1j, [1, [2]], 2**70])
def test_a_probe_measures_numbers_alike_on_every_path(kit: Any, value: Any) -> None:
    from fedweight.core.errors import ClientError
    from fedweight.messages.dispatch import Cohort

    app = kit.app(probes={"odd": lambda client: value})
    message = kit.message(kit.start(), request=["odd"])
    said = r"probe 'odd' must return a number, or a list of at most 1,000,000 numbers"
    with pytest.raises(ClientError, match=said):
        app(message, kit.context())
    context = kit.context()
    cohort = Cohort(message.content, [context.node_id], "train")
    [reply] = app.answer(cohort, cohort.nodes, lambda node: context).replies
    assert said in reply.error.split("\n")[0]


@pytest.mark.parametrize(
    "name", ["loss", "accuracy", "num-examples", "label-counts", "loss-before", ""]
)
def test_a_probe_has_a_name_of_its_own(kit: Any, name: str) -> None:
    from fedweight.core.errors import ConfigurationError

    with pytest.raises(ConfigurationError, match="TrainingApp: "):
        kit.app(probes={name: half})


def test_an_answer_holds_numbers(kit: Any) -> None:
    from flwr.app import ConfigRecord, Message, RecordDict

    from fedweight.clients import Answer
    from fedweight.core.errors import ClientError

    asked = Message(
        RecordDict({"config": ConfigRecord({"query": "own"})}),
        dst_node_id=1000,
        message_type="query.ask",
    )

    def ask(answer: Any) -> Any:
        app = kit.app(queries={"own": lambda asked: answer})
        return app(asked, kit.context()).content

    found = ask(Answer({"n": np.int64(3), "b": True}, profile={"v": np.ones(2)}))
    assert dict(found["metrics"]) == {"n": 3, "b": 1}
    assert dict(found["profile"]) == {"v": [1.0, 1.0]}
    with pytest.raises(ClientError, match=r"query 'own' must return an Answer, got 3"):
        ask(3)
    with pytest.raises(ClientError, match=r"an Answer's 'n' must be a number, or a li"):
        ask(Answer({"n": None}))
    with pytest.raises(ClientError, match=r"an Answer's array 'x' must be of numbers"):
        ask(Answer(arrays={"x": np.array(["a"])}))
