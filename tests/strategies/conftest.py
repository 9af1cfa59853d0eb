"""A federation without training: a grid whose clients answer what a test says."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid

from fedweight.core.layout import FlatModel, Layout
from fedweight.core.updates import StackedUpdates
from fedweight.messages import _flower, keys
from fedweight.server.schedules import Arrival, Clock, Moment, Schedule, Timetable
from fedweight.strategies import Round

GOLDEN = Path(__file__).parents[1] / "golden"

# Methods whose weights, by their law, need not sum to one: they scale the step, too.
SCALE_THE_STEP = frozenset({"fedasync", "fedau", "fednova", "qfedavg"})


def as_it_begins(strategy: Any) -> Any:
    """Return a strategy without its phase before the rounds: nobody here answers."""
    if strategy.overrides("prepare"):
        strategy.restore({**strategy.state, "prepared": True})
    return strategy


@dataclass
class Client:
    """What one client answers.

    ``model`` is what it sends: a vector, or the named arrays. ``silent`` never answers,
    ``error`` answers with an error, ``twice`` answers two times.
    """

    model: Any = None
    num_examples: float = 10
    metrics: dict[str, float] = field(default_factory=dict)
    profile: dict[str, Any] = field(default_factory=dict)
    silent: bool = False
    error: str = ""
    twice: bool = False
    told: list[ConfigRecord] = field(default_factory=list)


class FakeGrid(Grid):
    """A complete grid: every client is there from the start. Node = client + 100."""

    complete = True
    sizes_of: Any = None

    def __init__(
        self,
        clients: Mapping[int, Client],
        arrange: Callable[[list[Message]], list[Message]] = lambda replies: replies,
    ) -> None:
        self.clients = clients
        self.arrange = arrange
        self.config_records: set[int] = set()

    def client_of(self, node: int) -> int:
        return node - 100

    def get_node_ids(self) -> Iterable[int]:
        return [client + 100 for client in self.clients]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = []
        self.config_records = set()
        models: dict[int, tuple[ArrayRecord, dict[str, Any]]] = {}
        for i, message in enumerate(messages):
            _flower.set_message_id(message, f"message-{i}")
            client = self.clients[self.client_of(message.metadata.dst_node_id)]
            sent = message.content.array_records["arrays"]
            if id(sent) not in models:  # Read once, as most have the same one.
                models[id(sent)] = sent, {n: a.numpy() for n, a in sent.items()}
            model = models[id(sent)][1]
            told = message.content.config_records["config"]
            self.config_records.add(id(told))
            long = message.content.config_records.get(keys.SHARED, ConfigRecord())
            client.told.append(ConfigRecord({**told, **long}))
            if not client.silent:
                replies.append(answer(client, message, model))
                if client.twice:
                    replies.append(answer(client, message, model))
        return self.arrange(replies)

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError


def answer(client: Client, message: Message, model: Mapping[str, Any]) -> Message:
    """Reply as a client of ours does: with what it was asked for, and no more."""
    if client.error:
        return Message(Error(code=2, reason=client.error), reply_to=message)
    told = message.content.config_records["config"]
    arrays = dict(model)
    if isinstance(client.model, Mapping):
        arrays = dict(client.model)
    elif client.model is not None:
        vector = np.asarray(client.model)
        place = 0
        for name, array in arrays.items():
            values = vector[place : place + array.size]
            arrays[name] = values.reshape(array.shape).astype(array.dtype)
            place += array.size
    metrics: dict[str, Any] = {keys.NUM_EXAMPLES: client.num_examples}
    profile = {}
    asked = told.get(keys.REQUEST, [])
    for name in asked if isinstance(asked, list) else []:
        if name in client.metrics:
            metrics[name] = client.metrics[name]
        if name in client.profile:
            profile[name] = client.profile[name]
    always = (keys.LOSS, keys.NUM_STEPS)
    metrics.update({n: v for n, v in client.metrics.items() if n in always})
    record = ArrayRecord({n: Array(np.asarray(a)) for n, a in arrays.items()})
    content = RecordDict({"arrays": record, "metrics": MetricRecord(metrics)})
    if profile:
        content["profile"] = ConfigRecord(profile)
    return Message(content, reply_to=message)


@dataclass
class Federation:
    """A strategy with clients, run round by round through Flower's own messages."""

    strategy: Any
    clients: dict[int, Client]
    arrays: ArrayRecord
    arrange: Callable[[list[Message]], list[Message]] = lambda replies: replies
    config: ConfigRecord = field(default_factory=ConfigRecord)
    number: int = 0
    grid: FakeGrid = field(init=False)

    def __post_init__(self) -> None:
        self.grid = FakeGrid(self.clients, self.arrange)

    def round(self) -> Any:
        """Run one round as ``Strategy.start`` does; return its record."""
        self.number += 1
        messages = self.strategy.configure_train(
            self.number, self.arrays, self.config, self.grid
        )
        replies = self.grid.send_and_receive(messages)
        arrays, _ = self.strategy.aggregate_train(self.number, replies)
        if arrays is not None:
            self.arrays = arrays
        strategy = getattr(self.strategy, "strategy", self.strategy)
        return strategy.history[-1]

    @property
    def vector(self) -> np.ndarray:
        """The global model as one float64 vector, in the order of its arrays."""
        return np.concatenate(
            [a.numpy().reshape(-1).astype(np.float64) for a in self.arrays.values()]
        )


