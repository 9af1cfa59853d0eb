"""FedETF: the turns after the rounds, and what of the model is a client's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from torch import nn

from fedweight import models, run
from fedweight.clients import TrainingApp, TrainingSettings
from fedweight.clients.personal import FedETF
from fedweight.core.errors import ConfigurationError
from fedweight.core.module import FlatModule
from fedweight.core.rng import Purpose, keys, part_of, permutation
from fedweight.data import ClientData, Examples
from fedweight.messages.arrays import FlatRecord
from fedweight.messages.dispatch import Cohort
from fedweight.simulations import LocalGrid, Plan
from fedweight.simulations.grid import FIRST_NODE

ROUND = 4
SETTINGS = TrainingSettings(batch_size=5, momentum=0.9, weight_decay=0.01)


def net():
    return models.build("mlp", (4,), 3, hidden=6, head="etf", projection=5, seed=1)


def data_of(context):
    rng = np.random.default_rng(int(context.node_config["partition-id"]))
    parts = [
        Examples(rng.normal(size=(n, 4)).astype(np.float32), rng.integers(0, 3, n))
        for n in (9, 6)
    ]
    return ClientData(*parts)


def personalised(plan):
    """Return what three clients keep and report of the phase after the rounds."""
    app = TrainingApp(
        net,
        data_of,
        num_classes=3,
        settings=SETTINGS,
        seed=7,
        personal=FedETF(turns=2, epochs=2),
        mods=[lambda message, context, call: call(message, context)]
        if plan == "messages"
        else None,
    )
    told = {"server-round": ROUND, "after-rounds": True}
    content = RecordDict(
        {"arrays": FlatRecord(FlatModule(net()).save()), "config": ConfigRecord(told)}
    )
    nodes = range(FIRST_NODE, FIRST_NODE + 3)
    grid = LocalGrid(app, 3, plan=Plan() if plan == "messages" else Plan.parse(plan))
    try:
        cohort = Cohort(content, nodes, "evaluate")
        replies = grid.send_and_receive(cohort)
    finally:
        grid.close()
    rows = grid.store.read("personal", np.arange(3)).arrays["parameters"]
    return rows, [dict(reply.content["metrics"]) for reply in replies]


def by_pytorch(client):
    """Do the same turns with modules and optimisers of PyTorch's."""
    model = net().requires_grad_(False)
    head = model.layers[-1]
    data = data_of(type("Context", (), {"node_config": {"partition-id": client}}))
    x, y = (torch.from_numpy(part) for part in (data.train.x, data.train.y))
    streams = keys(7, Purpose.PERSONAL_SHUFFLE, ROUND, [client])
    turn = [([head.etf], 0.1), ([*head.projection.parameters()], 0.05)]
    for part, (parameters, rate) in enumerate(turn * 2):
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.SGD(
            parameters, lr=rate, momentum=0.9, weight_decay=0.01
        )
        for epoch in range(2):
            [key] = part_of(streams, part).tolist()
            order = permutation(key, epoch, len(y))
            for rows in torch.from_numpy(order).split(5):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
        for parameter in parameters:
            parameter.requires_grad_(False)
    outputs = model(torch.from_numpy(data.held_out.x))
    right = outputs.argmax(1) == torch.from_numpy(data.held_out.y)
    own = [p for n, p in head.named_parameters() if n != "scale"]
    return nn.utils.parameters_to_vector(own), right.float().mean().item()


@pytest.mark.parametrize("plan", ["loop", "batched-3", "messages"])
def test_the_turns_are_those_of_pytorch(plan):
    rows, metrics = personalised(plan)
    for client in range(3):
        expected, accuracy = by_pytorch(client)
        torch.testing.assert_close(
            torch.from_numpy(rows[client]), expected, rtol=1e-4, atol=1e-6
        )
        assert metrics[client]["personal-accuracy"] == pytest.approx(accuracy)
        assert metrics[client]["personal-loss"] > 0
        assert "loss" in metrics[client]


FILE = {
    "run.rounds": 2,
    "partition.clients": 5,
    "partition.name": "shards",
    "model.head": "etf",
    "objective.name": "balanced-softmax",
    "objective.counts": "own",
    "personal.name": "fedetf",
    "personal.turns": 1,
    "personal.epochs": 1,
    "training.epochs": 1,
    "strategy.fraction-train": 0.5,
}


@pytest.mark.usefixtures("ready_ray")
@pytest.mark.parametrize(
    "engine", ["local", pytest.param("ray", marks=pytest.mark.ray)]
)
def test_a_run_keeps_the_classifier_and_ends_with_every_client(tmp_path, engine):
    settings = FILE | {
        "engine.name": engine,
        "engine.workers": 2 if engine == "ray" else 0,
    }
    found = run(settings=settings, out=tmp_path / "run", report=False)
    name = "layers.2.etf"
    model = models.build("mlp", (1, 8, 8), 10, head="etf", seed=0)
    assert torch.equal(found.model()[name], model.state_dict()[name])
    # Neither up nor down: what is trained travels, 4 bytes a number.
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sent = found.clients.query("round == 1 and status == 'ok'")
    assert (sent["bytes_up"] == 4 * trained).all()
    own = found.personal
    assert own["client"].tolist() == [0, 1, 2, 3, 4]
    assert (own["status"] == "evaluated").all()
    weights = own["held_out_examples"].astype(float)
    mean = (own["personal_accuracy"] * weights).sum() / weights.sum()
    last = found.rounds["evaluate_personal_accuracy"]
    assert last.isna().tolist() == [True, True, False]
    assert last.iloc[-1] == pytest.approx(mean)
    # Each client has few classes here, to which its own classifier is fitted.
    assert mean > (own["accuracy"] * weights).sum() / weights.sum()


def test_a_model_without_such_a_head_is_refused(tmp_path):
    settings = {**FILE, "model.head": "linear"}
    with pytest.raises(ConfigurationError, match=r"no layer 'etf'.*model.head = 'etf'"):
        run(settings=settings, out=tmp_path / "run", report=False)
    assert not (tmp_path / "run").exists()
