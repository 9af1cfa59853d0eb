"""Steps that are not traced: by PyTorch's public functions, with the same results."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedweight import run
from fedweight.clients import TrainingSettings
from fedweight.clients.objectives import Plain
from fedweight.clients.steps import batched as batched_steps
from fedweight.clients.steps import step as steps
from fedweight.clients.steps._torch import recording, torchscript
from fedweight.clients.steps.batched import BatchedTrainer
from fedweight.clients.steps.loop import train
from fedweight.clients.steps.task import Task
from fedweight.core.module import FlatModule
from fedweight.data import Examples

from . import test_objectives as goals
from .modules import CLASSES, FEATURES, SORTS, TOKENS

# Batches of 8, of which the last ones have 3, 4 and 2 examples.
SIZES = [11, 4, 18]


def tasks_of(shape, tokens=0, of_each=()):
    rng = np.random.default_rng(4)
    tasks = []
    for k, n in enumerate(SIZES):
        x = rng.integers(0, tokens, (n, *shape)) if tokens else None
        x = rng.normal(size=(n, *shape)) if x is None else x
        y = rng.integers(0, CLASSES, (n, *of_each))
        tasks.append(Task(Examples(x, y), 2, k, k + 7))
    return tasks


def both(make, tasks, settings, objective=None, least=1):
    """Train as it is traced, and as it is not."""
    results = []
    for traced in (True, False):
        trainer = BatchedTrainer(
            make(),
            objective or Plain(),
            settings,
            least=least,
            compiled=False,
            traced=traced,
        )
        start = make().save()
        results.append(trainer.train(start, tasks, learning_rate=0.05))
    return results


def assert_same(found, expected, tolerance=1e-9):
    for one, other in zip(found, expected, strict=True):
        moved = [
            (result.model.parameters, result.model.buffers) for result in (one, other)
        ]
        for mine, theirs in zip(*moved, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance)
        for name, values in one.model.integers.items():
            np.testing.assert_array_equal(values, other.model.integers[name])
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
        assert one.accuracy == other.accuracy
        for part in ("carry", "kept"):
            mine, theirs = getattr(one, part), getattr(other, part)
            assert mine.keys() == theirs.keys()
            for name, values in mine.items():
                np.testing.assert_allclose(values, theirs[name], rtol=0, atol=tolerance)


AT_ONCE = [name for name, sort in SORTS.items() if sort.at_once == ""]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", AT_ONCE)
def test_modules_of_every_sort_train_alike(name):
    sort = SORTS[name]

    def make():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return FlatModule(sort.make().double())

    shape = {"table": (FEATURES,), "image": (1, 6, 6), "tokens": (5,)}[sort.takes]
    tasks = tasks_of(shape, TOKENS if sort.takes == "tokens" else 0)
    settings = TrainingSettings(batch_size=8, momentum=0.5, weight_decay=0.01)
    assert_same(*both(make, tasks, settings, least=sort.least))


@pytest.mark.parametrize("name", goals.GOALS)
def test_every_objective_trains_alike(name):
    goal = goals.GOALS[name]
    tasks = goals.tasks_of(goal, goals.RAGGED)
    settings = TrainingSettings(batch_size=8, momentum=0.9, weight_decay=0.01)
    assert_same(*both(goals.made, tasks, settings, goal, least=2))


def breaks(*_, **__):
    raise RuntimeError("this is PyTorch's own")


def test_nothing_of_pytorchs_own_is_used(monkeypatch):
    tasks = goals.tasks_of(Plain(), [8, 8, 6])
    settings = TrainingSettings(batch_size=4)

    def found(traced):
        trainer = BatchedTrainer(goals.made(), Plain(), settings, traced=traced)
        return trainer.train(goals.made().save(), tasks, learning_rate=0.05)

    expected = found(True)
    for where, name in (
        (steps, "grad"),
        (steps, "Recorder"),
        (steps, "drop_unused"),
        (steps, "drop_idle"),
        (steps, "fuse_descent"),
        (steps, "without_python"),
        (recording, "trace"),
        (torchscript, "_scripted"),
        (batched_steps, "plain_execution"),
        (batched_steps, "several"),
        (batched_steps, "has_few_operations"),
        (torch.jit, "trace"),
        (torch.jit, "optimized_execution"),
    ):
        monkeypatch.setattr(where, name, breaks)
    with pytest.raises(RuntimeError, match="PyTorch's own"):
        found(True)
    assert_same(found(False), expected)


class Attends(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(6, CLASSES)

    def forward(self, x):
        z = x[:, None, :, None]
        return self.linear(F.scaled_dot_product_attention(z, z, z)[:, 0, :, 0])


def attends():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FlatModule(Attends())


def test_threads_that_attend_at_once_have_the_bits_of_one():
    tasks, settings = tasks_of((6,)), TrainingSettings(batch_size=4)
    tasks = [
        Task(Examples(t.examples.x.astype(np.float32), t.examples.y), 4, k, k)
        for k, t in enumerate(tasks)
    ]
    trainer = BatchedTrainer(attends(), Plain(), settings, traced=False)
    start = attends().save()

    def one(_):
        results = trainer.train(start, tasks, learning_rate=0.05)
        return torch.stack([result.model.parameters for result in results])

    expected = one(0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(one, range(12)):
            assert torch.equal(found, expected)
    for k, task in enumerate(tasks):
        alone = train(attends(), start, task, Plain(), settings, learning_rate=0.05)
        torch.testing.assert_close(
            expected[k], alone.model.parameters, atol=1e-6, rtol=0
        )
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_run_says_it_in_its_file(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "fedweight")
    settings = {
        "run.rounds": 2,
        "partition.clients": 6,
        "training.epochs": 1,
        "model.hidden": [8],
        "engine.name": "local",
        "engine.plan": "batched-3",
    }
    losses = []
    for trace in (True, False):
        out = tmp_path / str(trace)
        made = run(settings={**settings, "engine.trace": trace}, out=out, report=False)
        losses.append(made.rounds["test_loss"].tolist())
        assert f"trace = {str(trace).lower()}" in (out / "config.toml").read_text()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert not caplog.records
