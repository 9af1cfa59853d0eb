"""Clients that are probed together: as each alone, in one go."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedweight.clients import evaluation, peers
from fedweight.clients.probes import ClientRound
from fedweight.core.threads import one_thread
from fedweight.data import ClientData, Examples
from fedweight.messages.dispatch import Cohort

CLIENTS = 5

MEASURED = (
    "loss-before",
    "loss-after",
    "accuracy-before",
    "accuracy-after",
    "held-out-loss-before",
    "held-out-accuracy-after",
)


def shrunk(client: ClientRound):
    """A model of a client's own; the fourth has none."""
    if client.client == 3:
        return None
    trained = client.trained
    return trained.with_parameters(trained.parameters * (1 - client.client / 10))


def of_shrunk(client: ClientRound) -> list[float]:
    return list(client.evaluate(shrunk, "held-out or train"))


def of_another(client: ClientRound) -> float:
    return client.evaluate(
        client.received.with_parameters(client.trained.parameters)
    ).loss


def first_outputs(client: ClientRound) -> list[float]:
    return client.outputs("held-out")[:1].flatten().tolist()


OWN = {"of-shrunk": of_shrunk, "of-another": of_another, "outputs": first_outputs}


def mixing() -> nn.Module:
    class Mixing(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mixing(4, 3)


def asked(kit, model, *, batched, request=(*MEASURED, *OWN), data=None):
    """Train and probe some clients; return their replies."""
    data = {} if data is None else {"data": data}
    app = kit.app(model, probes=OWN, **data)
    message = kit.message(kit.start(model), request=list(request))
    cohort = Cohort(message.content, [1000 + k for k in range(CLIENTS)], "train")
    with one_thread():
        answers = app.answer(
            cohort, cohort.nodes, lambda node: kit.context(node - 1000), batched=batched
        )
    return answers.replies


@pytest.mark.parametrize("make", ["linear", "dropout", "batch_norm"])
def test_together_is_as_alone(kit, make):
    model = getattr(kit, make)
    together = asked(kit, model, batched=True)
    for one, alone in zip(together, asked(kit, model, batched=False), strict=True):
        assert one.error is None
        for name in (*MEASURED, "of-another"):
            assert one.metrics[name] == pytest.approx(alone.metrics[name], rel=1e-5)
        for name in ("of-shrunk", "outputs"):
            found, expected = one.profile[name], alone.profile[name]
            assert found == pytest.approx(expected, rel=1e-4, nan_ok=True)
    values = [one.metrics["loss-before"] for one in together]
    assert len(set(values)) == CLIENTS


def test_a_function_may_make_no_model(kit):
    *_, fourth, fifth = asked(kit, kit.linear, batched=True)
    assert all(map(math.isnan, fourth.profile["of-shrunk"]))
    assert not any(map(math.isnan, fifth.profile["of-shrunk"]))


@pytest.mark.parametrize(
    ("make", "batched", "calls"),
    [
        ("linear", True, {"sums_of_each": 2, "sums_of_own": 3, "outputs_of_each": 1}),
        ("linear", False, {"sums_of_each": 24, "sums_of_own": 0, "outputs_of_each": 1}),
    ],
)
def test_all_are_measured_at_the_first_question(kit, monkeypatch, make, batched, calls):
    made = dict.fromkeys(calls, 0)
    for name in calls:

        def counted(*given, name=name, **named):
            made[name] += 1
            return getattr(evaluation, name)(*given, **named)

        monkeypatch.setattr(peers, name, counted)
    request = [name for name in (*MEASURED, *OWN) if name != "of-another"]
    asked(kit, getattr(kit, make), batched=batched, request=request)
    assert made == calls


def test_a_model_that_mixes_examples_sees_each_clients_alone(kit):
    together = asked(kit, mixing, batched=True)
    for one, alone in zip(together, asked(kit, mixing, batched=False), strict=True):
        assert one.metrics["loss-before"] == alone.metrics["loss-before"]
        assert one.profile["outputs"] == alone.profile["outputs"]


def test_what_has_no_held_out_examples_is_measured_where_it_trained(kit):
    def data(context):
        own = kit.client_of(context)
        k = int(context.node_config["partition-id"])
        return own if k else ClientData(own.train, own.train.take(slice(0)))

    request = ["held-out-loss-before", "loss-after", "of-shrunk"]
    first, second, *_ = asked(kit, kit.linear, batched=True, data=data, request=request)
    assert math.isnan(first.metrics["held-out-loss-before"])
    assert not math.isnan(second.metrics["held-out-loss-before"])
    # The first one's is its trained model.
    assert first.profile["of-shrunk"][0] == pytest.approx(first.metrics["loss-after"])


def test_inputs_of_several_kinds_are_measured_alone(kit):
    def data(context):
        own = kit.client_of(context)
        if int(context.node_config["partition-id"]):
            return own
        x = own.held_out.x[:, None]  # For a linear layer it is the same.
        return ClientData(own.train, Examples(x.repeat(1, 1), own.held_out.y))

    replies = asked(kit, kit.linear, batched=True, request=MEASURED[:4], data=data)
    assert all(reply.error is None for reply in replies)


def test_models_are_measured_some_at_a_time(kit, monkeypatch):
    whole = asked(kit, kit.linear, batched=True)
    monkeypatch.setattr(peers, "MOST_VALUES", 2 * (15 + 4 * 13))
    for one, other in zip(asked(kit, kit.linear, batched=True), whole, strict=True):
        for name in MEASURED:
            assert one.metrics[name] == pytest.approx(other.metrics[name], rel=1e-6)


def test_outputs_of_nobody_are_none(kit):
    from fedweight.clients.evaluation import outputs_of_each
    from fedweight.core.module import FlatModule

    module = FlatModule(kit.linear())
    parts = [kit.examples(3), kit.examples(0), kit.examples(2)]
    found = outputs_of_each(module, module.save(), parts)
    assert [tuple(one.shape) for one in found] == [(3, 3), (0, 3), (2, 3)]
    alone = outputs_of_each(module, module.save(), parts, apart=True)
    assert not len(alone[1])
    np.testing.assert_allclose(found[0], alone[0], rtol=1e-6)
    np.testing.assert_allclose(found[2], alone[2], rtol=1e-6)
