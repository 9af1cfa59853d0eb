"""Every model and objective on a CPU and a GPU, against each client alone on a CPU."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedweight import models
from fedweight.clients import TrainingSettings
from fedweight.clients.objectives import OBJECTIVES, Dice, Plain
from fedweight.clients.optimizers import Adam
from fedweight.clients.steps.batched import BatchedTrainer
from fedweight.clients.steps.loop import train
from fedweight.clients.task_objectives import for_task
from fedweight.core.module import FlatModule
from fedweight.core.precision import gpu_arithmetic
from fedweight.data.tasks import task_named
from fedweight.models import MODELS

from ..elsewhere import DEVICE, Elsewhere
from . import test_objectives as goals
from .modules import CLASSES
from .test_batched import everything
from .test_eager import assert_same, tasks_of

# A model's examples, of which clients have 11, 4 and 18, and its options.
SHAPES = {
    "char-gru": ((6,), {"hidden": 8, "embedding": 4}),
    "char-transformer": ((6,), {"width": 8, "heads": 2, "depth": 1}),
    "cnn": ((1, 8, 8), {"channels": [2, 3], "hidden": 5}),
    "mlp": ((6,), {"hidden": [7, 5], "head": "cosine"}),
    "resnet18-gn": ((1, 8, 8), {"width": 2}),
    "softmax": ((6,), {}),
    "unet": ((1, 8, 8), {"width": 2}),
    "mlp with adapters": ((6,), {"hidden": [7, 5], "adapters": "lora"}),
    "dropout and statistics": ((1, 8, 8), {}),
}

# Where there ought to be no gradient Adam divides rounding by rounding, but for the
# epsilon.
OPTIMIZERS = {
    "sgd": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "adam": {"optimizer": Adam(epsilon=1e-3), "clip_norm": 0.5},
}

# A device, and how close its results are in its precision.
DEVICES = [
    pytest.param("cpu", torch.float64, 1e-8, id="cpu"),
    pytest.param("cuda", torch.float64, 1e-8, id="cuda-double", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float32, 1e-4, id="cuda", marks=pytest.mark.gpu),
]


def built(name, dtype, device="cpu"):
    shape, options = SHAPES[name]
    if name == "dropout and statistics":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = everything()
    else:
        kind, *_ = name.split()
        module = models.build(kind, shape, CLASSES, seed=1, **options)
    return FlatModule(module.to(dtype), device)


def at_once(make, device, start, tasks, goal, settings, **options):
    """Train on a device; on a GPU twice, by graphs, with the same bits."""
    each = []
    for _ in range(1 if device == "cpu" else 2):
        trainer = BatchedTrainer(
            make(device), goal, settings, compiled=device != "cpu", **options
        )
        with gpu_arithmetic("fp32", device):
            each.append(trainer.train(start, tasks, learning_rate=0.05))
        if device != "cpu":
            memories = trainer._memories.values()
            replayed = [s._replay for home in memories for s in home._steps.values()]
            assert replayed
            assert None not in replayed
    for one, other in zip(each[0], each[-1], strict=True):
        assert torch.equal(one.model.parameters, other.model.parameters)
        assert torch.equal(one.model.buffers, other.model.buffers)
    return each[0]


def test_all_models_are_tried():
    assert {*SHAPES} > {*MODELS.entries}


@pytest.mark.parametrize(("device", "dtype", "tolerance"), DEVICES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_model_trains_as_alone(name, optimizer, device, dtype, tolerance, caplog):
    shape, _ = SHAPES[name]
    masks = name == "unet"
    goal = for_task(Dice(), task_named("segmentation")) if masks else Plain()
    tokens = CLASSES if name.startswith("char-") else 0
    tasks = tasks_of(shape, tokens, shape[1:] if masks else ())
    settings = TrainingSettings(batch_size=8, **OPTIMIZERS[optimizer])
    start = built(name, dtype).save()
    if not tokens:
        kind = np.float32 if dtype == torch.float32 else np.float64
        tasks = [
            replace(t, examples=replace(t.examples, x=t.examples.x.astype(kind)))
            for t in tasks
        ]

    def make(device):
        return built(name, dtype, device)

    with caplog.at_level(logging.WARNING, "fedweight"):
        found = at_once(make, device, start, tasks, goal, settings)
    assert not caplog.records
    module = make("cpu")
    alone = [
        train(module, start, task, goal, settings, learning_rate=0.05) for task in tasks
    ]
    assert_same(found, alone, tolerance)
    if device == "cpu":
        eager = at_once(make, device, start, tasks, goal, settings, traced=False)
        assert_same(eager, found)


def test_all_objectives_are_tried():
    tried = {type(goal) for goal in goals.GOALS.values()}
    inner = {
        type(goal.inner) for goal in goals.GOALS.values() if hasattr(goal, "inner")
    }
    shipped = {OBJECTIVES.resolve(name) for name in OBJECTIVES.entries}
    assert shipped <= tried | inner | {Dice}  # With the U-Net.


@pytest.mark.gpu
@pytest.mark.parametrize("name", goals.GOALS)
def test_every_objective_trains_on_a_gpu_as_alone_on_a_cpu(name, caplog):
    goal = goals.GOALS[name]
    tasks, start = goals.tasks_of(goal, goals.RAGGED), goals.made().save()
    settings = TrainingSettings(batch_size=8, momentum=0.9, weight_decay=0.01)

    def make(device):
        torch.manual_seed(0)
        return FlatModule(goals.Normed().double(), device)

    with caplog.at_level(logging.WARNING, "fedweight"):
        found = at_once(make, "cuda", start, tasks, goal, settings, least=2)
    assert not caplog.records
    module, told = make("cpu"), {"learning_rate": 0.05, "least": 2}
    alone = [train(module, start, task, goal, settings, **told) for task in tasks]
    assert_same(found, alone, 1e-8)


@pytest.mark.parametrize("name", goals.GOALS)
def test_an_objective_computes_where_its_batch_is(name):
    """On a device that is not there, and as a CPU does."""
    goal = goals.GOALS[name]
    start = FlatModule(goals.Normed()).save()
    tasks = [
        replace(t, examples=replace(t.examples, x=t.examples.x.astype(np.float32)))
        for t in goals.tasks_of(goal, [9, 3], epochs=1)
    ]
    settings = TrainingSettings(batch_size=8, momentum=0.9)

    def trained(device):
        module = FlatModule(goals.Normed(), device)
        trainer = BatchedTrainer(module, goal, settings, least=2, traced=False)
        return trainer.train_rows(start, tasks, learning_rate=0.1)

    expected = trained("cpu")
    with Elsewhere():
        found = trained(str(DEVICE))
    assert found.rows.device == DEVICE
    for one, other in zip(found.of_clients, expected.of_clients, strict=True):
        assert torch.equal(one.cpu(), other)
