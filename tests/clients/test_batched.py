"""Clients that train at once, against each of them trained alone."""

import pickle
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedweight import models
from fedweight.clients import Batch, Objective, TrainingSettings
from fedweight.clients.objectives import Plain, Proximal
from fedweight.clients.steps import batched, schedule
from fedweight.clients.steps import step as step_module
from fedweight.clients.steps._torch import rewriting, torchscript
from fedweight.clients.steps.batched import BatchedTrainer
from fedweight.clients.steps.feeding import shared_array
from fedweight.clients.steps.loop import train
from fedweight.clients.steps.task import Task
from fedweight.core.errors import ClientError
from fedweight.core.module import FlatModule
from fedweight.data import Examples

OPTIMIZERS = {
    "sgd": {"learning_rate": 0.05},
    "momentum": {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
    "adam": {"optimizer": "adam", "learning_rate": 0.01, "weight_decay": 1e-3},
}


@pytest.fixture(params=["small", "large"])
def weights(request, monkeypatch):
    """Change the weights as small ones are, and as large ones."""
    least = {"small": 1 << 30, "large": 1}[request.param]
    monkeypatch.setattr(rewriting, "WORTH_FUSING", least)
    return request.param


class Smoothed(Objective):
    """A user's own: label smoothing, and a pull of the same length for everybody."""

    def batch_loss(self, outputs, batch, facts):
        values = F.cross_entropy(
            outputs, batch.y, reduction="none", label_smoothing=0.1
        )
        return batch.mean(values)

    def penalty_gradient(self, parameters, facts):
        away = parameters - facts.received
        return 0.1 * away / (1e-3 + away.norm())


OBJECTIVES = {"plain": Plain(), "proximal": Proximal(0.5), "own": Smoothed()}


def everything():
    """Every kind of layer that knows of other examples or draws noise."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout2d(0.3),
        nn.Flatten(),
        nn.Linear(3 * 36, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.4),
        nn.Linear(8, 10),
    )


def made(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FlatModule(make())


def shipped(name):
    shape = (6,) if name == "char-gru" else (1, 8, 8)
    options = {
        "char-gru": {"hidden": 8},
        "mlp": {"hidden": (16, 8)},
        "cnn": {"channels": (2, 3), "hidden": 8},
        "resnet18-gn": {"width": 2, "groups": 1},
    }
    return lambda: models.build(name, shape, 10, seed=0, **options.get(name, {}))


def part(n, seed, tokens=False, dtype=np.float32):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, n)
    if tokens:
        return Examples(rng.integers(0, 10, (n, 6)), labels)
    return Examples(rng.standard_normal((n, 1, 8, 8)).astype(dtype), labels)


def tasks_of(sizes, epochs=(2, 3, 1), **options):
    return [
        Task(part(n, k, **options), epochs[k % len(epochs)], 10 + k, 20 + k)
        for k, n in enumerate(sizes)
    ]


def both_ways(make, tasks, settings, objective=None, **options):
    """Train each client alone, and all at once."""
    objective = objective or Plain()
    module = made(make)
    start = options.pop("start", module.save())
    rate = settings.learning_rate
    alone = [
        train(module, start, task, objective, settings, learning_rate=rate)
        for task in tasks
    ]
    trainer = BatchedTrainer(made(make), objective, settings)
    return alone, trainer.train(start, tasks, learning_rate=rate)


def assert_same(alone, at_once, atol=1e-5):
    assert len(alone) == len(at_once)
    for a, b in zip(alone, at_once, strict=True):
        close = {"atol": atol, "rtol": 0}
        torch.testing.assert_close(b.model.parameters, a.model.parameters, **close)
        torch.testing.assert_close(b.model.buffers, a.model.buffers, **close)
        assert set(a.model.integers) == set(b.model.integers)
        for name, values in a.model.integers.items():
            np.testing.assert_array_equal(b.model.integers[name], values)
            assert b.model.integers[name].dtype == values.dtype
        assert b.loss == pytest.approx(a.loss, abs=1e-5)
        assert b.accuracy == pytest.approx(a.accuracy, abs=1e-6)
        assert b.num_steps == a.num_steps


def settings_of(optimizer="sgd", batch_size=8, **options):
    return TrainingSettings(
        batch_size=batch_size, **{**OPTIMIZERS[optimizer], **options}
    )


# Clients of other sizes than a batch's multiple, one smaller than a batch; BatchNorm
# would refuse a batch of one example.
SIZES = [19, 11, 24, 3]


@pytest.mark.parametrize(
    ("optimizer", "goal"),
    [("sgd", "own"), ("momentum", "plain"), ("adam", "proximal")],
)
def test_every_objective_and_optimiser_with_noise_and_statistics(optimizer, goal):
    tasks = tasks_of(SIZES, dtype=np.float64)
    alone, at_once = both_ways(
        lambda: everything().double(), tasks, settings_of(optimizer), OBJECTIVES[goal]
    )
    assert_same(alone, at_once, atol=1e-9)
    assert at_once[0].model.parameters.dtype == torch.float64
    counted = [int(r.model.integers["1.num_batches_tracked"]) for r in at_once]
    assert counted == [r.num_steps for r in at_once] == [6, 6, 3, 2]


@pytest.mark.parametrize("sizes", [[16, 8], SIZES])
def test_noise_and_statistics_in_single_precision(sizes):
    assert_same(*both_ways(everything, tasks_of(sizes), settings_of()))


@pytest.mark.parametrize("batch_size", [8, 4])
def test_statistics_where_every_step_of_everyone_is_full(batch_size):
    tasks = tasks_of([16, 16, 16], epochs=(2,))
    alone, at_once = both_ways(everything, tasks, settings_of(batch_size=batch_size))
    assert_same(alone, at_once)
    start = made(everything).save().buffers
    assert not any(torch.equal(r.model.buffers, start) for r in at_once)


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize("goal", OBJECTIVES)
def test_every_objective_moves_a_plain_net_as_one_by_one(goal):
    tasks, goal = tasks_of(SIZES), OBJECTIVES[goal]
    assert_same(*both_ways(shipped("mlp"), tasks, settings_of(), goal))


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_frozen_parameters_are_the_received_ones(optimizer):
    def make():
        module = shipped("mlp")()
        module.layers[0].requires_grad_(False)
        return module

    own = made(make).save()
    # The server's model is another than the one that the client built.
    start = replace(own, frozen=own.frozen + 0.05)
    options = tasks_of(SIZES), settings_of(optimizer), Proximal(0.1)
    results = both_ways(make, *options, start=start)
    assert_same(*results)
    others = both_ways(make, *options, start=own)
    for result, other in zip(results[1], others[1], strict=True):
        assert torch.equal(result.model.frozen, start.frozen)
        assert not torch.equal(result.model.parameters, start.parameters)
        assert not torch.equal(result.model.parameters, other.model.parameters)


class CallsDropout(nn.Module):
    """Draws noise without a layer that says so."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        return self.linear(F.dropout(x.flatten(1), 0.5, self.training))


def test_a_model_that_calls_dropout_itself_draws_the_clients_own_noise():
    alone, at_once = both_ways(CallsDropout, tasks_of([8, 8, 8]), settings_of())
    assert_same(alone, at_once)
    same = part(8, 0)
    tasks = [Task(same, 2, 1, noise) for noise in (1, 1, 2)]
    _, results = both_ways(CallsDropout, tasks, settings_of())
    a, b, c = (result.model.parameters for result in results)
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)


