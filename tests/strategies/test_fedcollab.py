"""FedCollab: coalitions before training, and a model for each."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedweight import Run, resume, run
from fedweight.clients import TrainingApp
from fedweight.clients.queries import ClientQuery
from fedweight.core.errors import ClientError, ConfigurationError
from fedweight.data import ClientData, DataSet, Examples
from fedweight.simulations import LocalGrid
from fedweight.strategies.fedcollab import (
    FedCollab,
    coalitions,
    discriminate,
    discriminator_logits,
    error_bound,
    first_discriminator,
)

from .conftest import golden_values

CLIENTS, CLASSES = 6, 2
QUICK: dict[str, Any] = {
    "discriminator_rounds": 60,
    "discriminator_rate": 0.5,
    "evaluate_every": 10,
    "hidden": 16,
    "trade_off": 5.0,
}


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return golden_values("fedcollab")


def test_the_bound_of_some_coalitions(table: dict[str, Any]) -> None:
    for case in table["bound"]:
        found = error_bound(
            case["coalitions"],
            np.array(table["distances"]),
            table["sizes"],
            table["trade_off"],
        )
        assert found == pytest.approx(case["mean"], abs=1e-8)


def test_alike_clients_form_coalitions(table: dict[str, Any]) -> None:
    for seed in range(5):
        found = coalitions(
            np.array(table["distances"]), table["sizes"], table["trade_off"], seed
        )
        assert found == [0, 0, 1, 1]


def test_what_size_is_worth_decides(table: dict[str, Any]) -> None:
    distances, sizes = np.array(table["distances"]), table["sizes"]
    assert coalitions(distances, sizes, 0.0) == [0, 1, 2, 3]
    assert coalitions(distances, sizes, 1e6) == [0, 0, 0, 0]
    assert coalitions(np.zeros((4, 4)), sizes, 1.0) == [0, 0, 0, 0]


@given(st.integers(1, 6), st.integers(0, 10**6), st.floats(0, 100))
@settings(deadline=None, max_examples=40)
def test_nobody_gains_by_moving_alone(clients: int, seed: int, trade: float) -> None:
    stream = np.random.default_rng(seed)
    distances = stream.uniform(size=(clients, clients))
    distances = np.triu(distances, 1) + np.triu(distances, 1).T
    sizes = stream.integers(1, 100, clients).tolist()
    found = coalitions(distances, sizes, trade, seed)
    best = error_bound(found, distances, sizes, trade)
    for client in range(clients):
        for other in range(clients):
            moved = [*found]
            moved[client] = other
            assert error_bound(moved, distances, sizes, trade) >= best - 1e-12


def test_the_logits_are_those_of_a_network_with_one_hidden_layer() -> None:
    vector = torch.from_numpy(first_discriminator(3, 4, seed=1))
    first, last = nn.Linear(3, 4), nn.Linear(4, 1)
    with torch.no_grad():
        w1, b1, w2, b2 = vector.split([12, 4, 4, 1])
        first.weight.copy_(w1.view(3, 4).T)
        first.bias.copy_(b1)
        last.weight.copy_(w2[None])
        last.bias.copy_(b2)
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        expected = last(torch.relu(first(x)))[:, 0]
        found = discriminator_logits(vector[None], x[None], 4)[0]
    torch.testing.assert_close(found, expected)


def asked(told: dict[str, Any], arrays: Any, x: Any, y: Any = None) -> ClientQuery:
    y = np.zeros(len(x), np.int64) if y is None else y
    data = ClientData(Examples(x, y), Examples(x, y))
    return ClientQuery(0, ConfigRecord(told), arrays, data, CLASSES, 0)


def test_a_step_is_plain_sgd_on_binary_cross_entropy() -> None:
    x = np.random.default_rng(0).normal(size=(1, 3)).astype(np.float32)
    start = first_discriminator(3, 4, seed=1)
    told = {
        "divergence": "inputs",
        "step": 1,
        "hidden": 4,
        "examples": 2,
        "learning-rate": 0.1,
        "measures": True,
    }
    arrays = {
        "models": np.stack([start, start]),
        "labels": np.array([0.0, 1.0]),
        "sizes": np.array([1, 1]),
    }
    answer = discriminate(asked(told, arrays, x))
    for k, label in enumerate((0.0, 1.0)):
        w = torch.from_numpy(start.copy()).requires_grad_()
        logit = discriminator_logits(w[None], torch.from_numpy(x)[None], 4)
        loss = nn.functional.binary_cross_entropy_with_logits(
            logit, torch.full_like(logit, label)
        )
        loss.backward()
        expected = (w - 0.1 * w.grad).detach().numpy()
        np.testing.assert_allclose(answer.arrays["models"][k], expected, atol=1e-6)
        right = float((logit.item() >= 0) == (label > 0))
        assert answer.metrics["accuracy"][k] == right


def test_tokens_are_refused() -> None:
    x = np.zeros((4, 3), np.int64)
    with pytest.raises(ClientError, match="take numbers"):
        discriminate(asked({"divergence": "inputs"}, {}, x))


def two_worlds(swapped: bool) -> DataSet:
    """Half of the clients see other inputs, or call the same inputs otherwise."""
    stream = np.random.default_rng(3)
    n = 60 * CLIENTS
    x = stream.normal(size=(n, 4)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64)
    client = np.repeat(np.arange(CLIENTS), 60)
    other = client % 2 == 1
    if swapped:
        y[other] = 1 - y[other]
    else:
        x[other, 3] += 6
    train = Examples(x, y)
    test = Examples(x[:20], y[:20])
    return DataSet("two worlds", train, test, CLASSES, natural_clients=client)


@pytest.mark.parametrize(
    ("swapped", "divergence", "expected"),
    [
        (False, "inputs", [0, 1, 0, 1, 0, 1]),
        (True, "joint", [0, 1, 0, 1, 0, 1]),
        (True, "inputs", [0, 0, 0, 0, 0, 0]),
    ],
)
def test_clients_of_one_world_are_found(
    swapped: bool, divergence: str, expected: list[int]
) -> None:
    data = two_worlds(swapped)

    def own(context: Any) -> ClientData:
        [rows] = np.nonzero(data.natural_clients == context.node_config["partition-id"])
        return ClientData(data.train.take(rows[:40]), data.train.take(rows[40:]))

    app = TrainingApp(lambda: nn.Linear(4, CLASSES), own, num_classes=CLASSES)
    strategy = FedCollab(divergence=divergence, **QUICK)
    grid = LocalGrid(app, CLIENTS)
    model = nn.Linear(4, CLASSES)
    strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=2)
    found = strategy.state["method"]["coalitions"]
    assert [found[k] for k in range(CLIENTS)] == expected
    distances = strategy.state["method"]["distances"]
    assert distances.shape == (CLIENTS, CLIENTS)
    assert (distances >= 0).all()
    assert (distances <= 1).all()
    if max(expected):
        assert distances[0, 2] < 0.4 < distances[0, 1]
        assert len(strategy.models) == 2


SETTINGS: dict[str, Any] = {
    "strategy.name": "fedcollab",
    **{f"strategy.{name.replace('_', '-')}": value for name, value in QUICK.items()},
    "strategy.divergence": "joint",
    "partition.name": "natural",
    "partition.clients": CLIENTS,
    "model.name": "softmax",
    "run.rounds": 4,
    "run.checkpoint-rounds": 1,
    "training.epochs": 2,
    "data.proxy": 0.0,
}


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name the data so that a resumed run finds them, too."""
    monkeypatch.setitem(sys.modules, "two_worlds", ModuleType("two_worlds"))
    sys.modules["two_worlds"].data = lambda: two_worlds(True)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("fedcollab") / "run"
    return run(settings=SETTINGS, dataset=two_worlds(True), out=out, report=False)


