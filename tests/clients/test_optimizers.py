"""Optimisers, clipping and rates of one's own: PyTorch's, alone and at once."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedweight.clients import TrainingSettings
from fedweight.clients.objectives import Plain, Proximal
from fedweight.clients.optimizers import (
    OPTIMIZERS,
    SGD,
    Adagrad,
    Adam,
    AdamW,
    Foreign,
    RMSprop,
    clip_each,
    optimizer_of,
)
from fedweight.clients.rate_schedules import Cosine, Exponential
from fedweight.clients.steps.batched import BatchedTrainer
from fedweight.clients.steps.loop import train
from fedweight.clients.steps.task import Task
from fedweight.core.errors import ConfigurationError
from fedweight.core.layout import Layout
from fedweight.core.module import FlatModule
from fedweight.core.rng import permutation
from fedweight.data import Examples

# Ours, PyTorch's class, and what it is called with besides.
CASES = {
    "nesterov": (
        SGD(momentum=0.9, nesterov=True),
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True},
    ),
    "dampening": (
        SGD(momentum=0.8, dampening=0.3),
        torch.optim.SGD,
        {"momentum": 0.8, "dampening": 0.3},
    ),
    "adam": (
        Adam(beta_1=0.8, beta_2=0.95, epsilon=1e-6),
        torch.optim.Adam,
        {"betas": (0.8, 0.95), "eps": 1e-6},
    ),
    "adamw": (AdamW(), torch.optim.AdamW, {}),
    "adagrad": (Adagrad(), torch.optim.Adagrad, {}),
    "adagrad with all": (
        Adagrad(step_decay=0.1, initial_sum=0.2, epsilon=1e-3),
        torch.optim.Adagrad,
        {"lr_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-3},
    ),
    "rmsprop": (RMSprop(), torch.optim.RMSprop, {}),
    "rmsprop with all": (
        RMSprop(alpha=0.9, epsilon=1e-6, momentum=0.5, centered=True),
        torch.optim.RMSprop,
        {"alpha": 0.9, "eps": 1e-6, "momentum": 0.5, "centered": True},
    ),
}
FOREIGN = {
    "a foreign one": (
        Foreign("torch.optim:NAdam", {"momentum_decay": 0.01}),
        torch.optim.NAdam,
        {"momentum_decay": 0.01},
    ),
    "a foreign one of ours": (
        Foreign("torch.optim:SGD", {"momentum": 0.9}),
        torch.optim.SGD,
        {"momentum": 0.9},
    ),
}
SIZES = [19, 8, 3, 17]  # Batches of 8, of which the last ones are not full.
RATES = [0.05, 0.02, 0.01, 0.04]


class Gated(nn.Module):
    """A layer that only some batches go through: it has no gradient in the others."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.sometimes = nn.Linear(6, 6)
        self.never = nn.Parameter(torch.ones(3))

    def forward(self, x):
        h = self.first(x).relu()
        return self.last(self.sometimes(h) if len(x) == 8 else h)


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def made(make, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().to(dtype)


def tasks_of(sizes=SIZES, dtype=np.float32, epochs=(2, 3, 1)):
    rng = np.random.default_rng(3)
    return [
        Task(
            Examples(rng.standard_normal((n, 4)).astype(dtype), rng.integers(0, 3, n)),
            epochs[k % len(epochs)],
            10 + k,
        )
        for k, n in enumerate(sizes)
    ]


def by_torch(make, task, kind, *, clip=0.0, scheduler=None, dtype=torch.float32, **o):
    """The same training, as anybody would write it in PyTorch."""
    module = made(make, dtype)
    layout = Layout.of_module(module)
    vector = torch.empty(layout.num_parameters, dtype=dtype)
    named = dict(module.named_parameters())
    for e in layout.parameters:  # A product's last bits depend on the place.
        values = vector[e.start : e.stop].view(e.shape)
        named[e.name].data = values.copy_(named[e.name].detach())
    step = kind(module.parameters(), **o)
    falls = scheduler and scheduler(step)
    x, y = torch.from_numpy(task.examples.x), torch.from_numpy(task.examples.y)
    for epoch in range(task.epochs):
        order = torch.from_numpy(permutation(task.order_key, epoch, len(y)))
        for rows in order.split(8):
            step.zero_grad()
            F.cross_entropy(module(x[rows]), y[rows]).backward()
            if clip:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            step.step()
            if falls:
                falls.step()
    return module.state_dict()


def alone(make, task, settings, rate, goal=None, dtype=torch.float32):
    module = FlatModule(made(make, dtype))
    options = {"learning_rate": rate}
    return train(module, module.save(), task, goal or Plain(), settings, **options)


def at_once(make, tasks, settings, rates, goal=None, dtype=torch.float32):
    module = FlatModule(made(make, dtype))
    trainer = BatchedTrainer(module, goal or Plain(), settings)
    return trainer.train(module.save(), tasks, learning_rate=rates)


def assert_same(found, expected, atol=1e-9):
    torch.testing.assert_close(
        found.model.parameters, expected.model.parameters, atol=atol, rtol=0
    )
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)
    assert found.num_steps == expected.num_steps


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("make", [net, Gated])
@pytest.mark.parametrize("case", [*CASES, *FOREIGN])
def test_alone_it_is_torch_optim_to_the_bit(case, make, decay):
    ours, kind, theirs = (CASES | FOREIGN)[case]
    settings = TrainingSettings(batch_size=8, optimizer=ours, weight_decay=decay)
    for task in tasks_of():
        found = alone(make, task, settings, 0.05).model.state_dict()
        expected = by_torch(make, task, kind, lr=0.05, weight_decay=decay, **theirs)
        for name, values in expected.items():
            assert torch.equal(found[name], values), name


