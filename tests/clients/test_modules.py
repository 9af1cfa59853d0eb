"""Modules of every sort: one after another, at once, and by plain PyTorch."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedweight.clients import TrainingSettings
from fedweight.clients.noise import LocalTraining
from fedweight.clients.objectives import Plain
from fedweight.clients.steps.batched import BatchedTrainer
from fedweight.clients.steps.loop import train
from fedweight.clients.steps.task import Task
from fedweight.core.batches import batches
from fedweight.core.errors import ConfigurationError
from fedweight.core.layout import Layout
from fedweight.core.module import FlatModule
from fedweight.core.rng import permutation
from fedweight.data import ClientData, Examples
from fedweight.messages.arrays import FlatRecord
from fedweight.messages.dispatch import Cohort

from .modules import CLASSES, FEATURES, REFUSED, SORTS, TOKENS, Sort

# Batches of 8, of which the last one has 3, 3, 1 and 8 examples.
SIZES = [19, 3, 17, 8]

OPTIMIZERS = {
    "sgd": ({}, torch.optim.SGD, {}),
    "momentum": (
        {"momentum": 0.9, "weight_decay": 0.01},
        torch.optim.SGD,
        {"momentum": 0.9, "weight_decay": 0.01},
    ),
    "adam": (
        {"optimizer": "adam", "weight_decay": 0.01},
        torch.optim.Adam,
        {"weight_decay": 0.01},
    ),
}

# What Flower's records cannot carry is refused where the model is built.
BEFORE_ANY_CLIENT = ("half", "complex")

AT_ONCE = [name for name, sort in SORTS.items() if sort.at_once == ""]


pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop",
    "ignore:None of the inputs have requires_grad",
)


def examples_of(sort: Sort, n: int, seed: int, dtype=np.float32) -> Examples:
    rng = np.random.default_rng(seed)
    if sort.takes == "tokens":
        x = rng.integers(0, TOKENS, (n, 5))
    else:
        shape = {"table": (n, FEATURES), "image": (n, 1, 6, 6)}[sort.takes]
        x = rng.standard_normal(shape).astype(np.float64 if sort.double else dtype)
    return Examples(x, rng.integers(0, CLASSES, n))


def made(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def tasks_of(sort, **options):
    return [
        Task(examples_of(sort, n, k, **options), 2, 10 + k, 20 + k)
        for k, n in enumerate(SIZES)
    ]


def in_one_vector(module):
    """Let weights lie as ours do: a product's last bits depend on the place."""
    layout = Layout.of_module(module)
    vector = torch.empty(layout.num_parameters, dtype=layout.dtype)
    parameters = dict(module.named_parameters())
    for e in layout.parameters:
        values = vector[e.start : e.stop].view(e.shape)
        parameters[e.name].data = values.copy_(parameters[e.name].detach())
    return module


def by_torch(sort, task, optimizer, **options):
    """The training as anybody would write it in PyTorch, on the same batches."""
    module = in_one_vector(made(sort.make)).train()
    step = optimizer(module.parameters(), lr=0.1, **options)
    x, y = torch.from_numpy(task.examples.x), torch.from_numpy(task.examples.y)
    steps = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.noise_key)
        np.random.seed(task.noise_key)  # noqa: NPY002
        random.seed(task.noise_key)
        for epoch in range(task.epochs):
            order = torch.from_numpy(permutation(task.order_key, epoch, len(y)))
            for part in batches(len(y), 8, sort.least):
                rows = order[part]
                with LocalTraining(task.noise_key, steps):
                    outputs = module(x[rows])
                step.zero_grad()
                F.cross_entropy(outputs, y[rows]).backward()
                step.step()
                steps += 1
    return module.state_dict()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", SORTS)
def test_one_after_another_is_torch_optim_to_the_bit(name, optimizer):
    if name == "sparse embedding" and optimizer != "sgd":
        pytest.skip("torch.optim refuses sparse gradients")
    sort, (ours, kind, theirs) = SORTS[name], OPTIMIZERS[optimizer]
    settings = TrainingSettings(batch_size=8, **ours)
    module = FlatModule(made(sort.make))
    start = module.save()
    before = torch.get_rng_state()
    for task in tasks_of(sort):  # Each after the others, in the same module.
        found = train(
            module,
            start,
            task,
            Plain(),
            settings,
            learning_rate=0.1,
            least=sort.least,
            draws=sort.draws,
        ).model.state_dict()
        for tensor, values in by_torch(sort, task, kind, **theirs).items():
            if name == "sparse embedding":  # Added up in another order.
                torch.testing.assert_close(found[tensor], values, atol=1e-6, rtol=0)
            else:
                assert torch.equal(found[tensor], values), tensor
    assert torch.equal(torch.get_rng_state(), before)


