"""The quick start with models of one's own that not every way of training suits."""

import logging
import sys

import numpy as np
import pytest
import torch

import fedweight
from fedweight.data import DataSet, Examples
from fedweight.studies import choosing

NETS = """
import torch
from torch import nn


def batch_norm(input_shape, num_classes):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, num_classes),
    )


class Centred(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x):
        x = x.flatten(1)
        return self.linear(x - x.mean(0))
"""

NATURAL = {"partition.name": "natural", "data.held-out": 0.0}


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """Run the quick start with a model, for a short time."""
    (tmp_path / "own_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)

    def run(model, dataset=None, **engine):
        natural = {} if dataset is None else NATURAL
        return fedweight.run(
            settings={
                "model.name": f"own_nets:{model}",
                "run.rounds": 2,
                "training.epochs": 2,
                "engine.name": "local",
                **natural,
                **{f"engine.{key}": value for key, value in engine.items()},
            },
            dataset=dataset,
            report=False,
        )

    yield run
    sys.modules.pop("own_nets", None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


@pytest.mark.parametrize("plan", ["loop", "batched-20"])
def test_with_batch_norm_all_clients_take_part_in_every_round(run_of, plan, caplog):
    with caplog.at_level(logging.WARNING, "fedweight"):
        run = run_of("batch_norm", plan=plan)
    assert not caplog.records
    # Four of them would have a last batch of one example.
    sizes = run.clients.query("round == 1")["examples"]
    assert (sizes % 16 == 1).sum() == 4
    for _, clients in run.clients.groupby("round"):
        assert list(clients["status"]) == ["ok"] * 20
    assert run.rounds["test_accuracy"].iloc[-1] > 0.5


@pytest.mark.parametrize("plan", ["loop", "batched-20"])
def test_a_client_with_one_example_is_dropped_where_batch_norm_cannot_train(
    run_of, plan
):
    sizes = [9, 1, 17, 16]
    y = np.arange(sum(sizes)) % 2
    x = np.random.default_rng(0).standard_normal((len(y), 64)).astype(np.float32)
    part = Examples(x, y)
    clients = np.repeat(np.arange(4), sizes)
    dataset = DataSet("own", part, part, 2, natural_clients=clients)
    run = run_of("batch_norm", dataset, plan=plan)
    for _, rows in run.clients.groupby("round"):
        assert list(rows["status"]) == ["ok", "dropped", "ok", "ok"]
        assert rows["reason"].iloc[1] == "the model could not train on its 1 example"
        assert list(rows["weight"] > 0) == [True, False, True, True]


def test_a_model_that_looks_across_the_batch_trains_by_the_loop(
    run_of, caplog, monkeypatch
):
    # As if the run was long, and many at once were fastest.
    monkeypatch.setattr(choosing, "WORTH_MEASURING", 0.0)
    runs = []
    for plan in ("loop", "batched-20", "auto"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fedweight"):
            runs.append(run_of("Centred", plan=plan))
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == (plan != "loop")
        assert all("looks across the batch" in line for line in said)
        assert runs[-1].config["engine"]["plan"] == "loop"
    first, *others = (run.model() for run in runs)
    for other in others:
        for name, values in first.items():
            assert torch.equal(other[name], values)
