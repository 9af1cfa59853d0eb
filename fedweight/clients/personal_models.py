"""The clients' personal models: trained, kept and evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..core.layout import FlatModel
from ..core.module import FlatModule
from ..messages import keys
from ..metrics import Statistics
from .client_state import read_models
from .client_tasks import ClientTask
from .cohort_trainer import CohortTrainer
from .evaluation import evaluate
from .personal.base import Personal
from .steps.task import LocalResult

# What is reported of a personal model, by what it is called of the global one.
PERSONAL = {
    keys.LOSS: keys.PERSONAL_LOSS,
    keys.ACCURACY: keys.PERSONAL_ACCURACY,
}


class PersonalModels:
    """Trains what clients keep of their own after their local training.

    Parameters
    ----------
    method : Personal
        What is minimised, and from where on.
    trainer : CohortTrainer
        Trains with the method's objective and streams of its own.
    statistics : Statistics
        What is measured of them.
    """

    def __init__(
        self, method: Personal, trainer: CohortTrainer, statistics: Statistics
    ) -> None:
        self.method = method
        self.trainer = trainer
        self.statistics = statistics

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
        # Most clients share their instructions.
        shared = {id(c.instructions): c.instructions for c in clients}
        own_epochs = {
            key: replace(one, epochs=self.method.epochs, mu=None)
            for key, one in shared.items()
        }
        told = [
            client._replace(instructions=own_epochs[id(client.instructions)])
            for client in clients
        ]
        own = [result.model for result in trained]
        if self.method.start == "personal":
            kept = read_models(clients, start.layout, start.frozen)
            own = [kept.get(client.number, start) for client in clients]
        return self.trainer.train(
            module, start, told, batched=batched, cancelled=cancelled, own=own
        )

    def evaluate(
        self, module: FlatModule, received: FlatModel, clients: Sequence[ClientTask]
    ) -> list[dict[str, float]]:
        """Return loss and accuracy of personal models on the clients' held-out data.

        Nothing for a client that has none. ``received`` is the global model.
        """
        models = read_models(clients, module.layout, received.frozen)
        found: list[dict[str, float]] = []
        for client in clients:
            model = models.get(client.number)
            measured: dict[str, float] = {}
            if model is not None:
                own = evaluate(module, model, client.data.held_out, self.statistics)
                measured = {
                    key: own[name] for name, key in PERSONAL.items() if name in own
                }
            found.append(measured)
        return found
