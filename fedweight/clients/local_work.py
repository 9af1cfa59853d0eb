"""Local work: what clients do with a global model, and the replies they make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, RecordDict

from ..core.errors import ClientError
from ..core.layout import FlatModel
from ..core.model_rows import Held, ModelRows
from ..core.module import FlatModule
from ..core.rng import Purpose, generator
from ..core.texts import shown
from ..data.examples import Examples
from ..messages import keys
from ..messages.arrays import complete, leaves_out_base
from ..messages.codecs import DENSE, Codec, Draw, as_read
from ..messages.dispatch import Answers, Reply, only_arrays
from ..messages.records import NUMBERS, as_measured
from ..messages.shared import Long, mask_among, shared_of, sizes_of
from ..messages.wire import asks_to_write, written
from ..metrics import Statistics
from .bases import base_of
from .client_state import write_results
from .client_tasks import (
    ClientTask,
    alike,
    cast,
    instructions_of,
    nodes_of,
    sizes_in,
)
from .cohort_trainer import CohortTrainer
from .evaluation import sums_of_each
from .modules import Modules
from .peers import Peers
from .personal_models import PersonalModels
from .probes import ClientRound, Probe
from .registries import PROBES
from .samples import kind_of
from .settings import TrainingSettings
from .steps.results import columns_of, models_of
from .steps.task import LocalResult
from .trial import Trials

# What an error calls the global model, and the client's own.
RECEIVED = {"given": "the received model", "expected": "this client's model"}


class LocalWork:
    """Trains a global model on some clients' data, measures and evaluates it.

    Parameters
    ----------
    modules : Modules
        What it is done with.
    trials : Trials
        What is known of the model.
    trainer : CohortTrainer
        Who trains.
    settings : TrainingSettings
        What it trains with.
    statistics : Statistics
        The task, C, and what is measured of the global model.
    probes : Mapping[str, Probe]
        What may be asked for by these names, besides what is registered.
    personal : PersonalModels, optional
        Trains and evaluates the clients' personal models, if they have some.
    codec : Codec
        How trained models are written on the wire.
    seed : int
        The run's.
    """

    def __init__(
        self,
        modules: Modules,
        trials: Trials,
        trainer: CohortTrainer,
        settings: TrainingSettings,
        statistics: Statistics,
        probes: Mapping[str, Probe],
        personal: PersonalModels | None = None,
        *,
        codec: Codec = DENSE,
        seed: int = 0,
    ) -> None:
        self.modules = modules
        self.trials = trials
        self.trainer = trainer
        self.settings = settings
        self.statistics = statistics
        self.task = statistics.task
        self.probes = probes
        self.personal = personal
        self.codec = codec
        self.seed = seed
        # Loss and accuracy, if there is one: what every client reports.
        self._usual = Statistics(self.task, statistics.num_classes, ())
        score = tuple({self.task.score} & {*self.task.offered})
        # And what probes go by, if that is another measure.
        self._probed = Statistics(self.task, statistics.num_classes, score)

    def train(
        self,
        content: RecordDict,
        clients: Sequence[ClientTask],
        *,
        batched: bool,
        cancelled: Callable[[], bool],
    ) -> Answers:
        """Train some clients from the same global model.

        ``content`` is what all of them are sent.
        """
        record = only_arrays(content)
        with self.modules.lend() as module:
            clients = cast(clients, _dtype(module), self.task.name)
            start = self._received(record, module, clients)
            names = [e.name for e in module.layout.parameters]
            shared = shared_of(content, sizes_of(module.layout), names)
            results = self.trainer.train(
                module,
                start,
                clients,
                shared,
                batched=batched,
                cancelled=cancelled,
            )
            part = leaves_out_base(record, module.layout)
            mask = mask_among(shared)
            draws = self._draws(clients)
            trained = models_of(results)
            models = as_read(self.codec, trained, start, draws, mask)
            replies = self._replies(clients, results)
            answers = Answers(replies, models=models)
            if part:
                answers.models = (
                    models.travelling()
                    if isinstance(models, ModelRows)
                    else [model.travelling() for model in models]
                )
            if asks_to_write(content):
                for k, reply in enumerate(replies):
                    model = trained[k].travelling() if part else trained[k]
                    draw = draws[k] if draws else None
                    reply.written = written(self.codec, model, start, draw, mask)
            probed = self._probe(
                module, start, clients, results, replies, shared, batched=batched
            )
            own = None
            if self.personal is not None and self.personal.in_rounds:
                own = self.personal.train(
                    module,
                    start,
                    clients,
                    _lists(shared),
                    results,
                    batched=batched,
                    cancelled=cancelled,
                )
        # Only now, when nothing can fail any more, does what clients keep change.
        if self.trainer.carries:
            write_results(clients, results, "objective")
        if self.personal is not None and own is not None:
            self.personal.keep(clients, own)
        for view in probed:
            view.commit()
        return answers

    def _replies(
        self, clients: Sequence[ClientTask], results: Sequence[LocalResult]
    ) -> list[Reply]:
        """Return what clients report of their training, but for the models."""
        losses, accuracies, steps = columns_of(results)
        columns = {
            keys.NUM_EXAMPLES: sizes_in(clients),
            keys.TRAIN_LOSS: losses,
            **({keys.TRAIN_ACCURACY: accuracies} if self.task.counts_hits else {}),
            keys.NUM_STEPS: steps,
        }
        return [
            Reply(node, None, dict(zip(columns, row, strict=True)))
            for node, row in zip(
                nodes_of(clients), zip(*columns.values(), strict=True), strict=True
            )
        ]

    def _draws(self, clients: Sequence[ClientTask]) -> list[Draw]:
        """Return what gives clients' random numbers, where the codec needs some."""
        stream = partial(generator, self.seed, Purpose.CODING)
        drawing = clients if self.codec.draws else ()
        return [partial(stream, c.instructions.round, c.number) for c in drawing]

    def _received(
        self, record: ArrayRecord, module: FlatModule, clients: Sequence[ClientTask]
    ) -> FlatModel:
        """Read the global model; what it leaves out the clients have."""
        base = self.modules.base
        if leaves_out_base(record, module.layout):
            first = clients[0]
            base = base_of(base, first.instructions.told, first.context.state)
        return complete(record, base, **RECEIVED)

    def _probe(
        self,
        module: FlatModule,
        start: FlatModel,
        clients: Sequence[ClientTask],
        results: Sequence[LocalResult],
        replies: Sequence[Reply],
        shared: Mapping[str, Long],
        *,
        batched: bool,
    ) -> list[ClientRound]:
        """Measure what the server asks for; numbers are metrics, lists side data."""
        told_each = enumerate(instructions_of(clients))
        asked = [k for k, told in told_each if told.request]
        if not asked:
            return []
        clients = [clients[k] for k in asked]
        models: Sequence[Held] = models_of(results)
        if isinstance(models, ModelRows):  # Brought where a probe looks at one.
            models = models.there()
        _, _, steps = columns_of(results)
        peers = Peers(module, start, self._probed, self.task.score)
        if batched and len(clients) > 1:
            peers.mixes = partial(self._mixes_examples, clients)
            peers.beside = self.trainer.kind_if_batched(clients)
        # Most clients are told the same.
        told = {id(o): {**shared, **o.told} for o in alike(instructions_of(clients))}
        for client, k in zip(clients, asked, strict=True):
            instructions = client.instructions
            view = ClientRound(
                client.number,
                instructions.round,
                told[id(instructions)],
                client.data,
                self.statistics.num_classes,
                start,
                models[k],
                steps[k],
                self.settings,
                instructions.learning_rate_in(self.settings),
                peers,
                self.trainer.coding,
                client.context.state,
            )
            peers.add(view)
        for view, client, k in zip(peers.clients, clients, asked, strict=True):
            self._measure(view, client.instructions.request, replies[k])
        return peers.clients

    def _measure(self, view: ClientRound, request: Sequence[str], reply: Reply) -> None:
        """Let probes measure a client, and write into its reply what they found."""
        measured: dict[str, Any] = {}
        profile: dict[str, Any] = {}
        for name in request:
            probe = self._probe_called(name)
            if probe is None:
                continue  # Perhaps a Flower mod reports it; if nobody does, it is told.
            given = probe(view)
            found = as_measured(given)
            if found is None:
                raise ClientError(
                    f"probe '{name}' must return {NUMBERS}, got {shown(given)}"
                )
            (profile if isinstance(found, list) else measured)[name] = found
        reply.metrics, reply.profile = {**measured, **reply.metrics}, profile

    def _probe_called(self, name: str) -> Probe | None:
        """Return a probe of the app's own, or one that is registered."""
        if name in self.probes:
            return self.probes[name]
        return PROBES.resolve(name) if name in PROBES.entries else None

    def evaluate(
        self,
        content: RecordDict,
        clients: Sequence[ClientTask],
        *,
        batched: bool,
        cancelled: Callable[[], bool],
    ) -> list[Reply]:
        """Evaluate the global model on some clients' held-out data.

        And their personal models, which they train before if the rounds are over.
        ``content`` is what all of them are sent.
        """
        record = only_arrays(content)
        with self.modules.lend() as module:
            clients = cast(clients, _dtype(module), self.task.name)
            parts = [client.data.held_out for client in clients]
            apart = len(clients) > 1 and self._mixes_examples(clients, parts)
            model = self._received(record, module, clients)
            sums = sums_of_each(module, model, parts, self.statistics, apart=apart)
            of_own: list[dict[str, float]] = [{} for _ in clients]
            over = bool(clients[0].instructions.told.get(keys.AFTER_ROUNDS))
            if self.personal is not None and (over or self.personal.in_rounds):
                if not self.personal.in_rounds:
                    made = self.personal.train(
                        module,
                        model,
                        clients,
                        _lists(shared_of(content, sizes_of(module.layout), ())),
                        batched=batched,
                        cancelled=cancelled,
                    )
                    self.personal.keep(clients, made)
                at_once = batched and not apart
                of_own = self.personal.evaluate(module, model, clients, batched=at_once)
        result = self._usual.result(sums)
        columns: dict[str, list[Any]] = {keys.NUM_EXAMPLES: list(map(len, parts))}
        columns |= {name: values.tolist() for name, values in result.items()}
        if self.statistics.sends:
            columns[keys.STATISTICS] = self.statistics.rows(sums).tolist()
        return [
            Reply(client.node, metrics={**dict(zip(columns, row, strict=True)), **own})
            for client, row, own in zip(
                clients, zip(*columns.values(), strict=True), of_own, strict=True
            )
        ]

    def _mixes_examples(
        self, clients: Sequence[ClientTask], parts: Sequence[Examples]
    ) -> bool:
        """Tell whether clients' examples must not go through the model together."""
        pairs = zip(clients, parts, strict=True)
        some = {kind_of(part): (client, part) for client, part in pairs if len(part)}
        return any(
            self.trials.mixes_examples(kind, client.context, part)
            for kind, (client, part) in some.items()
        )


def _lists(shared: Mapping[str, Long]) -> dict[str, Long]:
    """Return what fits personal models, which may have other parameters."""
    return {name: one for name, one in shared.items() if isinstance(one, list)}


def _dtype(module: FlatModule) -> np.dtype[Any]:
    double = module.layout.dtype == torch.float64
    return np.dtype(np.float64 if double else np.float32)
