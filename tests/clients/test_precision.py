"""Clients that compute in bfloat16, alone and at once, and on a GPU in TF32 or not."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedweight.clients import TrainingSettings
from fedweight.clients.evaluation import (
    CLASSIFIED,
    outputs_of,
    sums_of_each,
    sums_of_own,
)
from fedweight.clients.modules import Modules
from fedweight.clients.objectives import SAM, Plain
from fedweight.clients.steps.batched import BatchedTrainer
from fedweight.clients.steps.loop import train
from fedweight.clients.steps.task import Task
from fedweight.core.errors import ConfigurationError
from fedweight.core.module import FlatModule
from fedweight.core.threads import as_in_a_new_thread
from fedweight.data import Examples


def dense():
    return nn.Sequential(nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 4))


def normed():
    return nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)),
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(48, 4),
    )


class Recurrent(nn.Module):
    """Multiplies with the same weights several times."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(12, 6), nn.Linear(6, 4)

    def forward(self, x):
        z = x.new_zeros(len(x), 6)
        for part in x.split(6, 1):
            z = torch.tanh(self.layer(torch.cat([part, z], 1)))
        return self.last(z)


MODELS = {
    "dense": dense,
    "convolution and batch norm": normed,
    "recurrent": Recurrent,
}


def built(model, precision="bf16", device="cpu"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FlatModule(MODELS.get(model, model)(), device, precision)


def tasks_of(*sizes):
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(4, 36))
    tasks = []
    for k, n in enumerate(sizes):
        y = rng.integers(0, 4, n)
        x = (centres[y] + rng.normal(size=(n, 36))).astype(np.float32)
        tasks.append(Task(Examples(x, y), 2, 10 + k, 20 + k))
    return tasks


SETTINGS = TrainingSettings(batch_size=8)


def alone(module, start, task, objective=None):
    goal = objective or Plain()
    return train(module, start, task, goal, SETTINGS, learning_rate=0.1)


def test_a_step_is_what_autocast_makes_of_it():
    (task,) = tasks_of(8)
    module = built("dense")
    start = module.save()
    found = alone(module, start, Task(task.examples, 1, 0, 0))
    by_hand = built("dense", "fp32").module
    x, y = map(torch.from_numpy, (task.examples.x, task.examples.y))
    rows = torch.from_numpy(np.random.default_rng(0).permutation(8))  # of no account
    with torch.autocast("cpu", torch.bfloat16):
        outputs = by_hand(x[rows])
    assert outputs.dtype == torch.bfloat16
    F.cross_entropy(outputs.float(), y[rows]).backward()
    values = [p.detach() - 0.1 * p.grad for p in by_hand.parameters()]
    expected = torch.cat([v.flatten() for v in values])
    assert found.model.parameters.dtype == torch.float32
    torch.testing.assert_close(found.model.parameters, expected, atol=2e-4, rtol=0)
    coarse = (
        found.model.parameters
        - alone(
            built("dense", "fp32"), start, Task(task.examples, 1, 0, 0)
        ).model.parameters
    )
    assert coarse.abs().max() > 1e-5


def test_rounded_weights_are_not_those_of_an_earlier_step():
    (task,) = tasks_of(24)
    module = built("dense")
    start = module.save()
    expected = alone(module, start, task).model.parameters
    with as_in_a_new_thread():  # As threads do, with an autocast that does nothing.
        found = alone(module, start, task).model.parameters
    assert torch.equal(found, expected)


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("objective", [Plain(), SAM(0.05)])
def test_at_once_clients_compute_in_bfloat16_as_alone(model, objective, traced):
    tasks = tasks_of(16, 11, 24)
    module = built(model)
    start = module.save()
    expected = [alone(module, start, task, objective) for task in tasks]
    trainer = BatchedTrainer(built(model), objective, SETTINGS, traced=traced)
    found = trainer.train(start, tasks, learning_rate=0.1)
    exact = BatchedTrainer(built(model, "fp32"), objective, SETTINGS, traced=traced)
    fine = exact.train(start, tasks, learning_rate=0.1)
    for one, other, third in zip(found, expected, fine, strict=True):
        moved = (other.model.parameters - start.parameters).abs().max()
        apart = (one.model.parameters - other.model.parameters).abs().max()
        assert apart < 0.03 * moved
        assert one.loss == pytest.approx(other.loss, rel=0.02)
        assert one.model.parameters.dtype == torch.float32
        # Not ignored: what float32 gives is another result.
        assert not torch.equal(one.model.parameters, third.model.parameters)
        torch.testing.assert_close(
            one.model.buffers, other.model.buffers, atol=0.01, rtol=0.01
        )


def test_evaluation_computes_in_bfloat16():
    parts = [task.examples for task in tasks_of(9, 5)]
    module = built("dense")
    model = module.save()
    whole = torch.cat([torch.from_numpy(p.x) for p in parts])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = built("dense", "fp32").module(whole).float()
    y = torch.cat([torch.from_numpy(p.y) for p in parts])
    losses = F.cross_entropy(logits, y, reduction="none").split([9, 5])
    sums = sums_of_each(module, model, parts)
    own = sums_of_own(module, [model, model], parts)
    for k, expected in enumerate(losses):
        for some in (sums, own):
            found = float(CLASSIFIED.result(some)["loss"][k])
            assert found == pytest.approx(float(expected.mean()), rel=2e-3)
    outputs = outputs_of(module, parts[0])
    assert outputs.dtype == torch.float32
    assert torch.equal(outputs, logits[:9])


def test_weights_in_double_precision_are_refused():
    with pytest.raises(ConfigurationError, match="weights are float64"):
        built(lambda: nn.Linear(36, 4).double())


class ByValue(nn.Linear):
    """Goes by values, but only where these are rounded."""

    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x):
        z = super().forward(x)
        return -z if z.dtype == torch.bfloat16 and z.sum() > 0 else z


def test_what_cannot_be_batched_in_bfloat16_is_told(kit, caplog):
    with caplog.at_level(logging.WARNING, "fedweight"):
        assert kit.app(ByValue).trains_batched(kit.context())
        assert not kit.app(ByValue, precision="bf16").trains_batched(kit.context())
        assert kit.app(precision="bf16").trains_batched(kit.context())
    (record,) = caplog.records
    said = record.getMessage()
    assert "one client after another: with precision 'bf16' its step cannot be" in said


def test_an_app_takes_only_what_there_is(kit):
    with pytest.raises(ConfigurationError, match="'fp32', 'tf32', 'bf16', got 'fp16'"):
        kit.app(precision="fp16")


def test_clients_on_a_gpu_do_not_round_unless_told_to(kit):
    before = torch.backends.cudnn.conv.fp32_precision
    for wanted, found in (("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")):
        modules = Modules(kit.linear, "cuda", wanted)
        modules._idle.put(FlatModule(kit.linear()))  # As if it were there.
        with modules.lend():
            assert torch.backends.cudnn.conv.fp32_precision == found
            assert torch.backends.cuda.matmul.fp32_precision == found
    assert torch.backends.cudnn.conv.fp32_precision == before
