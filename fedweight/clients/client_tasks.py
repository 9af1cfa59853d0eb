"""What a client is told and has: its number, instructions and data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from flwr.app import ConfigRecord, Context, RecordDict

from ..core.errors import check_range
from ..data.federated import ClientData
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
