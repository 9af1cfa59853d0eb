"""Local training of a cohort's clients: at once, or one after another."""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Context

from ..core import rng
from ..core.errors import ClientError
from ..core.layout import FlatModel, as_tensor
from ..core.module import FlatModule
from ..core.rng import Purpose, part_of
from ..data.examples import Examples
from ..data.parts import Parts
from ..messages import keys
from ..messages.dispatch import Cohort
from ..messages.shared import Long
from .client_state import Named, Owner, read_carried
from .client_tasks import (
    ClientTask,
    ClientTasks,
    Instructions,
    alike,
    examples_of,
    instructions_of,
    numbers_of,
)
from .coding import Coding
from .modules import Modules
from .objectives import OBJECTIVES, Objective
from .objectives.base import TOLD, Facts, defines, tracks
from .optimizers import OPTIMIZERS
from .samples import Kind, kind_of
from .settings import TrainingSettings
from .steps.batched import BatchedTrainer
from .steps.loop import train
from .steps.results import Results
from .steps.task import Known, LocalResult, Task, Tasks
from .trial import Trials
from .trying import Findings

log = logging.getLogger("fedweight")

# What is not taken along to another process.
OF_A_PROCESS = {"_making", "_trainers", "_prepared", "_streams", "_labelled"}

# Trainers are kept for so many values of `mu`: each holds what it traced.
KEPT_TRAINERS = 4


Keys = npt.NDArray[np.uint64]


class _Streams:
    """The keys of a cohort's clients in a round, by their numbers."""

    def __init__(
        self, round: int, clients: Sequence[int], orders: Keys, noises: Keys
    ) -> None:
        self.round = round
        self.orders = orders
        self.noises = noises
        self._place = dict(zip(clients, range(len(clients)), strict=True))

    def of(self, round: int, clients: Sequence[int]) -> tuple[Keys, Keys] | None:
        """Return those of some clients; ``None`` unless all are known."""
        if round != self.round or not self._place.keys() >= set(clients):
            return None
        places = [self._place[client] for client in clients]
        return self.orders[places], self.noises[places]