class SharedGradient(nn.Module):
    """Two parameters whose gradients PyTorch computes as one tensor."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.b, self.c = (nn.Parameter(torch.randn(10)) for _ in "bc")

    def forward(self, x):
        return self.linear(x.flatten(1)) + (self.b + self.c)


@pytest.mark.parametrize(
    ("optimizer", "goal"),
    [("sgd", "plain"), ("momentum", "proximal"), ("adam", "plain")],
)
def test_parameters_with_one_gradient_do_not_mix(optimizer, goal):
    settings = settings_of(optimizer, weight_decay=0.1)
    assert_same(*both_ways(SharedGradient, tasks_of(SIZES), settings, OBJECTIVES[goal]))


class TwoFactors(nn.Module):
    """A weight that is a product of weights: each one's gradient has the other."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(64, 5) / 8)
        self.b = nn.Parameter(torch.randn(5, 10) / 8)

    def forward(self, x):
        return x.flatten(1) @ (self.a @ self.b)


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize("goal", OBJECTIVES)
def test_a_gradient_made_of_weights_is_that_of_the_old_weights(goal):
    tasks = tasks_of([8, 8, 8])
    settings = settings_of(learning_rate=0.5)
    assert_same(*both_ways(TwoFactors, tasks, settings, OBJECTIVES[goal]))


