"""The server's loop: the bits of ``Strategy.start``, from any round on."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import strategy as flower
from torch import nn

from fedweight.clients import TrainingApp, TrainingSettings
from fedweight.core.module import FlatModule
from fedweight.core.state import pack, unpack
from fedweight.data import ClientData, Examples
from fedweight.messages import _flower, keys
from fedweight.messages.arrays import FlatRecord
from fedweight.server.loop import ServerState, federate
from fedweight.simulations import LocalGrid
from fedweight.strategies import IDA, FedAvg, FedCE, FedProx
from fedweight.strategies.server_optimizers import ServerAdam

CLIENTS = 8
HALF = {"fraction_train": 0.5}
NOISE = 0.1, 1.0, 4  # noise multiplier, clipping norm, clients of a round
STRATEGIES: dict[str, Any] = {
    "FedAvg": lambda: flower.FedAvg(**HALF),
    "FedAvgM": lambda: flower.FedAvgM(**HALF, server_momentum=0.9),
    "FedAdam": lambda: flower.FedAdam(**HALF, eta=0.01),
    "FedYogi": lambda: flower.FedYogi(**HALF, eta=0.01),
    "FedMedian": lambda: flower.FedMedian(**HALF),
    "Krum": lambda: flower.Krum(**HALF),
    "DP, fixed": lambda: flower.DifferentialPrivacyServerSideFixedClipping(
        flower.FedAvg(**HALF), *NOISE
    ),
    "DP, adaptive": lambda: flower.DifferentialPrivacyServerSideAdaptiveClipping(
        flower.FedAdam(**HALF, eta=0.01), 0.1, 4
    ),
    "DP around ours": lambda: flower.DifferentialPrivacyServerSideFixedClipping(
        IDA(**HALF), *NOISE
    ),
    "ours": lambda: FedAvg(**HALF, stragglers=0.3),
    "ours, with Adam": lambda: FedProx(**HALF, server_optimizer=ServerAdam()),
    "ours, with memory": lambda: FedCE(**HALF),
}
OURS = [name for name in STRATEGIES if name.startswith("ours")]


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(4, 3)


def data(context: Any) -> ClientData:
    client = int(context.node_config["partition-id"])
    stream = np.random.default_rng(client)
    x = stream.normal(size=(10 + client, 4)).astype(np.float32)
    part = Examples(x, stream.integers(0, 3, len(x)))
    return ClientData(part, part)


def grid() -> LocalGrid:
    settings = TrainingSettings(batch_size=4)
    return LocalGrid(
        TrainingApp(model, data, num_classes=3, settings=settings), CLIENTS
    )


def initial() -> FlatRecord:
    return FlatRecord(FlatModule(model()).save())


def config() -> ConfigRecord:
    return ConfigRecord({keys.LOCAL_EPOCHS: 2})


def vector(arrays: ArrayRecord) -> Any:
    return np.concatenate([array.numpy().ravel() for array in arrays.values()])


@pytest.fixture(autouse=True)
def _streams() -> Any:
    """Flower's strategies draw from the process's streams."""
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    with _flower.task_identity(1):
        yield


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.filterwarnings("ignore")  # Flower's own.
def test_the_loop_gives_the_bits_of_start(name: str) -> None:
    started = STRATEGIES[name]().start(
        grid(), initial(), num_rounds=4, train_config=config()
    )
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    state = ServerState(initial(), train_config=config())
    ended = federate(STRATEGIES[name](), grid(), state, until=4)
    assert ended.round == 4
    np.testing.assert_array_equal(vector(ended.arrays), vector(started.arrays))


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_goes_on_from_its_values(name: str, stop: int) -> None:
    """Another process would have the state, the arrays and what clients keep."""
    begin = ServerState(initial(), train_config=config())
    whole = federate(STRATEGIES[name](), grid(), begin, until=5)
    first, clients = STRATEGIES[name](), grid()
    begin = ServerState(initial(), train_config=config())
    half = federate(first, clients, begin, until=stop)
    second, others = STRATEGIES[name](), grid()
    second.restore(unpack(*pack(first.state)))
    for client, context in clients.contexts.items():
        others.context(client).state = copy.deepcopy(context.state)
    ended = federate(second, others, half, until=5)
    np.testing.assert_array_equal(vector(ended.arrays), vector(whole.arrays))


def test_callbacks_are_called_in_order_and_may_stop() -> None:
    called = []

    def first(state: ServerState) -> bool:
        called.append(("first", state.round))
        return state.round == 2

    def second(state: ServerState) -> None:
        called.append(("second", state.round))

    ended = federate(
        FedAvg(), grid(), ServerState(initial()), until=9, callbacks=[first, second]
    )
    assert ended.round == 2
    assert called == [(who, t) for t in (1, 2) for who in ("first", "second")]


def test_models_are_added_up_and_only_the_last_round_is_kept() -> None:
    summed = []

    class Watched(LocalGrid):
        def send_and_receive(self, messages: Any, *, timeout: Any = None) -> Any:
            summed.append(messages.summed_by)
            return super().send_and_receive(messages, timeout=timeout)

    app = TrainingApp(model, data, num_classes=3)
    strategy = FedAvg(fraction_evaluate=0.5)
    federate(strategy, Watched(app, CLIENTS), ServerState(initial()), until=3)
    assert summed == ["num-examples", None] * 3
    assert [record.number for record in strategy.history] == [3]
