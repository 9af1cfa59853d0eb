"""One client's training against PyTorch's own optimisers, on the same batches."""

import math
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedweight import models
from fedweight.clients import Batch, Objective, TrainingSettings, objective
from fedweight.clients.evaluation import (
    CLASSIFIED,
    EVALUATION_BATCH,
    _batches,
    evaluate,
    sums_of_each,
)
from fedweight.clients.objectives import Facts, Plain, Proximal
from fedweight.clients.steps.loop import train
from fedweight.clients.steps.task import Task
from fedweight.core.errors import ClientError, ConfigurationError
from fedweight.core.module import FlatModule
from fedweight.core.rng import Purpose, keys, permutation
from fedweight.data import Examples


def trained(make, part, settings, *, round=1, client=0, goal=None, **options):
    module = FlatModule(make())
    start = module.save()
    result = train(
        module,
        start,
        Task(part, settings.epochs, order_key(round, client)),
        goal or Plain(),
        settings,
        learning_rate=settings.learning_rate_in(round),
        **options,
    )
    return start, result


def order_key(round=1, client=0):
    return int(keys(0, Purpose.SHUFFLE, round, [client])[0])


def by_torch(make, part, settings, optimizer, *, mu=0.0, round=1):
    """The same training, as anybody would write it in PyTorch."""
    module = make()
    module.train()
    received = [p.detach().clone() for p in module.parameters()]
    step = optimizer([p for p in module.parameters() if p.requires_grad])
    losses, correct = [], 0
    for epoch in range(settings.epochs):
        order = permutation(order_key(round), epoch, len(part))
        for first in range(0, len(part), settings.batch_size):
            rows = order[first : first + settings.batch_size]
            x, y = torch.from_numpy(part.x[rows]), torch.from_numpy(part.y[rows])
            outputs = module(x)
            loss = F.cross_entropy(outputs, y)
            losses += [loss.item()] * len(rows)
            correct += int((outputs.argmax(1) == y).sum())
            for p, w in zip(module.parameters(), received, strict=True):
                loss = loss + mu / 2 * (p - w).square().sum()
            step.zero_grad()
            loss.backward()
            step.step()
    total = len(part) * settings.epochs
    return module, float(np.mean(losses)), correct / total


CASES = {
    "sgd": ({"learning_rate": 0.3}, {}),
    "momentum": ({"learning_rate": 0.1, "momentum": 0.9}, {"momentum": 0.9}),
    "weight decay": ({"weight_decay": 0.05}, {"weight_decay": 0.05}),
    "both": (
        {"momentum": 0.5, "weight_decay": 0.01},
        {"momentum": 0.5, "weight_decay": 0.01},
    ),
    "adam": ({"optimizer": "adam", "learning_rate": 0.01}, {}),
    "adam with decay": (
        {"optimizer": "adam", "learning_rate": 0.01, "weight_decay": 0.1},
        {"weight_decay": 0.1},
    ),
}


@pytest.mark.parametrize("mu", [0.0, 0.7])
@pytest.mark.parametrize("case", CASES)
def test_training_is_what_torch_optim_does(kit, case, mu):
    ours, theirs = CASES[case]
    settings = TrainingSettings(epochs=3, batch_size=5, **ours)
    part = kit.examples(17)  # the last batch of a pass has 2 examples
    goal = Proximal(mu) if mu else Plain()
    _, result = trained(kit.linear, part, settings, goal=goal)

    def optimizer(parameters):
        kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.SGD
        return kind(parameters, lr=settings.learning_rate, **theirs)

    module, loss, accuracy = by_torch(kit.linear, part, settings, optimizer, mu=mu)
    expected = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    torch.testing.assert_close(result.model.parameters, expected, atol=1e-6, rtol=0)
    assert result.loss == pytest.approx(loss, abs=1e-6)
    assert result.accuracy == pytest.approx(accuracy, abs=1e-6)
    assert result.num_steps == 3 * 4