def test_a_coalition_serves_its_clients(finished: Run) -> None:
    accuracy = finished.by_number("accuracy").loc[4]
    assert accuracy.min() > 0.8  # One model for all would be right half of the time.
    last = finished.clients.query("round == 4 and status == 'ok'")
    by_coalition = last.groupby(last["client"] % 2)["weight"].sum()
    assert by_coalition.tolist() == pytest.approx([1, 1])


def test_all_models_are_kept(finished: Run) -> None:
    one, other = finished.models()
    mean = finished.model()
    assert one.keys() == other.keys() == mean.keys()
    for name in mean:
        assert not torch.equal(one[name], other[name])
        torch.testing.assert_close(mean[name], (one[name] + other[name]) / 2)


@pytest.mark.usefixtures("ready_ray")
@pytest.mark.parametrize(
    ("engine", "plan"),
    [
        ("local", "batched-2"),
        pytest.param("ray", "loop", marks=pytest.mark.ray),
        pytest.param("ray", "batched-3", marks=pytest.mark.ray),
    ],
)
def test_the_same_coalitions_on_any_engine(
    finished: Run, tmp_path: Path, engine: str, plan: str
) -> None:
    settings = {**SETTINGS, "engine.name": engine, "engine.plan": plan}
    if engine == "ray":
        settings["engine.workers"] = 2
    other = run(
        settings=settings, dataset=two_worlds(True), out=tmp_path / "run", report=False
    )
    weights = ["round", "client", "weight"]
    assert other.clients[weights].equals(finished.clients[weights])
    for one, same in zip(finished.models(), other.models(), strict=True):
        for name in one:
            torch.testing.assert_close(same[name], one[name], atol=1e-5, rtol=1e-4)


