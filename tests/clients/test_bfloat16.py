"""Weights in bfloat16 are trained in that, and carried as float32; float64 stays."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fedweight.clients import TrainingApp, TrainingSettings
from fedweight.clients.objectives import ALDR
from fedweight.core.module import FlatModule
from fedweight.core.rng import Purpose, keys, permutation
from fedweight.data import ClientData, Examples
from fedweight.messages.arrays import FlatRecord
from fedweight.simulations import LocalGrid, Plan
from fedweight.strategies import FedAvg


def coarse(dtype=torch.bfloat16):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


def federated(make, rounds=3, plan=None, clients=3, objective=None):
    def data(context):
        rng = np.random.default_rng(int(context.node_config["partition-id"]))
        x = rng.normal(size=(12, 4)).astype(np.float32)
        part = Examples(x, (x[:, 0] > 0).astype(np.int64) + (x[:, 1] > 0))
        return ClientData(part, part)

    settings = TrainingSettings(batch_size=4, learning_rate=0.1)
    app = TrainingApp(make, data, num_classes=3, settings=settings, objective=objective)
    grid = LocalGrid(app, clients, plan=plan)
    strategy = FedAvg(min_train_nodes=1, min_available_nodes=1, fraction_evaluate=0.0)
    whole = FlatModule(make()).save()
    result = strategy.start(grid, FlatRecord(whole.travelling()), num_rounds=rounds)
    return strategy, result.arrays


def test_a_round_of_bfloat16_is_that_of_plain_torch():
    """Each client's steps in bfloat16, the mean in float32.

    A product's last bit depends on where in memory its factors lie.
    """
    _, arrays = federated(coarse, rounds=1)
    assert {a.dtype for a in arrays.values()} == {"float32"}
    rows = []
    for client in range(3):
        module = coarse()
        rng = np.random.default_rng(client)
        x = torch.from_numpy(rng.normal(size=(12, 4)).astype(np.float32))
        y = (x[:, 0] > 0).long() + (x[:, 1] > 0)
        step = torch.optim.SGD(module.parameters(), lr=0.1)
        order_key = int(keys(0, Purpose.SHUFFLE, 1, [client])[0])
        order = torch.from_numpy(permutation(order_key, 0, len(y)))
        for part in order.split(4):
            outputs = module(x[part].bfloat16()).float()
            step.zero_grad()
            nn.functional.cross_entropy(outputs, y[part]).backward()
            step.step()
        rows.append({n: t.float() for n, t in module.state_dict().items()})
    for name, array in arrays.items():
        expected = torch.stack([row[name] for row in rows]).mean(0)
        np.testing.assert_allclose(
            array.numpy(), expected.numpy(), rtol=2**-7, atol=1e-3
        )


def test_what_a_client_trains_is_bfloat16_to_the_bit():
    _, arrays = federated(coarse, rounds=2, clients=1)
    for array in arrays.values():
        values = torch.from_numpy(array.numpy())
        assert torch.equal(values.bfloat16().float(), values)


def test_bfloat16_learns_and_is_trained_one_after_another(caplog):
    strategy, arrays = federated(coarse, rounds=15, plan=Plan(3))
    losses = [r.metrics["train-loss"] for r in strategy.history]
    assert losses[-1] < 0.8 * losses[0]
    assert "half precision" in caplog.text
    module = coarse()
    module.load_state_dict({n: torch.from_numpy(a.numpy()) for n, a in arrays.items()})
    assert module[0].weight.dtype == torch.bfloat16


def test_a_frozen_part_of_bfloat16_keeps_its_bits():
    def make():
        model = coarse()
        model[0].requires_grad_(False)
        return model

    strategy, arrays = federated(make)
    assert list(arrays) == ["2.weight", "2.bias"]
    assert {c.status for r in strategy.history for c in r.clients} == {"ok"}


def test_float64_is_trained_aggregated_and_carried_in_that():
    def make():
        return coarse(torch.float64)

    _, arrays = federated(make)
    assert {a.dtype for a in arrays.values()} == {"float64"}
    _, at_once = federated(make, plan=Plan(3))
    for name, array in arrays.items():
        np.testing.assert_allclose(at_once[name].numpy(), array.numpy(), rtol=1e-12)


def test_what_is_kept_of_each_example_is_kept_in_bfloat16_too():
    strategy, _ = federated(coarse, rounds=2, objective=ALDR())
    assert [entry.status for entry in strategy.history[-1].clients] == ["ok"] * 3