class Linearised(Objective):
    """A loss whose gradient is what a test says."""

    def batch_loss(self, outputs, batch, facts):
        return (outputs * torch.tensor([0.5, 0.25])).sum()


class Direct(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0]))

    def forward(self, x):
        return self.w.expand(len(x), 2)


def test_one_proximal_step_has_the_golden_value():
    file = Path(__file__).parents[1] / "golden" / "fedprox.toml"
    expected = tomllib.loads(file.read_text())["local_step"]
    module = FlatModule(Direct())
    start = module.save().with_parameters(torch.tensor(expected["global_model"]))
    goal = Proximal(expected["proximal_mu"], Linearised())
    w = torch.tensor(expected["model"])
    outputs = w.clone().requires_grad_()
    batch = Batch(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))
    facts = Facts(start.parameters)
    goal.batch_loss(outputs[None], batch, facts).backward()
    assert outputs.grad.tolist() == expected["gradient"]
    gradient = outputs.grad + goal.penalty_gradient(w, facts)
    step = w - expected["learning_rate"] * gradient
    assert step.tolist() == pytest.approx(expected["next"], abs=1e-6)


def test_the_second_step_feels_the_proximal_term():
    part = Examples(np.zeros((1, 1), np.float32), np.zeros(1, np.int64))
    settings = TrainingSettings(epochs=2, learning_rate=0.1)
    _, result = trained(Direct, part, settings, goal=Proximal(0.1, Linearised()))
    # The first step starts at the received model, where the term is 0.
    first = np.array([1.0, -2.0]) - 0.1 * np.array([0.5, 0.25])
    drift = first - np.array([1.0, -2.0])
    second = first - 0.1 * (np.array([0.5, 0.25]) + 0.1 * drift)
    np.testing.assert_allclose(result.model.parameters, second, atol=1e-6)


def test_mu_0_is_plain_training_to_the_last_bit(kit):
    settings = TrainingSettings(epochs=2, batch_size=4, momentum=0.9)
    _, plain = trained(kit.linear, kit.examples(10), settings)
    _, proximal = trained(kit.linear, kit.examples(10), settings, goal=Proximal(0.0))
    assert torch.equal(plain.model.parameters, proximal.model.parameters)


def test_a_proximal_term_adds_to_the_inner_objectives_own():
    w, facts = torch.tensor([3.0]), Facts(torch.tensor([1.0]))
    nested = Proximal(0.5, Proximal(0.25))
    assert nested.penalty_gradient(w, facts).tolist() == [1.5]
    assert Proximal(0.0, Proximal(0.25)).penalty_gradient(w, facts).tolist() == [0.5]
    assert Plain().penalty_gradient(w, facts) is None


def test_padding_does_not_count():
    outputs = torch.tensor([[2.0, 0.0], [0.0, 1.0], [5.0, -5.0]])
    y = torch.tensor([0, 0, 1])
    padded = Batch(torch.zeros(3, 1), y, mask=torch.tensor([1.0, 1.0, 0.0]))
    real = Batch(torch.zeros(2, 1), y[:2])
    facts = Facts(torch.zeros(0))
    assert float(Plain().batch_loss(outputs, padded, facts)) == pytest.approx(
        float(Plain().batch_loss(outputs[:2], real, facts))
    )


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_frozen_parameters_stay(kit, kind):
    def make():
        module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        torch.manual_seed(0)
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        module[0].requires_grad_(False)
        return module

    settings = TrainingSettings(
        epochs=2, batch_size=4, momentum=0.9, weight_decay=0.1, optimizer=kind
    )
    with torch.random.fork_rng(devices=[]):
        start, result = trained(make, kit.examples(10), settings, goal=Proximal(0.1))
    before, after = start.state_dict(), result.model.state_dict()
    for name in before:
        assert torch.equal(after[name], before[name]) == name.startswith("0.")


