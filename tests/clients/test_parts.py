"""Training of some layers only, alone and with other clients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedweight.clients import TrainingSettings
from fedweight.clients.objectives import SAM, Part, Plain, Proximal
from fedweight.clients.steps.batched import BatchedTrainer
from fedweight.clients.steps.loop import train
from fedweight.clients.steps.task import Task
from fedweight.core.module import FlatModule
from fedweight.core.rng import part_of, permutation
from fedweight.data import Examples

PART = ["head"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def a_net():
    torch.manual_seed(0)
    return Net().double()


def tasks():
    rng = np.random.default_rng(1)
    made = []
    for k, n in enumerate((9, 6, 4)):
        x = rng.normal(size=(n, 5))
        made.append(Task(Examples(x, rng.integers(0, 3, n)), 2, 10 + k, 20 + k))
    return made


SETTINGS = {
    "sgd": TrainingSettings(batch_size=4),
    "remembers": TrainingSettings(batch_size=4, momentum=0.9, weight_decay=0.1),
    "clips": TrainingSettings(batch_size=4, momentum=0.9, clip_norm=0.3),
    "adamw": TrainingSettings(batch_size=4, optimizer="adamw", weight_decay=0.1),
}
GOALS = {
    "plain": Plain(),
    "proximal": Proximal(0.5),
    "sam": SAM(0.1),
    "sam-proximal": SAM(0.1, Proximal(0.5)),
}


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("traced", [True, False])
def test_layers_that_are_not_trained_keep_their_bits(goal, settings, traced):
    objective, how = Part(GOALS[goal], PART), SETTINGS[settings]
    module = FlatModule(a_net())
    start = module.save()
    trainer = BatchedTrainer(FlatModule(a_net()), objective, how, traced=traced)
    some = tasks()
    together = trainer.train(start, some, learning_rate=0.1)
    body = slice(0, 24)
    for task, one in zip(some, together, strict=True):
        alone = train(module, start, task, objective, how, learning_rate=0.1)
        assert torch.equal(alone.model.parameters[body], start.parameters[body])
        assert torch.equal(one.model.parameters[body], start.parameters[body])
        assert (alone.model.parameters[24:] != start.parameters[24:]).all()
        torch.testing.assert_close(
            one.model.parameters, alone.model.parameters, rtol=1e-9, atol=1e-12
        )


def test_a_part_is_trained_as_pytorch_trains_it_alone():
    [task, *_] = tasks()
    settings = SETTINGS["remembers"]
    module = FlatModule(a_net())
    start = module.save()
    found = train(module, start, task, Part(Plain(), PART), settings, learning_rate=0.1)
    net = a_net()
    net.body.requires_grad_(False)
    optimizer = torch.optim.SGD(
        net.head.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1
    )
    x, y = torch.from_numpy(task.examples.x), torch.from_numpy(task.examples.y)
    for epoch in range(2):
        order = torch.from_numpy(permutation(task.order_key, epoch, len(y)))
        for rows in order.split(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    expected = nn.utils.parameters_to_vector(net.parameters())
    torch.testing.assert_close(found.model.parameters, expected)


def test_parts_of_a_stream_differ_and_the_first_is_the_stream():
    key = np.array([12345], np.uint64)
    keys = {int(part_of(key, part)[0]) for part in range(40)}
    assert len(keys) == 40
    assert part_of(key, 0) == 12345