@dataclass(frozen=True)
class Script(Schedule):
    """Arrivals as a test writes them down: ``(client, round in which it began)``."""

    rounds: Sequence[Sequence[tuple[int, int]]]
    exponent: float = 0.5

    @property
    def chooses(self) -> bool:
        return True

    @property
    def discounts(self) -> bool:
        return self.exponent > 0

    def next(self, moment: Moment, state: Any) -> tuple[Timetable, Any]:
        round = moment.round
        starts = {**(state or {}), round: moment.model}
        arrivals = tuple(
            Arrival(c, since, starts[since], (1 + round - since) ** -self.exponent)
            for c, since in self.rounds[round - 1]
        )
        return Timetable(arrivals, lambda passes: {}, lambda passes: 1.0), starts


@dataclass
class Scheduled(Federation):
    """A federation whose rounds a schedule makes; every client's data count as one."""

    schedule: Any = None
    carried: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.grid.sizes_of = lambda clients: None

    def round(self) -> Any:
        clock = Clock(self.schedule, self.carried)
        with self.strategy.following(clock):
            record = super().round()
        self.carried = clock.state
        return record


def record_of(arrays: Mapping[str, Any]) -> ArrayRecord:
    return ArrayRecord({n: Array(np.asarray(a)) for n, a in arrays.items()})


def make_round(
    models: Sequence[Any],
    origin: Any = None,
    num_examples: Sequence[float] | None = None,
    metrics: Mapping[str, Sequence[float]] | None = None,
    offsets: Sequence[int] | None = None,
    clients: Sequence[int] | None = None,
    number: int = 1,
    state: Any = None,
    **options: Any,
) -> Round:
    """Make the round that a method sees, of vectors."""
    rows = [torch.as_tensor(np.asarray(m, dtype=np.float64)) for m in models]
    k = len(rows)
    start = torch.zeros_like(rows[0]) if origin is None else torch.as_tensor(origin)
    places = list(offsets or (0, start.numel()))
    shapes = {
        f"tensor{t}": ((b - a,), "float64") for t, (a, b) in enumerate(pairwise(places))
    }
    layout = Layout.of(shapes, ())
    return Round(
        number=number,
        clients=tuple(clients or range(k)),
        model=FlatModel(layout, start, torch.zeros(0, dtype=torch.float64)),
        updates=StackedUpdates(rows, start, layout.offsets, **options),
        num_examples=torch.as_tensor(num_examples or [1.0] * k, dtype=torch.float64),
        metrics=tuple({n: v[i] for n, v in (metrics or {}).items()} for i in range(k)),
        profiles=({},) * k,
        state=state,
    )


def golden_values(name: str) -> dict[str, Any]:
    with (GOLDEN / f"{name}.toml").open("rb") as file:
        return tomllib.load(file)


@pytest.fixture(scope="module", autouse=True)
def _may_make_messages() -> Iterator[None]:
    with _flower.task_identity(1):
        yield


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Any]]:
    """Read the golden numbers of a method."""
    return golden_values


def check_sum(name: str, weights: Iterable[float]) -> None:
    """Fail unless a registered method's weights sum to what they must."""
    if name not in SCALE_THE_STEP:
        assert sum(weights) == pytest.approx(1, abs=1e-9)


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """What tests build federations of."""
    return SimpleNamespace(
        Client=Client,
        as_it_begins=as_it_begins,
        Federation=Federation,
        record=record_of,
        Clock=Clock,
        Script=Script,
        Scheduled=Scheduled,
        make_round=make_round,
        check_sum=check_sum,
        toy=golden_values("toy"),
    )
