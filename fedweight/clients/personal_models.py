"""The clients' personal models: trained, kept and evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import RecordDict

from ..core.layout import FlatModel, Layout
from ..core.module import FlatModule
from ..messages import keys
from ..messages.arrays import FlatRecord, flatten
from .client_state import write_state
from .client_tasks import ClientTask
from .cohort_trainer import CohortTrainer
from .evaluation import evaluate
from .personal.base import Personal
from .steps.task import LocalResult

# The record of a client's state.
MODEL = "personal.model"


class PersonalModels:
    """Trains what clients keep of their own after their local training.

    Parameters
    ----------
    method : Personal
        What is minimised, and from where on.
    trainer : CohortTrainer
        Trains with the method's objective and streams of its own.
    """

    def __init__(self, method: Personal, trainer: CohortTrainer) -> None:
        self.method = method
        self.trainer = trainer

    def train(
        self,
        module: FlatModule,
        start: FlatModel,
        clients: Sequence[ClientTask],
        trained: Sequence[LocalResult],
        *,
        batched: bool,
        cancelled: Callable[[], bool],
    ) -> list[LocalResult]:
        """Train the personal models of some clients.

        Parameters
        ----------
        module : FlatModule
            What is trained where they train one after another.
        start : FlatModel
            The global model that they received.
        clients : Sequence[ClientTask]
            Whom to train.
        trained : Sequence[LocalResult]
            What their local training made.
        batched : bool
            Whether to train them at once, where that is the same.
        cancelled : Callable[[], bool]
            Tells whether to stop.
        """
        told = [
            client._replace(
                instructions=replace(
                    client.instructions, epochs=self.method.epochs, mu=None
                )
            )
            for client in clients
        ]
        own = [result.model for result in trained]
        if self.method.start == "personal":
            kept = [personal_model(c.context.state, start.layout) for c in clients]
            own = [start if model is None else model for model in kept]
        return self.trainer.train(
            module, start, told, batched=batched, cancelled=cancelled, own=own
        )

    def commit(
        self, clients: Sequence[ClientTask], trained: Sequence[LocalResult]
    ) -> None:
        """Let clients keep their personal models."""
        for client, result in zip(clients, trained, strict=True):
            if result.num_steps:
                client.context.state[MODEL] = FlatRecord(result.model)
                write_state(client.context.state, "personal", result)

    def evaluate(
        self, module: FlatModule, clients: Sequence[ClientTask]
    ) -> list[dict[str, float]]:
        """Return loss and accuracy of personal models on the clients' held-out data.

        Nothing for a client that has none.
        """
        found: list[dict[str, float]] = []
        for client in clients:
            model = personal_model(client.context.state, module.layout)
            measured: dict[str, float] = {}
            if model is not None:
                loss, accuracy = evaluate(module, model, client.data.held_out)
                measured = {keys.PERSONAL_LOSS: loss, keys.PERSONAL_ACCURACY: accuracy}
            found.append(measured)
        return found


def personal_model(state: RecordDict, layout: Layout) -> FlatModel | None:
    """Return a client's personal model, if it has one."""
    record: Any = state.get(MODEL)
    return None if record is None else flatten(record, layout)