def operations_of(step):
    return [node.kind() for node in step.inlined_graph.nodes()]


def test_a_dense_step_writes_no_gradient_of_large_weights(weights):
    module = shipped("mlp")
    trainer = BatchedTrainer(made(module), Plain(), settings_of())
    trainer.train(made(module).save(), tasks_of([8, 8]), learning_rate=0.1)
    (step,) = trainer._steps.values()
    operations = operations_of(step.run)
    layers = [m for m in module().modules() if isinstance(m, nn.Linear)]
    fused = len(layers) if weights == "large" else 0
    assert operations.count("aten::baddbmm_") == fused
    assert operations.count("aten::sub_") == 2 * len(layers) - fused  # biases, too


class Weighted(Objective):
    """Has a constant of its own: it is no parameter, and no buffer."""

    def __init__(self):
        self.weight = torch.linspace(0.5, 1.5, 10)

    def batch_loss(self, outputs, batch, facts):
        return batch.mean(
            F.cross_entropy(outputs, batch.y, weight=self.weight, reduction="none")
        )


class Ignores(Objective):
    """Leaves labels out, as PyTorch's cross-entropy does, but by its own rule."""

    def relabelled(self, y):
        return torch.where(y < 3, -100, y)

    def batch_loss(self, outputs, batch, facts):
        labels = self.relabelled(batch.y)
        return batch.mean(F.cross_entropy(outputs, labels, reduction="none"))


class InPlace(Ignores):
    """Relabels what it was given."""

    def relabelled(self, y):
        return y.masked_fill_(y < 3, -100)


class Counts(Objective):
    """Compares labels for a purpose of its own, in dtypes of its own."""

    def batch_loss(self, outputs, batch, facts):
        known = batch.y != -100
        share = known.sum(dtype=torch.float32).clone()
        share.add_(0.5)
        weights = torch.where(known, batch.y, outputs[:, 0].detach())
        losses = F.cross_entropy(outputs, batch.y, reduction="none")
        return batch.mean(losses * (weights.float() + 1) / share)


def test_other_comparisons_of_labels_keep_their_dtypes():
    assert_same(*both_ways(shipped("mlp"), tasks_of([16, 16]), settings_of(), Counts()))


class HalvesTheMask(Objective):
    """Changes what it was given."""

    def batch_loss(self, outputs, batch, facts):
        losses = F.cross_entropy(outputs, batch.y, reduction="none")
        if batch.mask is None:
            return losses.mean()
        weights = batch.mask
        weights *= torch.where(batch.y < 5, 0.5, 1.0)
        return (losses * weights).sum() / len(losses)


def test_an_objective_that_changes_the_mask_concerns_no_other_step():
    tasks, make = tasks_of(SIZES), shipped("mlp")
    start = made(make).save()
    trainer = BatchedTrainer(made(make), HalvesTheMask(), settings_of())
    first, again = (trainer.train(start, tasks, learning_rate=0.1) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.model.parameters, other.model.parameters)
    assert_same(*both_ways(make, tasks, settings_of()))