class CohortTrainer:
    """Trains clients that start from one global model.

    Parameters
    ----------
    modules : Modules
        What is trained.
    trials : Trials
        What is known of the model: whether clients may train at once, for one thing.
    objective : Objective
        What local training minimises, without a server's proximal term.
    settings : TrainingSettings
        Epochs, batches and optimiser.
    seed : int
        The run's.
    coding : Coding
        How classes and groups are coded.
    purposes : tuple of Purpose
        Of the streams of the examples' order and of the noise in the model.
    owner : {"objective", "personal"}
        Whose part of what a client keeps is read.

    Attributes
    ----------
    tracks : bool
        Whether the objective wants to know, carry or keep anything.
    carries : bool
        Whether clients take anything along to their next round.
    """

    def __init__(
        self,
        modules: Modules,
        trials: Trials,
        objective: Objective,
        settings: TrainingSettings,
        seed: int,
        coding: Coding,
        *,
        purposes: tuple[Purpose, Purpose] = (Purpose.SHUFFLE, Purpose.DROPOUT),
        owner: Owner = "objective",
    ) -> None:
        self.modules = modules
        self.trials = trials
        self.objective = objective
        self.settings = settings
        self.seed = seed
        self.coding = coding
        self.tracks = tracks(objective)
        self.carries = bool(objective.per_example) or defines(objective, "begin")
        self.purposes = list(purposes)
        self.owner = owner
        self._warned: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        """Start without trainers: each process makes its own."""
        self._making = threading.Lock()
        self._trainers: dict[tuple[float | None, int], BatchedTrainer] = {}
        self._prepared: Callable[[], Cohort | None] = lambda: None
        self._streams: _Streams | None = None
        self._labelled: npt.NDArray[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to this process."""
        return {k: v for k, v in self.__dict__.items() if k not in OF_A_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the settings."""
        self.__dict__.update(state)
        self._forget()

    def let_go(self) -> None:
        """Give back the memory that trainers keep for the next clients."""
        with self._making:
            for trainer in self._trainers.values():
                trainer.let_go()

    def trains_batched(self, context: Context) -> bool:
        """Tell whether clients may train at once; warn where nobody has examples."""
        if not self._optimizer_batches():
            return False
        kind = self.trials.kind(context)
        if kind is None:
            self._warn_once(
                "examples",
                "clients train one after another: none of the first ones has examples "
                "here, to find out whether they may train at once.",
            )
        return kind is not None and not self.trials.batched(kind, context)

    def prepare(self, cohort: Cohort, number_of: Callable[[int], int]) -> None:
        """Make the keys of a whole cohort at its first list: one by one they cost."""
        if self._prepared() is cohort:
            return
        with self._making:
            if self._prepared() is cohort:
                return
            round = int(cohort.config(cohort.nodes[0]).get(keys.ROUND, 1))  # type: ignore[arg-type]
            clients = [number_of(node) for node in cohort.nodes]
            self._streams = _Streams(round, clients, *self._keys_of(round, clients))
            self._prepared = weakref.ref(cohort)

    def train(
        self,
        module: FlatModule,
        start: FlatModel,
        clients: Sequence[ClientTask],
        shared: Mapping[str, Long],
        *,
        batched: bool,
        cancelled: Callable[[], bool],
        own: Sequence[FlatModel] | None = None,
        part: int = 0,
    ) -> Sequence[LocalResult]:
        """Train some clients; at once if asked to, where that is the same.

        Parameters
        ----------
        module : FlatModule
            What is trained where they train one after another.
        start : FlatModel
            The global model.
        clients : Sequence[ClientTask]
            Whom to train.
        shared : Mapping[str, list of float or Tensor]
            What the server tells all of them alike: lists, and ``[P]`` of parameters.
        batched : bool
            Whether to train them at once.
        cancelled : Callable[[], bool]
            Tells whether to stop.
        own : Sequence[FlatModel], optional
            What each client trains, where that is not the global model.
        part : int
            Of training that has several parts in a round, which one: each has random
            numbers of its own.

        Returns
        -------
        Sequence of LocalResult
            In the order of the clients.
        """
        told = {(one.round, one.mu) for one in alike(instructions_of(clients))}
        batched = batched and len(told) == 1 and self._optimizer_batches()
        kind = self.kind_if_batched(clients, cancelled) if batched else None
        tasks = self._training_tasks(clients, part, shared)
        if own is not None:
            tasks = replace(tasks, own=own)
        if kind is not None:
            return self._fit_batched(start, clients, tasks, kind, cancelled)
        return self._fit_sequentially(module, start, clients, tasks, cancelled)

    def kind_if_batched(
        self,
        clients: Sequence[ClientTask],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Kind | None:
        """Return the clients' one kind of input, if they may train at once."""
        if isinstance(clients, ClientTasks):
            several = [clients.parts.whole] if clients.parts.sizes.any() else []
        else:
            several = [c.data.train for c in clients if len(c.data.train)]
        kinds = {kind_of(examples) for examples in several}
        if len(kinds) != 1:
            return None
        (kind,) = kinds
        why_not = self.trials.batched(kind, clients[0].context, cancelled)
        return None if why_not else kind

    def _fit_sequentially(
        self,
        module: FlatModule,
        start: FlatModel,
        clients: Sequence[ClientTask],
        tasks: Sequence[Task],
        cancelled: Callable[[], bool],
    ) -> list[LocalResult]:
        results = []
        for client, task in zip(clients, tasks, strict=True):
            found = Findings()
            if len(task.examples):
                kind = kind_of(task.examples)
                found = self.trials.alone(
                    kind, client.context, task.examples, cancelled
                )
            if found.fault:
                raise ClientError(f"model: {found.fault}")
            result = train(
                module,
                start,
                task,
                self._objective(client.instructions),
                self.settings,
                learning_rate=client.instructions.learning_rate_in(self.settings),
                least=found.least,
                draws=bool(found.draws),
                cancelled=cancelled,
            )
            results.append(result)
        return results

    def _fit_batched(
        self,
        start: FlatModel,
        clients: Sequence[ClientTask],
        tasks: Tasks,
        kind: Kind,
        cancelled: Callable[[], bool],
    ) -> Sequence[LocalResult]:
        least = self.trials.alone(kind, clients[0].context).least
        some = np.flatnonzero(tasks.sizes >= least).tolist()
        everybody = len(some) == len(tasks)
        told = instructions_of(clients)
        # Most clients share their instructions, so each is asked once.
        rates = {id(one): one.learning_rate_in(self.settings) for one in alike(told)}
        rate: float | list[float] = next(iter(rates.values()))
        if len(rates) > 1:
            rate = [rates[id(told[k])] for k in some]
        trained: Sequence[LocalResult] = ()
        if some:
            trained = self._trainer(told[0], least).train(
                start,
                tasks if everybody else tasks.take(some),
                learning_rate=rate,
                cancelled=cancelled,
            )
        if everybody:
            return trained
        own = [None] * len(tasks) if tasks.own is None else tasks.own
        begun = [model or start for model in own]
        if isinstance(trained, Results) and not trained.models.is_cpu:
            return trained.among(some, begun)
        results = [LocalResult(model, math.nan, math.nan, 0) for model in begun]
        for k, result in zip(some, trained, strict=True):
            results[k] = result
        return results

    def _training_tasks(
        self, clients: Sequence[ClientTask], part: int, shared: Mapping[str, Long]
    ) -> Tasks:
        """Say how much each client trains, and give it its streams."""
        examples = examples_of(clients)
        if self.coding.task.whole:
            self._check_labels(clients, examples)
        told = instructions_of(clients)
        orders, noises = self._streams_of(told, numbers_of(clients))
        if part:
            orders = part_of(orders, part)
            noises = part_of(noises, part) >> np.uint64(1)
        epochs = [one.epochs or self.settings.epochs for one in told]
        tasks = Tasks(examples, np.array(epochs, np.int64), orders, noises)
        if not self.tracks:
            return tasks
        return replace(tasks, known=self._all_known(clients, shared))

    def _check_labels(
        self, clients: Sequence[ClientTask], examples: Sequence[Examples]
    ) -> None:
        """Raise :class:`ClientError` if an example has a label that names no class."""
        if isinstance(examples, Parts):
            labels = examples.whole.y
            if labels is self._labelled:
                return
            if np.minimum.reduce(labels, axis=None, initial=0) == 0:
                self._labelled = labels  # It is not looked at in every round.
                return
        for client, own in zip(clients, examples, strict=True):
            least = np.minimum.reduce(own.y, axis=None) if len(own) else 0
            if least < 0:
                raise ClientError(
                    f"client {client.number} has an example with label {least}; labels "
                    "name classes, from 0."
                )

    def _all_known(
        self, clients: Sequence[ClientTask], shared: Mapping[str, Long]
    ) -> list[Known]:
        """Return what the objective wants to know of each client, and has kept."""
        carried = read_carried(clients, self.owner) if self.carries else {}
        nothing: tuple[Named | None, Named] = None, {}
        # Most clients share their instructions, so each is read once.
        told = {id(c.instructions): c.instructions.told for c in clients}
        heard = {
            key: self.coding.heard(self.objective, {**shared, **one})
            for key, one in told.items()
        }
        return [
            self._known(
                client,
                *heard[id(client.instructions)],
                *carried.get(client.number, nothing),
            )
            for client in clients
        ]

    def _known(
        self,
        client: ClientTask,
        heard: Named,
        shared: Named,
        carry: Named | None,
        kept: Named,
    ) -> Known:
        """Return what the objective wants to know of a client, and has kept."""
        train = client.data.train
        totals: Any = client.instructions.told.get(keys.CLASS_TOTALS)
        facts = self.coding.facts(
            self.objective, train, totals, client.instructions.round
        )
        missing = [n for n in self.objective.pools if TOLD + n not in heard]
        if missing:
            known, x = Facts(torch.zeros(0), facts), as_tensor(train.x[:1])
            usual = self.objective.unheard(x, known)
            heard = {**heard, **{TOLD + name: usual[name] for name in missing}}
        return Known(
            {**facts, **heard},
            carry,
            kept,
            self.coding.groups(self.objective, train),
            shared,
        )

    def _streams_of(
        self, told: Sequence[Instructions], clients: Sequence[int]
    ) -> tuple[Keys, Keys]:
        """Return the keys of each client's order and noise, ``[C]``."""
        rounds = {one.round for one in alike(told)}
        if len(rounds) == 1:
            (round,) = rounds
            prepared = self._streams
            found = None if prepared is None else prepared.of(round, clients)
            return self._keys_of(round, clients) if found is None else found
        orders, noises = np.empty((2, len(clients)), np.uint64)
        for round in rounds:
            places = [k for k, one in enumerate(told) if one.round == round]
            own = self._keys_of(round, [clients[k] for k in places])
            orders[places], noises[places] = own
        return orders, noises

    def _keys_of(self, round: int, clients: Sequence[int]) -> tuple[Keys, Keys]:
        """Return the keys of order and noise of a round; of noise, below 2**63."""
        orders, noises = (
            rng.keys(self.seed, purpose, round, clients) for purpose in self.purposes
        )
        return orders, noises >> np.uint64(1)

    def _trainer(self, instructions: Instructions, least: int) -> BatchedTrainer:
        """Return the trainer of an objective, which keeps what it has traced."""
        key = instructions.mu, least
        with self._making:
            trainer = self._trainers.pop(key, None)
            if trainer is None:
                if len(self._trainers) == KEPT_TRAINERS:
                    unused_longest = next(iter(self._trainers))
                    del self._trainers[unused_longest]
                trainer = BatchedTrainer(
                    self.modules.new(),
                    self._objective(instructions),
                    self.settings,
                    least=least,
                    traced=self.trials.traced,
                )
            self._trainers[key] = trainer
            return trainer

    def _objective(self, instructions: Instructions) -> Objective:
        if instructions.mu is None:
            return self.objective
        if instructions.mu >= self.settings.diverging_mu:
            self._warn_once(
                keys.PROXIMAL_MU,
                "the server tells %s = %g: from %g on, with this learning rate, local "
                "training diverges",
                keys.PROXIMAL_MU,
                instructions.mu,
                self.settings.diverging_mu,
            )
        inner, proximal = self.objective, OBJECTIVES.resolve("proximal")
        while isinstance(inner, proximal):
            inner = inner.inner
        return proximal(instructions.mu, inner)  # type: ignore[no-any-return]

    def _optimizer_batches(self) -> bool:
        """Tell whether the optimiser can train clients at once; say why not."""
        if not self.settings.rule.batches:
            self._warn_once(
                "optimizer",
                "clients train one after another: optimizer %s is not one of %s.",
                self.settings.to_keys()["optimizer"],
                ", ".join(OPTIMIZERS.entries),
            )
        return self.settings.rule.batches

    def _warn_once(self, about: str, message: str, *values: object) -> None:
        if about not in self._warned:
            self._warned.add(about)
            log.warning(message, *values)
