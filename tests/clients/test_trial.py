"""What a trial finds out about a model, and from whose examples."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import Context, RecordDict
from torch import nn

from fedweight.clients.objectives import Objective, Plain
from fedweight.clients.samples import ROWS, Samples, kind_of
from fedweight.clients.trying import (
    Findings,
    mixes_examples,
    try_alone,
    try_batched,
)
from fedweight.data import ClientData, Examples


def context_of(client=0, clients=4, **config):
    config = config or {"partition-id": client, "num-partitions": clients}
    return Context(
        run_id=0, node_id=0, node_config=config, state=RecordDict(), run_config={}
    )


def found(kit, make, objective=None, examples=None):
    part = kit.examples(ROWS) if examples is None else examples
    return try_alone(make, part, objective or Plain(), "cpu", lambda: False)


@pytest.mark.parametrize(
    ("layer", "draws"),
    [
        (lambda: nn.AlphaDropout(), "aten.bernoulli_.float"),
        (lambda: nn.FeatureAlphaDropout(), "aten.bernoulli_.float"),
        (lambda: nn.RReLU(), "aten.rrelu_with_noise.default"),
        (lambda: nn.Dropout(), ""),
        (lambda: nn.Linear(4, 4), ""),
    ],
)
def test_what_draws_from_a_stream_of_the_process(kit, layer, draws):
    before = torch.get_rng_state()
    findings = found(kit, lambda: nn.Sequential(layer(), nn.Linear(4, 3)))
    assert findings == Findings(draws=draws)
    assert torch.equal(torch.get_rng_state(), before)


class Mixup(Objective):
    """Draws outside of the model."""

    def batch_loss(self, outputs, batch, facts):
        losses = F.cross_entropy(outputs, batch.y, reduction="none")
        return batch.mean(losses * torch.rand(len(losses)))


def test_an_objective_may_draw(kit):
    assert found(kit, kit.linear, Mixup()).draws == "PyTorch's stream"


class OwnFeatures(nn.Module):
    """Projects by random numbers that nobody is told."""

    def __init__(self):
        super().__init__()
        self.projection = torch.randn(4, 4)
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x @ self.projection)


class KnownFeatures(OwnFeatures):
    def __init__(self):
        super().__init__()
        del self.projection
        self.register_buffer("projection", torch.randn(4, 4))


def test_what_each_process_would_draw_for_itself_is_a_fault(kit):
    assert "must be a parameter or a buffer" in found(kit, OwnFeatures).fault
    assert not found(kit, KnownFeatures).fault


def test_a_model_that_needs_two_examples(kit):
    assert found(kit, kit.batch_norm).least == 2
    assert found(kit, kit.linear).least == 1
    assert found(kit, lambda: nn.Sequential(nn.BatchNorm1d(4).eval())).least == 2


def test_a_model_that_cannot_train_raises_its_error(kit):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        found(kit, lambda: nn.Linear(5, 3))


class Averages(Objective):
    """Forgets that there may be padding."""

    def batch_loss(self, outputs, batch, facts):
        return F.cross_entropy(outputs, batch.y)


class Single(nn.Linear):
    """Takes only single precision."""

    def forward(self, x):
        return super().forward(x.float())


@pytest.mark.parametrize(
    ("make", "objective", "why"),
    [
        (None, Plain(), ""),
        (lambda: Single(4, 3), Plain(), ""),
        (None, Averages(), "a batch that is not full gives another 'weight'"),
    ],
)
def test_whether_clients_may_train_at_once(kit, make, objective, why):
    make = make or kit.linear
    examples = kit.examples(ROWS)
    findings = found(kit, make, objective)
    said = try_batched(make, examples, objective, "cpu", findings, 8)
    assert said.startswith(why)
    assert bool(said) == bool(why)


def test_large_features_do_not_hide_a_difference(kit):
    part = kit.examples(ROWS)
    large = Examples(1e4 * part.x, part.y)
    for objective in (Plain(), Averages()):
        findings = found(kit, kit.linear, objective, large)
        said = try_batched(kit.linear, large, objective, "cpu", findings, 8)
        assert bool(said) == isinstance(objective, Averages)


def test_the_module_that_is_tried_is_left_as_it_is(kit):
    module = kit.linear()
    try_batched(
        lambda: module, kit.examples(ROWS), Plain(), "cpu", Findings(), batch_size=8
    )
    assert module.weight.dtype == torch.float32


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x - x.mean(0))


def test_whether_an_example_is_evaluated_by_itself(kit):
    part = kit.examples(ROWS)
    assert mixes_examples(Centred, part, "cpu")
    assert not mixes_examples(kit.batch_norm, part, "cpu")
    assert not mixes_examples(kit.linear, part, "cpu")


# Whose examples.


def parts_of(kit, sizes, broken=(), asked=None):
    def data(context):
        client = int(context.node_config.get("partition-id", 99))
        if asked is not None:
            asked.append(client)
        if client in broken:
            raise OSError("no such file")
        part = kit.examples(sizes[client % len(sizes)], seed=client)
        return ClientData(part, part)

    return data


KIND = ((4,), "<f4")


def test_they_are_the_same_whoever_asks(kit):
    data = parts_of(kit, [9, 1, 20, 7])
    for sizes in (None, [9, 1, 20, 7]):
        several = [next(Samples(data, context_of(k), sizes).of(KIND)) for k in range(4)]
        first = kit.examples(20, seed=2) if sizes else kit.examples(9, seed=0)
        for sample in several:
            assert len(sample) == ROWS
            assert np.isin(sample.x, first.x).all()
            np.testing.assert_array_equal(sample.x, several[0].x)


def test_small_clients_give_them_together(kit):
    asked = []
    data = parts_of(kit, [1], asked=asked)
    samples = list(Samples(data, context_of(clients=50), None).of(KIND))
    assert len(samples) == 1
    assert len(np.unique(samples[0].x, axis=0)) == ROWS
    assert asked == list(range(20))  # and nobody else


def test_clients_that_fail_or_have_others_kinds_are_passed_over(kit):
    data = parts_of(kit, [9], broken={0, 1})
    samples = Samples(data, context_of(), None)
    assert samples.kind() == KIND == kind_of(kit.examples(3))
    np.testing.assert_array_equal(
        next(samples.of(KIND)).x, kit.examples(9, seed=2).x[:ROWS]
    )
    other = ((7,), "<f4")
    own = kit.examples(2, features=7)
    (sample,) = samples.of(other, own)
    assert sample.x.shape == (ROWS, 7)
    assert not list(samples.of(other))


def test_nobody_has_any(kit):
    samples = Samples(parts_of(kit, [0]), context_of(), None)
    assert samples.kind() is None
    assert not list(samples.of(KIND))


def test_on_a_device_they_are_its_own(kit):
    asked = []
    data = parts_of(kit, [9], asked=asked)
    context = context_of(**{"data-path": "/a/file.csv"})
    assert len(next(Samples(data, context, None).of(KIND))) == ROWS
    assert asked == [99]


def test_examples_that_cannot_be_trained_with_are_left_out(kit):
    part = kit.examples(20)
    part.x[0, 1] = np.nan
    part.y[1] = -100
    part.x[3] = part.x[2]
    data = ClientData(part, part)
    sample = next(Samples(lambda context: data, context_of(), None).of(KIND))
    np.testing.assert_array_equal(sample.x, part.x[[2, 4, 5, 6]])


def test_a_trial_that_fails_is_made_again_with_others(kit, caplog):
    def data(context):
        client = int(context.node_config["partition-id"])
        part = kit.examples(9, seed=client)
        if client == 0:
            part.y[:] = 99
        return ClientData(part, part)

    app = kit.app(kit.batch_norm, data)
    with caplog.at_level(logging.DEBUG, "fedweight"):
        assert app._trials.alone(KIND, context_of()).least == 2
    assert "a trial of the model failed" in caplog.text