@pytest.mark.parametrize("goal", [Plain(), Proximal(0.5)])
@pytest.mark.parametrize("case", CASES)
def test_at_once_it_is_what_each_is_alone(case, goal):
    settings = TrainingSettings(
        batch_size=8, optimizer=CASES[case][0], weight_decay=0.01, clip_norm=0.4
    )
    tasks, double = tasks_of(dtype=np.float64), torch.float64
    results = at_once(net, tasks, settings, 0.05, goal, double)
    for task, found in zip(tasks, results, strict=True):
        assert_same(found, alone(net, task, settings, 0.05, goal, double))


@pytest.mark.parametrize("case", ["plain", *CASES])
@pytest.mark.parametrize(
    "schedule", ["constant", Cosine(schedule_over="steps", schedule_least=0.1)]
)
def test_clients_with_rates_of_their_own_train_at_once(case, schedule):
    settings = TrainingSettings(
        batch_size=8,
        optimizer=SGD() if case == "plain" else CASES[case][0],
        weight_decay=0.0 if case == "plain" else 0.01,
        learning_rate_schedule=schedule,
    )
    tasks, double = tasks_of(dtype=np.float64), torch.float64
    results = at_once(net, tasks, settings, RATES, dtype=double)
    for task, found, rate in zip(tasks, results, RATES, strict=True):
        assert_same(found, alone(net, task, settings, rate, dtype=double))


def test_one_trainer_takes_equal_rates_and_others_in_turn():
    settings, tasks = TrainingSettings(batch_size=8), tasks_of([16, 16, 16])
    module = FlatModule(made(net))
    trainer, start = BatchedTrainer(module, Plain(), settings), module.save()
    for rates in (0.1, RATES[:3], [0.1] * 3, RATES[:3], 0.2):
        each = [rates] * 3 if isinstance(rates, float) else rates
        results = trainer.train(start, tasks, learning_rate=rates)
        for task, found, rate in zip(tasks, results, each, strict=True):
            assert_same(found, alone(net, task, settings, rate), atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_client_with_rate_0_stays(decay):
    settings = TrainingSettings(batch_size=8, weight_decay=decay)
    tasks = tasks_of([16, 16])
    still, moved = at_once(net, tasks, settings, [0.0, 0.1])
    start = FlatModule(made(net)).save().parameters
    assert torch.equal(still.model.parameters, start)
    assert not torch.equal(moved.model.parameters, start)


@pytest.mark.parametrize("clip", [0.05, 0.5, 100.0])
@pytest.mark.parametrize("case", ["nesterov", "adam", "a foreign one"])
def test_clipping_is_clip_grad_norm(case, clip):
    ours, kind, theirs = (CASES | FOREIGN)[case]
    settings = TrainingSettings(batch_size=8, optimizer=ours, clip_norm=clip)
    for task in tasks_of(dtype=np.float64):
        found = alone(net, task, settings, 0.05, dtype=torch.float64)
        options = {"lr": 0.05, "clip": clip, "dtype": torch.float64, **theirs}
        for name, values in by_torch(net, task, kind, **options).items():
            own = found.model.state_dict()[name]
            torch.testing.assert_close(own, values, atol=1e-9, rtol=0)


def test_clipping_binds_each_client_for_itself():
    gradients = [torch.tensor([[3.0, 0.0], [0.3, 0.0]]), torch.tensor([[4.0], [0.4]])]
    one, other = clip_each(gradients, 1.0)
    torch.testing.assert_close(one, torch.tensor([[0.6, 0.0], [0.3, 0.0]]))
    torch.testing.assert_close(other, torch.tensor([[0.8], [0.4]]))
    assert gradients[0][0, 0] == 3.0


@pytest.mark.parametrize("case", ["dampening", "adam", "a foreign one"])
def test_a_schedule_over_steps_is_pytorchs(case):
    ours, kind, theirs = (CASES | FOREIGN)[case]
    schedule = Exponential(schedule_over="steps", schedule_factor=0.7)
    settings = TrainingSettings(
        batch_size=8, optimizer=ours, learning_rate_schedule=schedule
    )
    for task in tasks_of():
        found = alone(net, task, settings, 0.05).model.state_dict()
        expected = by_torch(
            net,
            task,
            kind,
            scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7),
            lr=0.05,
            **theirs,
        )
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, atol=1e-6, rtol=0)


