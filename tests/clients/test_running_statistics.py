"""Buffers that a step changes: by BatchNorm, and by what does not say so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedweight.clients import TrainingSettings
from fedweight.clients.noise import LocalTraining
from fedweight.clients.objectives import Plain
from fedweight.clients.steps._torch.recording import in_silence
from fedweight.clients.steps.batched import BatchedTrainer
from fedweight.clients.steps.loop import train
from fedweight.clients.steps.task import Task
from fedweight.core.module import FlatModule
from fedweight.data import Examples

# A layer for inputs of a shape.
NORMS = {
    "table": (nn.BatchNorm1d, (5,)),
    "sequence": (nn.BatchNorm1d, (5, 4)),
    "image": (nn.BatchNorm2d, (5, 3, 2)),
    "volume": (nn.BatchNorm3d, (5, 2, 2, 3)),
}
KINDS = {
    "usual": {},
    "cumulative": {"momentum": None},
    "without statistics": {"track_running_stats": False},
    "without weights": {"affine": False},
}


def stream():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("takes", NORMS)
def test_plain_operations_give_what_pytorchs_own_give(takes, kind):
    of, shape = NORMS[takes]
    ours, theirs = (of(5, **KINDS[kind]) for _ in range(2))
    draws = stream()
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        values = torch.randn(5, generator=draws)
        parameter.data.copy_(values), other.data.copy_(values)
    for step in range(3):
        given = torch.randn(7, *shape, generator=draws) * 3 + 10
        x, other = (given.clone().requires_grad_() for _ in range(2))
        with LocalTraining(torch.tensor(0), step, plain=True) as mode:
            found = ours(x)
        expected = theirs(other)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        slope = torch.randn(given.shape, generator=draws)
        found.backward(slope), expected.backward(slope)
        torch.testing.assert_close(x.grad, other.grad, atol=1e-6, rtol=1e-5)
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    for value, right in pairs:
        torch.testing.assert_close(value, right, atol=1e-6, rtol=1e-6)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, atol=1e-5, rtol=1e-5)
    assert mode.least == (2 if takes == "table" else 1)
    # What is only read is read by PyTorch's own.
    ours.eval(), theirs.eval()
    with LocalTraining(torch.tensor(0), 0, plain=True):
        torch.testing.assert_close(ours(given), theirs(given))


def network(norm):
    def make():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(4, 5), norm(), nn.Linear(5, 3))

    return make


def tasks_of(sizes):
    rng = np.random.default_rng(1)
    return [
        Task(
            Examples(rng.normal(size=(n, 4)).astype(np.float32), rng.integers(0, 3, n)),
            2,
            10 + k,
            20 + k,
        )
        for k, n in enumerate(sizes)
    ]


def both(make, sizes, *, plain=False, traced=True):
    """Train clients one after another, and at once; return all values."""
    settings = TrainingSettings(batch_size=8)
    module, tasks = FlatModule(make()), tasks_of(sizes)
    start = module.save()
    alone = [
        train(module, start, task, Plain(), settings, learning_rate=0.1)
        for task in tasks
    ]
    trainer = BatchedTrainer(FlatModule(make()), Plain(), settings, traced=traced)
    trainer._step.client.plain_norms = plain
    return trainer.train(start, tasks, learning_rate=0.1), alone


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("parameters", "buffers"):
            one, other = (getattr(r.model, name) for r in (ours, theirs))
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
        assert ours.model.integers == theirs.model.integers
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("sizes", [[16, 16, 16], [16, 11, 24]])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "cumulative"])
def test_clients_at_once_train_by_plain_operations_as_alone(kind, sizes, traced):
    make = network(lambda: nn.BatchNorm1d(5, **KINDS[kind]))
    assert_same(*both(make, sizes, plain=True, traced=traced))


def test_one_example_does_not_do_for_plain_operations_either():
    module = FlatModule(network(lambda: nn.BatchNorm1d(5))())
    trainer = BatchedTrainer(module, Plain(), TrainingSettings(batch_size=8))
    trainer._step.client.plain_norms = True
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        trainer.train(module.save(), tasks_of([1, 1]), learning_rate=0.1)


@torch.library.custom_op("fedweight_tests::mean_of", mutates_args=())
def mean_of(x: Tensor, seen: Tensor) -> Tensor:
    """Say to change nothing, and change what was seen, as cuDNN's BatchNorm does."""
    mean = x.mean(0)
    seen.mul_(0.9).add_(mean, alpha=0.1)
    return mean


@mean_of.register_vmap
def _(info, in_dims, x, seen):
    """Batch as PyTorch does BatchNorm: what does not lie together is copied."""
    x, seen = x.movedim(in_dims[0], 1), seen.movedim(in_dims[1], 0)
    mean = mean_of(x.flatten(1), seen.reshape(-1).contiguous())
    return mean.unflatten(0, (info.batch_size, -1)), 0


class Foreign(nn.Module):
    """Keeps the mean of what it has seen, by somebody's own operation."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(5))
        self.register_buffer("constant", torch.ones(5))  # Not in memory alone.

    def forward(self, z):
        return z + self.constant * mean_of(z.detach(), self.seen)


class Updated(Foreign):
    """Keeps statistics by an operation of PyTorch's, whose results nobody uses."""

    def forward(self, z):
        torch.batch_norm_update_stats(z.detach(), self.seen, self.constant, 0.1)
        return z


@pytest.mark.parametrize("kind", [Foreign, Updated])
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_what_changes_in_silence_is_not_lost(kind, caplog):
    found, expected = both(network(kind), [16, 16, 16])
    assert all(result.model.buffers[:5].all() for result in expected)
    assert_same(found, expected)


def test_operations_that_change_in_silence_are_known():
    aten = torch.ops.aten
    running = {"running_mean", "running_var"}
    for name in ("native", "cudnn", "miopen"):
        assert in_silence(getattr(aten, f"{name}_batch_norm").default) == running
        backward = getattr(aten, f"{name}_batch_norm_backward").default
        assert not in_silence(backward)
    # These say it, or change nothing.
    assert not in_silence(aten._native_batch_norm_legit.default)
    assert not in_silence(aten.add_.Tensor)
    assert not in_silence(aten.mm.default)
    assert in_silence(mean_of._opoverload) == {"x", "seen"}