def test_batch_norm_statistics_and_counters_travel(kit):
    settings = TrainingSettings(epochs=2, batch_size=4, learning_rate=0.1)
    part = kit.examples(8)
    start, result = trained(kit.batch_norm, part, settings)

    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    module, _, _ = by_torch(kit.batch_norm, part, settings, optimizer)
    state = module.state_dict()
    expected = torch.cat([state["1.running_mean"], state["1.running_var"]])
    torch.testing.assert_close(result.model.buffers, expected, atol=1e-6, rtol=0)
    assert int(result.model.integers["1.num_batches_tracked"]) == 4
    assert int(start.integers["1.num_batches_tracked"]) == 0


def test_training_leaves_the_received_model_alone(kit):
    module = FlatModule(kit.batch_norm())
    start = module.save()
    copies = start.parameters.clone(), start.buffers.clone()
    train(
        module,
        start,
        Task(kit.examples(8), epochs=1, order_key=0),
        Plain(),
        TrainingSettings(batch_size=4),
        learning_rate=0.5,
    )
    assert torch.equal(start.parameters, copies[0])
    assert torch.equal(start.buffers, copies[1])


def test_a_client_without_examples_returns_what_it_received(kit):
    start, result = trained(kit.linear, kit.examples(0), TrainingSettings())
    assert torch.equal(result.model.parameters, start.parameters)
    assert np.isnan(result.loss)
    assert np.isnan(result.accuracy)
    assert result.num_steps == 0


def test_the_same_stream_gives_the_same_bits_and_another_another_order(kit):
    settings = TrainingSettings(epochs=2, batch_size=4)
    part = kit.examples(20)

    def model(**stream):
        return trained(kit.linear, part, settings, **stream)[1].model.parameters

    assert torch.equal(model(round=1, client=3), model(round=1, client=3))
    assert not torch.equal(model(round=1, client=3), model(round=1, client=4))
    assert not torch.equal(model(round=1, client=3), model(round=2, client=3))


def test_who_used_the_module_before_does_not_matter(kit):
    settings = TrainingSettings(optimizer="adam", epochs=2, batch_size=4)
    module = FlatModule(kit.batch_norm())
    start = module.save()

    def model(module, client, n):
        task = Task(kit.examples(n, seed=client), 2, order_key(1, client))
        result = train(module, start, task, Plain(), settings, learning_rate=0.1).model
        return torch.cat([result.parameters, result.buffers])

    alone = model(FlatModule(kit.batch_norm()), 5, 12)
    model(module, 1, 8)
    evaluate(module, start, kit.examples(7))
    with pytest.raises(ValueError, match="more than 1 value"):
        model(module, 2, 9)  # BatchNorm refuses its last batch, of one example
    assert torch.equal(model(module, 5, 12), alone)


