"""What a client is told and has: its number, instructions and data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
from flwr.app import ConfigRecord, Context, RecordDict

from ..core.errors import check_range
from ..data.examples import Examples
from ..data.federated import ClientData
from ..data.parts import Parts
from ..messages import keys
from ..messages.records import records_of
from .settings import TrainingSettings


def client_number(context: Context) -> int:
    """Return which client a context stands for: its partition, or its node."""
    return int(context.node_config.get("partition-id", context.node_id))


def config_of(content: RecordDict) -> ConfigRecord:
    """Return the record of a message that tells the client something."""
    records = records_of(content, ConfigRecord)
    return records.get(keys.CONFIG) or next(iter(records.values()), ConfigRecord())


@dataclass(frozen=True, slots=True)
class Instructions:
    """What the server tells a client."""

    round: int
    request: tuple[str, ...]
    epochs: int | None
    mu: float | None
    learning_rate: float | None
    told: ConfigRecord

    @classmethod
    def of(cls, config: ConfigRecord) -> Instructions:
        """Read what a message tells."""
        told: Any = dict(config)
        epochs = told.get(keys.LOCAL_EPOCHS)
        if epochs is not None:
            check_range(keys.LOCAL_EPOCHS, epochs, 1)
        mu = told.get(keys.PROXIMAL_MU)
        rate = told.get(keys.LEARNING_RATE)
        if rate is not None:
            check_range(keys.LEARNING_RATE, rate, 0)
        return cls(
            round=int(told.get(keys.ROUND, 1)),
            request=tuple(told.get(keys.REQUEST, ())),
            epochs=None if epochs is None else int(epochs),
            mu=None if mu is None else float(mu),
            learning_rate=None if rate is None else float(rate),
            told=config,
        )

    def learning_rate_in(self, settings: TrainingSettings) -> float:
        """Return the rate of this round: the server's word, else the settings'."""
        if self.learning_rate is not None:
            return self.learning_rate
        return settings.learning_rate_in(self.round)


class ClientTask(NamedTuple):
    """A client, and what it was sent."""

    node: int
    number: int
    instructions: Instructions
    context: Context
    data: ClientData

    def cast(self, dtype: np.dtype[Any], task: str) -> ClientTask:
        """Return the same with data in the types of the model and its task."""
        if self.data.train.fits(dtype, task) and self.data.held_out.fits(dtype, task):
            return self
        return self._replace(data=self.data.cast(dtype, f"client {self.number}", task))


class ClientTasks(Sequence[ClientTask]):
    """Simulated clients whose examples are rows of the same arrays, as columns.

    What is asked for of one client is made then, once.

    Parameters
    ----------
    nodes, numbers : Sequence[int]
        The clients' nodes, and their numbers.
    instructions : Sequence[Instructions]
        What each was told; most clients share theirs.
    parts : Parts
        What they train on.
    context_of : Callable[[int], Context]
        Returns a node's context.
    data : Callable[[Context], ClientData]
        Returns a client's data.
    """

    def __init__(
        self,
        nodes: Sequence[int],
        numbers: Sequence[int],
        instructions: Sequence[Instructions],
        parts: Parts,
        context_of: Callable[[int], Context],
        data: Callable[[Context], ClientData],
    ) -> None:
        self.nodes = nodes
        self.numbers = numbers
        self.instructions = instructions
        self.parts = parts
        self._context_of = context_of
        self._data = data
        self._made: dict[int, ClientTask] = {}

    def __len__(self) -> int:
        """Return how many clients these are."""
        return len(self.nodes)

    @overload
    def __getitem__(self, k: int) -> ClientTask: ...
    @overload
    def __getitem__(self, k: slice) -> list[ClientTask]: ...
    def __getitem__(self, k: int | slice) -> ClientTask | list[ClientTask]:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        k = range(len(self))[k]
        made = self._made.get(k)
        if made is None:
            context = self._context_of(self.nodes[k])
            made = self._made[k] = ClientTask(
                self.nodes[k],
                self.numbers[k],
                self.instructions[k],
                context,
                self._data(context),
            )
        return made


def cast(
    clients: Sequence[ClientTask], dtype: np.dtype[Any], task: str
) -> Sequence[ClientTask]:
    """Return some clients with data in the types of the model and its task."""
    if isinstance(clients, ClientTasks) and clients.parts.whole.fits(dtype, task):
        return clients
    return [client.cast(dtype, task) for client in clients]


def nodes_of(clients: Sequence[ClientTask]) -> Sequence[int]:
    """Return the clients' nodes."""
    if isinstance(clients, ClientTasks):
        return clients.nodes
    return [client.node for client in clients]


def numbers_of(clients: Sequence[ClientTask]) -> Sequence[int]:
    """Return the clients' numbers."""
    if isinstance(clients, ClientTasks):
        return clients.numbers
    return [client.number for client in clients]


def instructions_of(clients: Sequence[ClientTask]) -> Sequence[Instructions]:
    """Return what each client was told."""
    if isinstance(clients, ClientTasks):
        return clients.instructions
    return [client.instructions for client in clients]


def examples_of(clients: Sequence[ClientTask]) -> Sequence[Examples]:
    """Return what each client trains on."""
    if isinstance(clients, ClientTasks):
        return clients.parts
    return [client.data.train for client in clients]


def alike(instructions: Iterable[Instructions]) -> list[Instructions]:
    """Return what clients were told, once each: most clients share theirs."""
    return [*{id(one): one for one in instructions}.values()]


def sizes_in(clients: Sequence[ClientTask]) -> list[int]:
    """Return how many examples each client trains on."""
    if isinstance(clients, ClientTasks):
        sizes: list[int] = clients.parts.sizes.tolist()
        return sizes
    return [len(client.data.train) for client in clients]