@pytest.mark.parametrize("sizes", [[16, 16], SIZES])
@pytest.mark.parametrize(
    ("objective", "searches"),
    [
        (Plain(), False),
        (Weighted(), False),
        (Smoothed(), False),
        (Ignores(), True),
        (InPlace(), True),
    ],
)
def test_labels_are_searched_for_what_to_ignore_only_where_there_is_any(
    objective, searches, sizes
):
    tasks, make = tasks_of(sizes), shipped("mlp")
    trainer = BatchedTrainer(made(make), objective, settings_of())
    trainer.train(made(make).save(), tasks, learning_rate=0.1)
    for step in trainer._steps.values():
        assert ("aten::ne" in operations_of(step.run)) == searches
    assert_same(*both_ways(make, tasks, settings_of(), objective))


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("mlp", "sgd"),
        ("mlp", "adam"),
        ("softmax", "momentum"),
        ("char-gru", "sgd"),
    ],
)
def test_a_step_runs_without_python_and_gives_the_same_bits(
    name, optimizer, monkeypatch
):
    make = shipped(name)
    tasks = tasks_of(SIZES, tokens=name == "char-gru")
    settings = settings_of(optimizer)
    results = []
    for without_python in (
        torchscript.without_python,
        lambda traced, _: traced.forward,
    ):
        monkeypatch.setattr(step_module, "without_python", without_python)
        trainer = BatchedTrainer(made(make), Proximal(0.1), settings)
        start = made(make).save()
        results.append(trainer.train(start, tasks, learning_rate=0.1))
        steps = trainer._steps.values()
        scripted = [isinstance(s.run, torch.jit.ScriptModule) for s in steps]
        assert scripted == [len(results) == 1] * len(steps)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.model.parameters, other.model.parameters)
        assert torch.equal(one.model.buffers, other.model.buffers)
        assert (one.loss, one.accuracy) == (other.loss, other.accuracy)


def tokens_through(*layers, padding_idx=0):
    """Embed tokens; take the last place's output of recurrent layers."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 5, padding_idx=padding_idx)
            self.layers = nn.ModuleList(make() for make in layers)
            self.head = nn.Linear(5, 10)

        def forward(self, x):
            h = self.embed(x)
            for layer in self.layers:
                h, _ = layer(h)
            return self.head(h[:, -1])

    return Net


@pytest.mark.parametrize("sizes", [[16, 16, 16], SIZES])
@pytest.mark.parametrize(
    "make",
    [
        tokens_through(),
        tokens_through(padding_idx=3),
        tokens_through(lambda: nn.LSTM(5, 5, batch_first=True)),
        tokens_through(lambda: nn.GRU(5, 5, batch_first=True)),
    ],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_padding_and_pytorchs_recurrent_layers(make, optimizer, sizes):
    tasks = tasks_of(sizes, tokens=True)
    assert_same(*both_ways(make, tasks, settings_of(optimizer)))


class Hooked(nn.Module):
    """Scales a gradient on its way, and asks whether there will be one."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, x):
        h = self.first(x.flatten(1)).tanh()
        h.register_hook(lambda gradient: 2 * gradient)
        return self.last(h * (3 if h.requires_grad else 1))


class Constants(Objective):
    """Changes what it writes down anew in every step, and picks by place."""

    def batch_loss(self, outputs, batch, facts):
        weight = torch.tensor([1.0] * 10)
        weight *= 2
        values = -outputs.log_softmax(1)[torch.arange(len(batch.y)), batch.y]
        return batch.mean(values * weight[batch.y])


class Penalised(Objective):
    """Differentiates within the loss."""

    def batch_loss(self, outputs, batch, facts):
        values = F.cross_entropy(outputs, batch.y, reduction="none")
        (slope,) = torch.autograd.grad(values.sum(), outputs, create_graph=True)
        return batch.mean(values + 0.1 * slope.square().sum(1))


@pytest.mark.parametrize("sizes", [[16, 16], SIZES])
@pytest.mark.parametrize(
    ("make", "objective"),
    [
        (Hooked, Plain()),
        (shipped("mlp"), Constants()),
        (shipped("mlp"), Penalised()),
    ],
)
def test_autograd_inside_is_as_one_by_one(make, objective, sizes):
    assert_same(*both_ways(make, tasks_of(sizes), settings_of(), objective))