class Stopped(Exception):
    pass


@pytest.mark.usefixtures("own_module")
def test_goes_on_without_asking_again(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(progress: Any) -> None:
        if progress.round == 3:
            raise Stopped

    settings = {**SETTINGS, "data.name": "two_worlds:data"}
    with pytest.raises(Stopped):
        run(settings=settings, out=tmp_path / "run", report=False, progress=stop)

    def never(self: Any, population: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(FedCollab, "_distances", never)
    other = resume(tmp_path / "run", report=False)
    for one, same in zip(finished.models(), other.models(), strict=True):
        assert all(torch.equal(one[name], same[name]) for name in one)
    assert other.clients.equals(finished.clients)


def test_a_wrapper_is_refused() -> None:
    data = two_worlds(True)
    part = ClientData(data.train, data.train)
    app = TrainingApp(
        lambda: nn.Linear(4, CLASSES), lambda context: part, num_classes=CLASSES
    )
    inner = FedCollab(**QUICK)
    inner.restore(
        {
            **inner.state,
            "prepared": True,
            "method": {"coalitions": {1: 1}, "distances": None},
        }
    )
    wrapper = DifferentialPrivacyServerSideFixedClipping(inner, 0.1, 1.0, 2)
    arrays = ArrayRecord(nn.Linear(4, CLASSES).state_dict())
    with pytest.raises(ConfigurationError, match="sees only the mean"):
        wrapper.start(LocalGrid(app, 2), arrays, num_rounds=1)


def test_who_never_answers_is_alone(caplog: pytest.LogCaptureFixture) -> None:
    data = two_worlds(False)

    def own(context: Any) -> ClientData:
        if context.node_config["partition-id"] == 2:
            raise OSError("no disk")
        rows = data.natural_clients == 0
        part = Examples(data.train.x[rows], data.train.y[rows])
        return ClientData(part, part)

    app = TrainingApp(lambda: nn.Linear(4, CLASSES), own, num_classes=CLASSES)
    strategy = FedCollab(**QUICK)
    arrays = ArrayRecord(nn.Linear(4, CLASSES).state_dict())
    strategy.start(LocalGrid(app, 3), arrays, num_rounds=1)
    assert strategy.state["method"]["coalitions"] == {0: 0, 1: 0}
    why = "client 2 failed: query 'discriminate': query.ask: OSError: no disk"
    assert f"before the first round: {why}" in caplog.text
    assert [record.number for record in strategy.history] == [0, 1]


def test_nobody_answers() -> None:
    def own(context: Any) -> ClientData:
        raise OSError("no disk")

    app = TrainingApp(lambda: nn.Linear(4, CLASSES), own, num_classes=CLASSES)
    arrays = ArrayRecord(nn.Linear(4, CLASSES).state_dict())
    with pytest.raises(ConfigurationError, match="no client answered"):
        FedCollab(**QUICK).start(LocalGrid(app, 3), arrays, num_rounds=1)
