"""Whole rounds with an app on a device: those of a CPU, and what crosses in one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn

from fedweight.clients import TrainingApp, TrainingSettings
from fedweight.clients.trial import Trials
from fedweight.data import ClientData, Examples
from fedweight.simulations import Plan
from fedweight.simulations.local import LocalGrid
from fedweight.strategies import strategy_class

from ..elsewhere import DEVICE, Elsewhere


def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)
        )


def data(context):
    client = int(context.node_config["partition-id"])
    stream = np.random.default_rng(client)

    def part(n):
        x = stream.normal(size=(n, 4)).astype(np.float32)
        return Examples(x, stream.integers(0, 3, n))

    return ClientData(part(8 + 8 * (client % 2)), part(5))


class Counting(LocalGrid):
    """Notes how often something had crossed when each cohort was asked."""

    def send_and_receive(self, messages, *, timeout=None):
        self.counted = [*getattr(self, "counted", ()), Counter(self.mode.seen)]
        return super().send_and_receive(messages, timeout=timeout)


def run(name, device, clients, mode, **options):
    """Return two rounds' model and weights, and what crossed in the second of them."""
    settings = TrainingSettings(batch_size=8, learning_rate=0.05)
    how = {"settings": settings, "device": device, "trace": False}
    app = TrainingApp(model, data, num_classes=3, **how)
    strategy = strategy_class(name)(**options)
    grid = Counting(app, clients, plan=Plan(100))
    grid.mode = mode
    result = strategy.start(grid, ArrayRecord(model().state_dict()), num_rounds=2)
    weights = [one.weight for one in strategy.history[-1].clients]
    _, _, began, _ = grid.counted  # Training and evaluation, twice.
    return result.arrays, weights, mode.seen - began


@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("fedavg", {}, 8),  # The models are added up.
        ("fedavg", {"accumulate": "float64"}, 8),
        ("ida", {}, 9),
        ("fedce", {}, 12),  # Clients take the model along.
        ("qfedavg", {}, 10),
    ],
)
def test_as_often_as_the_cpu_is_needed(name, options, most, monkeypatch):
    monkeypatch.setattr(Trials, "batched", lambda *_: "")
    crossed = []
    for clients in (5, 20):
        arrays, weights, _ = run(name, "cpu", clients, Elsewhere(), **options)
        with Elsewhere() as mode:
            found, others, seen = run(name, str(DEVICE), clients, mode, **options)
        crossed.append(seen)
        np.testing.assert_allclose(others, weights, rtol=1e-5)
        for key, values in arrays.items():
            near = {"rtol": 1e-4, "atol": 1e-6}
            np.testing.assert_allclose(found[key].numpy(), values.numpy(), **near)
    assert crossed[0] == crossed[1]
    assert crossed[0]["down"] + crossed[0]["read"] <= most