class SometimesNoisy(nn.Module):
    """Draws noise where a batch has more than one example."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(F.dropout(x, 0.5, self.training and len(x) > 1))


def test_whether_a_model_draws_noise_is_asked_for_each_client(kit):
    def trained(sizes):
        module = FlatModule(SometimesNoisy())
        module.parameters.fill_(0.1)
        start = module.save()
        tasks = [Task(kit.examples(n, seed=n), 1, 1, 2) for n in sizes]
        return [
            train(
                module, start, task, Plain(), TrainingSettings(), learning_rate=0.1
            ).model.parameters
            for task in tasks
        ]

    assert torch.equal(trained([1, 8])[1], trained([8])[0])


def test_a_module_that_its_owner_put_in_evaluation_mode_trains(kit):
    module = FlatModule(kit.batch_norm())
    start = module.save()
    task = Task(kit.examples(8), 1, order_key(1, 0))

    def model():
        settings = TrainingSettings()
        return train(module, start, task, Plain(), settings, learning_rate=0.1).model

    first = model()
    module.module.eval()
    assert torch.equal(model().buffers, first.buffers)


def test_a_layer_that_came_in_evaluation_mode_trains(kit):
    def model(evaluated):
        network = kit.batch_norm()
        network.eval()
        module = FlatModule(network)
        start = module.save()
        if evaluated:
            evaluate(module, start, kit.examples(7))
        task = Task(kit.examples(8), 1, order_key(1, 0))
        result = train(
            module, start, task, Plain(), TrainingSettings(), learning_rate=0.1
        )
        return result.model.buffers, start.buffers

    trained, received = model(evaluated=False)
    assert not torch.equal(trained, received)
    assert torch.equal(model(evaluated=True)[0], trained)


def test_the_learning_rate_decays_by_the_round():
    settings = TrainingSettings(learning_rate=0.4, learning_rate_decay=0.5)
    rates = [settings.learning_rate_in(t) for t in (1, 2, 3)]
    assert rates == [0.4, 0.2, 0.1]


def test_evaluate_is_the_mean_over_all_examples(kit):
    part = kit.examples(2500)  # more than one batch, the last one smaller
    module = FlatModule(kit.linear())
    loss, accuracy = evaluate(module, module.save(), part).values()
    x, y = torch.from_numpy(part.x), torch.from_numpy(part.y)
    with torch.no_grad():
        outputs = kit.linear()(x)
    assert loss == pytest.approx(float(F.cross_entropy(outputs, y)), abs=1e-6)
    assert accuracy == float((outputs.argmax(1) == y).double().mean())


def test_evaluate_uses_running_statistics_and_no_dropout(kit):
    module = FlatModule(nn.Sequential(kit.batch_norm(), nn.Dropout(0.9)))
    model = module.save()
    model.buffers = torch.arange(1.0, 11.0)
    part = kit.examples(50)
    loss = evaluate(module, model, part)["loss"]
    assert evaluate(module, model, part)["loss"] == loss
    plain = kit.batch_norm()
    plain[1].running_mean.copy_(model.buffers[:5])
    plain[1].running_var.copy_(model.buffers[5:])
    plain.eval()
    with torch.no_grad():
        outputs = plain(torch.from_numpy(part.x))
    expected = float(F.cross_entropy(outputs, torch.from_numpy(part.y)))
    assert loss == pytest.approx(expected, abs=1e-6)


def test_evaluate_nothing_is_nan(kit):
    module = FlatModule(kit.linear())
    measured = evaluate(module, module.save(), kit.examples(0))
    assert all(map(np.isnan, measured.values()))


def test_training_stops_at_the_next_step_once_cancelled(kit):
    asked = []

    def cancelled():
        asked.append(True)
        return len(asked) == 3

    with pytest.raises(ClientError, match="cancelled"):
        trained(
            kit.linear,
            kit.examples(20),
            TrainingSettings(batch_size=5),
            cancelled=cancelled,
        )
    assert len(asked) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"optimizer": "sdg"},
        {"learning_rate": -0.1},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"learning_rate_decay": 0.0},
        {"learning_rate_decay": 1.1},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        TrainingSettings(**wrong)


def test_no_epoch_is_no_training(kit):
    with pytest.raises(ConfigurationError, match="epochs"):
        Task(kit.examples(5), epochs=0, order_key=0)


def test_an_objective_is_made_by_name_and_must_be_one():
    assert isinstance(objective("plain"), Plain)
    assert objective("proximal", mu=0.3).mu == 0.3
    with pytest.raises(ConfigurationError, match="Did you mean 'proximal'"):
        objective("proximale")
    with pytest.raises(ConfigurationError, match="not derived from"):
        objective("fractions:Fraction")
    with pytest.raises(ConfigurationError, match="mu"):
        objective("proximal", mu=-1.0)


# One model on the examples of several clients.


@pytest.mark.parametrize("sizes", [[3, 0, 1500, 7, 0], [0, 5], [5], [700, 700, 700]])
def test_evaluating_several_clients_at_once_is_evaluating_each(kit, sizes):
    module = FlatModule(kit.batch_norm())
    model = module.save()
    parts = [kit.examples(n, seed=k) for k, n in enumerate(sizes)]
    at_once = CLASSIFIED.result(sums_of_each(module, model, parts))
    one_by_one = [evaluate(module, model, part) for part in parts]
    for name in ("loss", "accuracy"):
        each = [measured[name] for measured in one_by_one]
        np.testing.assert_allclose(at_once[name], each, rtol=0, atol=1e-6)
    assert np.isnan(at_once["loss"]).tolist() == [n == 0 for n in sizes]


def test_evaluating_nothing_for_anybody_is_nan(kit):
    module = FlatModule(kit.linear())
    nothing = [kit.examples(0)] * 2
    sums = sums_of_each(module, module.save(), nothing)
    assert np.isnan(CLASSIFIED.result(sums)["loss"]).all()
    assert len(sums_of_each(module, module.save(), [])) == 0


def test_the_model_is_called_once_for_many_small_clients(kit):
    calls = []

    class Counts(nn.Linear):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    module = FlatModule(Counts(4, 3))
    sums_of_each(module, module.save(), [kit.examples(5)] * 30)
    assert calls == [150]
    sums_of_each(module, module.save(), [kit.examples(400)] * 3)
    assert calls[1:] == [EVALUATION_BATCH, 1200 - EVALUATION_BATCH]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 10))
def test_batches_are_all_rows_in_their_order(sizes, size):
    rows = torch.arange(sum(sizes))
    parts = [part.numpy() for part in rows.split(sizes)]
    met = list(_batches(parts, size, torch.device("cpu")))
    assert torch.equal(torch.cat([rows[:0], *(b for _, b in met)]), rows)
    assert [first for first, _ in met] == list(range(0, len(rows), size))
    assert all(len(batch) == size for _, batch in met[:-1])


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("rate", [0.05, 0.4])
def test_from_where_a_proximal_term_diverges(momentum, rate):
    """The term alone: without a gradient of the loss, from a small way off."""
    settings = TrainingSettings(learning_rate=rate, momentum=momentum)

    def distance(mu):
        goal, received = Proximal(mu), torch.zeros(1, dtype=torch.float64)
        w = torch.ones(1, dtype=torch.float64)
        optimizer = torch.optim.SGD([w], lr=rate, momentum=momentum)
        for _ in range(2000):
            w.grad = goal.penalty_gradient(w, Facts(received))
            optimizer.step()
        return abs(float(w))

    limit = settings.diverging_mu
    assert distance(0.99 * limit) < 1e-3
    assert distance(1.01 * limit) > 1e3


def test_adam_and_a_rate_of_nothing_never_diverge_by_a_proximal_term():
    assert TrainingSettings(optimizer="adam").diverging_mu == math.inf
    assert TrainingSettings(learning_rate=0.0).diverging_mu == math.inf


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_laid_out_as_a_convolutional_model_computes_fastest(channels):
    """It trains to the same values, to rounding, and sees channels last."""
    rng = np.random.default_rng(0)
    x = rng.random((12, channels, 28, 28), dtype=np.float32)
    task = Task(Examples(x, rng.integers(0, 10, 12)), 3, order_key=7)
    settings = TrainingSettings(batch_size=4, learning_rate=0.05)
    seen, trained = [], []
    for channels_last in (True, False):
        torch.manual_seed(0)
        model = models.build("cnn", (channels, 28, 28), 10)
        assert model.channels_last
        model.channels_last = channels_last
        model.register_forward_pre_hook(lambda _, inputs: seen.append(*inputs))
        module = FlatModule(model)
        start = module.save()
        result = train(module, start, task, Plain(), settings, learning_rate=0.05)
        trained.append(result.model.parameters)
    half = len(seen) // 2
    assert {x.stride()[1] for x in seen[:half]} == {1}
    assert {x.stride()[1] for x in seen[half:]} == {28 * 28}
    torch.testing.assert_close(*trained, rtol=0, atol=1e-6)
    assert (trained[0] - start.parameters).abs().max() > 1e-3