class Table(nn.Module):
    """Has statistics that move, a table that stays, and a fixed mask."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.linspace(0.5, 1.5, 64))
        self.register_buffer("chosen", torch.arange(64) % 3 > 0, persistent=False)
        self.norm = nn.BatchNorm1d(42)
        self.linear = nn.Linear(42, 10)

    def forward(self, x):
        return self.linear(self.norm((x.flatten(1) * self.table)[:, self.chosen]))


@pytest.mark.parametrize("sizes", [[16, 16], SIZES])
def test_buffers_that_stay_are_not_copied_at_every_step(sizes, caplog):
    tasks = tasks_of(sizes, dtype=np.float64)
    with caplog.at_level("DEBUG", "fedweight"):
        assert_same(*both_ways(lambda: Table().double(), tasks, settings_of()))
    assert not caplog.records
    trainer = BatchedTrainer(made(Table), Plain(), settings_of())
    trainer.train(made(Table).save(), tasks_of(sizes), learning_rate=0.1)
    for step in trainer._steps.values():
        assert operations_of(step.run).count("aten::copy_") == 2  # mean and variance


class SavesElsewhere(nn.Module):
    """Lets autograd keep what it needs through hooks, or compute it again."""

    def __init__(self, again=False):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 16), nn.Linear(16, 10)])
        self.again = again

    def forward(self, x):
        first, last = self.layers
        if self.again:
            h = checkpoint(lambda x: first(x).relu(), x.flatten(1), use_reentrant=False)
        else:
            with torch.autograd.graph.save_on_cpu():
                h = first(x.flatten(1)).relu()
        return last(h)


def test_hooks_on_what_autograd_saves():
    assert_same(*both_ways(SavesElsewhere, tasks_of(SIZES), settings_of()))
    # What PyTorch cannot do at once it refuses, with one error or another by its
    # version; the app then trains one by one.
    with pytest.raises(RuntimeError):
        both_ways(lambda: SavesElsewhere(again=True), tasks_of(SIZES), settings_of())


def test_constants_of_an_objective():
    assert_same(*both_ways(shipped("mlp"), tasks_of(SIZES), settings_of(), Weighted()))


class ChangesItsInput(nn.Module):
    """Normalises the batch where it lies."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        return self.linear(x.sub_(0.5).div_(0.5).flatten(1))


def test_tracing_leaves_the_first_batch_alone():
    tasks = tasks_of([8, 8, 8], epochs=(1,))
    trainer = BatchedTrainer(made(ChangesItsInput), Plain(), settings_of())
    start = made(ChangesItsInput).save()
    first, again = (trainer.train(start, tasks, learning_rate=0.1) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.model.parameters, other.model.parameters)


def test_what_cannot_leave_python_stays(monkeypatch, caplog):
    def refuse(*_, **__):
        raise RuntimeError("not today")

    monkeypatch.setattr(torch.jit, "trace", refuse)
    caplog.set_level("DEBUG", logger="fedweight")
    assert_same(*both_ways(shipped("mlp"), tasks_of(SIZES), settings_of()))
    assert "runs in Python: not today" in caplog.text


def test_who_is_done_first_does_not_change_any_more():
    settings = settings_of("momentum")
    tasks = tasks_of([8, 40], epochs=(1, 6))
    (short, _), (at_once, _) = both_ways(shipped("mlp"), tasks, settings)
    assert_same([short], [at_once])
    assert short.num_steps == 1


def test_a_client_with_bad_values_spoils_nobody_else_now_or_later():
    bad, good = part(5, 0), part(5, 1)
    bad.x[:] = np.nan
    settings = settings_of()
    trainer = BatchedTrainer(made(shipped("mlp")), Plain(), settings)
    module = made(shipped("mlp"))
    start = module.save()

    def parameters(*parts):
        tasks = [Task(p, 1, 3) for p in parts]
        results = trainer.train(start, tasks, learning_rate=0.1)
        return [r.model.parameters for r in results]

    spoilt, sound = parameters(bad, good)
    assert spoilt.isnan().any()
    assert sound.isfinite().all()
    # The buffers that held the bad values are used again.
    assert torch.equal(parameters(good, good)[0], sound)


