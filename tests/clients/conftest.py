"""Small clients, and Flower's messages to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    RecordDict,
)
from torch import nn

from fedweight.clients import TrainingApp, TrainingSettings
from fedweight.core.module import FlatModule
from fedweight.data import ClientData, Examples
from fedweight.messages import _flower


def examples(n: int, seed: int = 0, features: int = 4, classes: int = 3) -> Examples:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, features)).astype(np.float32)
    return Examples(x, rng.integers(0, classes, n))


def linear() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(4, 3)


def dropout() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.5), nn.Linear(32, 3))


def batch_norm() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def client_of(context: Context) -> ClientData:
    """Client k has 12 + k examples to train on, and 6 held out."""
    k = int(context.node_config["partition-id"])
    return ClientData(examples(12 + k, seed=k), examples(6, seed=100 + k))


def app_of(
    model: Callable[[], nn.Module] = linear,
    data: Callable[[Context], ClientData] = client_of,
    **options: Any,
) -> TrainingApp:
    options.setdefault("settings", TrainingSettings(epochs=2, batch_size=5))
    options.setdefault("num_classes", 3)
    return TrainingApp(model, data, **options)


def context_of(client: int = 0) -> Context:
    return Context(
        run_id=0,
        node_id=1000 + client,
        node_config={"partition-id": client, "num-partitions": 4},
        state=RecordDict(),
        run_config={},
    )


def message_of(
    arrays: ArrayRecord | None,
    kind: str = MessageType.TRAIN,
    client: int = 0,
    **config: Any,
) -> Message:
    content = RecordDict()
    if arrays is not None:
        content["arrays"] = arrays
    config = {key.replace("_", "-"): value for key, value in config.items()}
    content["config"] = ConfigRecord({"server-round": 1, **config})
    message = Message(content, dst_node_id=1000 + client, message_type=kind)
    _flower.set_message_id(message, "message-1")
    return message


def start_of(model: Callable[[], nn.Module] = linear) -> ArrayRecord:
    """A global model as it comes by wire: an ordinary record."""
    return ArrayRecord(model().state_dict())


def vector(record: ArrayRecord) -> np.ndarray:
    return np.concatenate([a.numpy().reshape(-1) for a in record.values()])


@pytest.fixture(autouse=True)
def _may_make_messages() -> Iterator[None]:
    with _flower.task_identity(1):
        yield


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """What tests of clients are made of."""
    return SimpleNamespace(
        app=app_of,
        batch_norm=batch_norm,
        client_of=client_of,
        context=context_of,
        dropout=dropout,
        examples=examples,
        linear=linear,
        message=message_of,
        module=FlatModule,
        start=start_of,
        vector=vector,
    )