class Halves(torch.optim.Optimizer):
    """A user's own, which takes no weight decay."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad.div_(2), alpha=-group["lr"])  # Changes it, too.


def test_an_optimizer_of_ones_own_trains_alone():
    settings = TrainingSettings(batch_size=8, optimizer=f"{__name__}:Halves")
    plain = TrainingSettings(batch_size=8)
    (task,) = tasks_of([16])
    own, half = alone(Gated, task, settings, 0.2), alone(Gated, task, plain, 0.1)
    assert torch.equal(own.model.parameters, half.model.parameters)
    assert not settings.rule.batches
    decaying = TrainingSettings(optimizer=f"{__name__}:Halves", weight_decay=0.1)
    with pytest.raises(ConfigurationError, match="takes no weight decay"):
        alone(net, task, decaying, 0.1)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("sdg", {}, "Did you mean 'sgd'"),
        ("sgd", {"beta_1": 0.5}, "optimizer 'sgd' has no option 'beta_1'"),
        ("sgd", {"nesterov": True}, "needs momentum above 0"),
        ("sgd", {"dampening": 1.0}, r"dampening must be in \[0, 1\)"),
        ("adam", {"epsilon": 0.0}, r"epsilon must be in \(0, inf\)"),
        ("torch.optim:NAdam", {"momentum": 0.1}, "has no option 'momentum'"),
        ("fractions:Fraction", {}, "is not derived from torch.optim.Optimizer"),
    ],
)
def test_what_is_refused(name, options, said):
    with pytest.raises(ConfigurationError, match=said):
        optimizer_of(name, options)


def test_momentum_is_given_in_one_place():
    with pytest.raises(ConfigurationError, match="Give it there"):
        TrainingSettings(optimizer=SGD(), momentum=0.9)
    assert TrainingSettings(momentum=0.9).rule == SGD(momentum=0.9)
    assert TrainingSettings(optimizer="rmsprop", momentum=0.9).rule.momentum == 0.9
    assert TrainingSettings(optimizer="adam", momentum=0.9).rule == Adam()


@pytest.mark.parametrize("name", [*OPTIMIZERS.entries, "torch.optim:NAdam"])
def test_settings_become_keys_and_back(name):
    schedule = Cosine(schedule_over="steps")
    made = TrainingSettings(optimizer=name, learning_rate_schedule=schedule)
    again = TrainingSettings.of_keys(made.to_keys())
    assert again.rule == made.rule
    assert again.rate_schedule == schedule


@pytest.mark.parametrize(
    "rule",
    [
        SGD(),
        SGD(momentum=0.9),
        SGD(momentum=0.9, nesterov=True),
        SGD(momentum=0.5, dampening=0.5),
    ],
)
def test_from_where_a_proximal_term_diverges(rule):
    limit = TrainingSettings(optimizer=rule, learning_rate=0.1).diverging_mu

    def distance(mu):
        w = torch.ones(1, dtype=torch.float64)
        state = rule.begin(w)
        for step in range(2000):
            rule.step(w, mu * w, state, step + 1, 0.1)
        return abs(float(w))

    assert distance(0.99 * limit) < 1e-3
    assert distance(1.01 * limit) > 1e3
    assert TrainingSettings(optimizer=rule, clip_norm=1.0).diverging_mu == np.inf