class Divides(nn.Module):
    """Is not defined for an example of zeros, which nobody has."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = x.flatten(1)
        return self.linear(x / x.norm(dim=1, keepdim=True))


def test_padding_is_no_example_that_nobody_has():
    assert_same(*both_ways(Divides, tasks_of(SIZES), settings_of()))


@pytest.mark.parametrize("sizes", [[9, 16], [9, 17]])
def test_a_batch_of_one_is_refused_as_alone(sizes):
    def make():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))

    trainer = BatchedTrainer(made(make), Plain(), settings_of())
    for _ in range(2):  # also once the step is traced
        with pytest.raises(ValueError, match="more than 1 value"):
            trainer.train(made(make).save(), tasks_of(sizes), learning_rate=0.1)
    # A convolution's statistics are over pixels, too: there it is no batch of one.
    convolution = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
    assert_same(*both_ways(lambda: convolution, tasks_of(sizes), settings_of()))


def test_one_trainer_serves_chunks_of_any_shape():
    settings = settings_of()
    trainer = BatchedTrainer(made(shipped("cnn")), Plain(), settings)
    start = made(shipped("cnn")).save()
    for sizes in ([8, 8], [24, 24], [3, 24], [9]):
        tasks = tasks_of(sizes)
        results = trainer.train(start, tasks, learning_rate=0.05)
        assert_same(both_ways(shipped("cnn"), tasks, settings)[0], results)


def test_training_leaves_the_received_model_alone():
    start = made(everything).save()
    copies = start.parameters.clone(), start.buffers.clone()
    trainer = BatchedTrainer(made(everything), Plain(), settings_of())
    trainer.train(start, tasks_of(SIZES), learning_rate=0.1)
    assert torch.equal(start.parameters, copies[0])
    assert torch.equal(start.buffers, copies[1])
    assert int(start.integers["1.num_batches_tracked"]) == 0


def test_training_stops_at_the_next_step_once_cancelled():
    asked = []

    def cancelled():
        asked.append(True)
        return len(asked) == 3

    trainer = BatchedTrainer(made(shipped("mlp")), Plain(), settings_of())
    with pytest.raises(ClientError, match="cancelled"):
        trainer.train(
            made(shipped("mlp")).save(),
            tasks_of([40, 40]),
            learning_rate=0.1,
            cancelled=cancelled,
        )
    assert len(asked) == 3


# Several steps in one call.


def together(tasks):
    """The same tasks, with examples that are slices of common arrays."""
    x = np.concatenate([task.examples.x for task in tasks])
    y = np.concatenate([task.examples.y for task in tasks])
    ends = np.cumsum([len(task.examples) for task in tasks]).tolist()
    return [
        replace(task, examples=Examples(x[a:b], y[a:b]))
        for task, a, b in zip(tasks, [0, *ends], ends, strict=False)
    ]


def noisy():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10), nn.Dropout(0.4)
    )


@pytest.mark.parametrize("sizes", [[40, 40], [13, 70, 5]])
@pytest.mark.parametrize(
    ("make", "optimizer", "possible"),
    [
        (shipped("mlp"), "sgd", True),
        (noisy, "sgd", True),
        (shipped("mlp"), "momentum", False),  # The optimiser is Python.
        (shipped("cnn"), "sgd", False),  # So is a convolution's gradient.
    ],
)
def test_several_steps_in_one_call_give_the_same_bits(
    make, optimizer, possible, sizes, monkeypatch
):
    tasks, settings = together(tasks_of(sizes)), settings_of(optimizer)
    start = made(make).save()
    results = []
    for several in (batched.SEVERAL, 10**6):
        monkeypatch.setattr(batched, "SEVERAL", several)
        trainer = BatchedTrainer(made(make), Proximal(0.1), settings)
        for _ in range(2):  # The first traces.
            rate = settings.learning_rate
            results.append(trainer.train(start, tasks, learning_rate=rate))
        used = any(trainer._several.values())
        assert used == (possible and several < 10**6)
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert torch.equal(one.model.parameters, other.model.parameters)
            assert torch.equal(one.model.buffers, other.model.buffers)
            assert one.model.integers == other.model.integers
            assert (one.loss, one.accuracy) == (other.loss, other.accuracy)
    assert_same(both_ways(make, tasks, settings, Proximal(0.1))[0], results[0], 1e-4)


def test_steps_that_cannot_be_one_call_are_called_one_by_one(monkeypatch):
    def refuse(module, *arguments, **named):
        if isinstance(module, torchscript._Several):
            raise TypeError("no")
        return trace(module, *arguments, **named)

    trace = torch.jit.trace
    monkeypatch.setattr(torch.jit, "trace", refuse)
    tasks = together(tasks_of([40, 40]))
    assert_same(*both_ways(shipped("mlp"), tasks, settings_of()))


def test_training_stops_within_a_call_of_several_steps():
    asked = []

    def cancelled():
        asked.append(True)
        return len(asked) == 3

    trainer = BatchedTrainer(made(shipped("mlp")), Plain(), settings_of())
    start, tasks = made(shipped("mlp")).save(), together(tasks_of([80, 80]))
    trainer.train(start, tasks, learning_rate=0.1)
    with pytest.raises(ClientError, match="cancelled"):
        trainer.train(start, tasks, learning_rate=0.1, cancelled=cancelled)
    assert len(asked) == 3


def test_a_batch_of_one_is_refused_though_the_first_step_is_one_of_several():
    def make():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))

    trainer = BatchedTrainer(made(make), Plain(), settings_of())
    start = made(make).save()
    for _ in range(2):
        trainer.train(start, together(tasks_of([34, 40])), learning_rate=0.1)
    assert any(trainer._several.values())
    with pytest.raises(ValueError, match="more than 1 value"):
        trainer.train(start, together(tasks_of([33, 40])), learning_rate=0.1)


# The last bits.


@pytest.mark.parametrize(
    ("name", "optimizer"), [("mlp", "momentum"), ("cnn", "momentum"), ("mlp", "sgd")]
)
def test_the_same_chunk_gives_the_same_bits_in_any_thread(name, optimizer):
    trainer = BatchedTrainer(made(shipped(name)), Plain(), settings_of(optimizer))
    start = made(shipped(name)).save()
    shapes = (SIZES, [16, 16, 16], [40, 3], [70, 70, 20])
    chunks = [together(tasks_of(sizes)) for sizes in shapes] * 3

    def bits(tasks):
        results = trainer.train(start, tasks, learning_rate=0.05)
        return torch.stack([r.model.parameters for r in results])

    found = [None] * len(chunks)

    def work(places):
        for k in places:
            found[k] = bits(chunks[k])

    # Threads meet before anything is traced, and in other orders.
    threads = [
        threading.Thread(target=work, args=[range(k, len(chunks), 3)]) for k in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert any(trainer._several.values()) == (optimizer == "sgd")
    for tasks, parameters in zip(chunks, found, strict=True):
        assert torch.equal(parameters, bits(tasks))


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_who_else_is_in_the_chunk_changes_no_bit_of_a_shipped_model(name):
    # True of a chunk of two or more; one alone may differ in the last place.
    trainer = BatchedTrainer(made(shipped(name)), Plain(), settings_of("momentum"))
    start = made(shipped(name)).save()
    tasks = tasks_of([16, 16, 19, 11, 24, 3])

    def bits(some):
        results = trainer.train(start, some, learning_rate=0.05)
        return [result.model.parameters for result in results]

    together = bits(tasks)
    for apart in (bits(tasks[:2]) + bits(tasks[2:]), bits(tasks[::-1])[::-1]):
        for a, b in zip(together, apart, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("travelled", [False, True])
def test_slices_know_where_they_come_from(travelled):
    whole = np.arange(2 * 5 * 3 * 4, dtype=np.float32).reshape(10, 3, 4)
    if travelled:
        buffers = []
        data = pickle.dumps(whole, protocol=5, buffer_callback=buffers.append)
        whole = pickle.loads(data, buffers=[b.raw().tobytes() for b in buffers])
    for array, place in ((whole[4:6], 4), (whole[4:6].reshape(2, 1, 12), 4)):
        other = whole[:3].reshape(3, *array.shape[1:])
        base, first = shared_array([array, other])
        assert first == [place, 0]
        assert np.shares_memory(base, whole)
        assert np.array_equal(base[place : place + 2], array)
    strange = (
        whole[::2],
        whole[4:6].copy(),
        whole[2:4, 1:],
        whole.T[:2],
        whole[4:6].view(np.int32),
        whole[4:6].reshape(2, 12),
        whole.reshape(-1)[6:30].reshape(2, 3, 4),
    )
    for array in strange:
        assert shared_array([whole[4:6], array]) is None
    assert shared_array([np.zeros((3, 0)), np.zeros((3, 0))]) is None


# Clients that have ended, and padding, are left out whatever their values are.


def test_a_client_that_has_ended_and_diverges_keeps_its_loss():
    settings = settings_of("momentum", learning_rate=1e25)
    tasks = tasks_of([8, 40], epochs=(1, 6))
    (short, _), (at_once, _) = both_ways(shipped("mlp"), tasks, settings)
    assert np.isfinite(short.loss)
    assert at_once.loss == pytest.approx(short.loss)
    torch.testing.assert_close(at_once.model.parameters, short.model.parameters)


def test_a_mean_leaves_out_what_is_not_finite_in_padding():
    values = torch.tensor([1.0, 3.0, np.inf, np.nan], requires_grad=True)
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0])
    batch = Batch(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64), mask)
    mean = batch.mean(values)
    mean.backward()
    assert mean.item() == 2.0
    assert values.grad.tolist() == [0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("sizes", [[17, 9, 24, 2], [17, 17], [9]])
@pytest.mark.parametrize("common", [True, False])
def test_a_lone_last_example_joins_the_batch_before(sizes, common):
    def make():
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10), nn.Dropout(0.2)
        )

    tasks = tasks_of(sizes)
    tasks = together(tasks) if common else tasks
    module = made(make)
    start, options = module.save(), {"learning_rate": 0.05}
    settings = settings_of()
    alone = [
        train(module, start, task, Plain(), settings, least=2, **options)
        for task in tasks
    ]
    trainer = BatchedTrainer(made(make), Plain(), settings, least=2)
    assert_same(alone, trainer.train(start, tasks, **options))
    assert alone[0].num_steps == 2 * (sizes[0] // 8)


@pytest.mark.parametrize("size", [schedule.WIDEST + 1, 10**9, 2**31 - 1])
def test_a_batch_of_all_examples_takes_no_memory_for_others(size):
    tasks = tasks_of([5, 9, 2])
    plan = schedule.Schedule.of(tasks, size, 1)
    assert plan.width == 16
    assert plan.steps.tolist() == [2, 3, 1]
    settings = TrainingSettings(batch_size=size, learning_rate=0.1)
    alone, at_once = both_ways(shipped("mlp"), tasks, settings)
    for one, other in zip(alone, at_once, strict=True):
        parameters = one.model.parameters, other.model.parameters
        torch.testing.assert_close(*parameters, rtol=0, atol=1e-6)
        assert one.num_steps == other.num_steps


def test_usual_batches_are_as_wide_as_ever():
    """Padding is in the last bits of a result, so it stays."""
    assert schedule.Schedule.of(tasks_of([5, 9]), schedule.WIDEST, 1).width == 1 << 14
    long = tasks_of([5, 100_000])
    assert schedule.Schedule.of(long, 50_000, 1).width == 50_000