def answers(kit, app, batched, sort=None, model=None):
    start = FlatRecord(FlatModule(made(model or sort.make)).save())
    message = kit.message(start)
    nodes = [1000 + k for k in range(len(SIZES))]
    cohort = Cohort(message.content, nodes, "train")

    def context_of(node):
        context = kit.context(node - 1000)
        context.node_config["num-partitions"] = len(SIZES)
        return context

    return app.answer(cohort, nodes, context_of, batched=batched).replies


def app_of(kit, sort, **options):
    def data(context):
        client = int(context.node_config["partition-id"])
        part = examples_of(sort, SIZES[client], client)
        return ClientData(part, part)

    settings = TrainingSettings(2, 8, momentum=0.5, weight_decay=0.01)
    options = {"num_classes": CLASSES, "settings": settings, **options}
    return kit.app(lambda: made(sort.make), data, **options)


@pytest.mark.parametrize("name", SORTS)
def test_at_once_is_one_after_another_or_is_not_done(kit, name, caplog):
    sort = SORTS[name]
    app = app_of(kit, sort)
    at_once, alone = (answers(kit, app, batched, sort) for batched in (True, False))
    answers(kit, app, True, sort)
    warnings = [record.getMessage() for record in caplog.records]
    if sort.at_once is not None:
        assert len(warnings) == bool(sort.at_once)
    for said in warnings:
        kind = type(made(sort.make)).__name__
        assert said.startswith(f"model {kind} trains one client after another: ")
        assert (sort.at_once or "") in said
    for found, expected in zip(at_once, alone, strict=True):
        assert (found.error, expected.error) == (None, None)
        assert found.metrics["num-steps"] == expected.metrics["num-steps"] > 0
        for metric in ("train-loss", "train-accuracy"):
            assert found.metrics[metric] == pytest.approx(expected.metrics[metric])
        exact = {"atol": 0, "rtol": 0}
        for (tensor, a), (_, b) in zip(
            found.model.state_dict().items(),
            expected.model.state_dict().items(),
            strict=True,
        ):
            size = b.abs().max().item()
            close = exact if warnings else {"atol": 1e-5 * size, "rtol": 0}
            torch.testing.assert_close(a, b, **close, msg=tensor)


@pytest.mark.parametrize("name", AT_ONCE)
def test_at_once_with_adam_in_double_precision(name):
    # In single precision Adam divides rounding by rounding, where a gradient ought to
    # be 0: of a bias before a normalisation, or of attention's keys. Weight decay would
    # blow up what is left of it in double precision.
    sort = SORTS[name]
    settings = TrainingSettings(batch_size=8, optimizer="adam")
    module = FlatModule(made(sort.make).double())
    start, tasks = module.save(), tasks_of(sort, dtype=np.float64)
    options = {"learning_rate": 0.05}
    trainer = BatchedTrainer(
        FlatModule(made(sort.make).double()), Plain(), settings, least=sort.least
    )
    at_once = trainer.train(start, tasks, **options)
    for task, found in zip(tasks, at_once, strict=True):
        expected = train(
            module, start, task, Plain(), settings, least=sort.least, **options
        )
        torch.testing.assert_close(
            found.model.parameters, expected.model.parameters, atol=1e-6, rtol=1e-5
        )
        torch.testing.assert_close(
            found.model.buffers, expected.model.buffers, atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_by_name(kit, name, batched):
    make, reason = REFUSED[name]
    sort = Sort(make)
    if name in BEFORE_ANY_CLIENT:
        with pytest.raises(ConfigurationError, match=re.escape(reason)):
            FlatModule(made(make))
        return
    for reply in answers(kit, app_of(kit, sort), batched, sort):
        assert reason in reply.error.splitlines()[0]
