"""A Flower ClientApp made of a model, data and an objective.

The same app trains many clients in a simulation, where a client is a number, and one
client on a real device, where its data lies at a path.
"""

from __future__ import annotations

import copy
import logging
import math
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    RecordDict,
)
from flwr.clientapp import ClientApp
from torch import nn

from ..core.errors import ClientError, check_range, closest, describe_failure
from ..core.layout import FlatModel
from ..core.module import FlatModule
from ..core.rng import Purpose, key_table
from ..core.texts import shown
from ..data.federated import ClientData
from ..messages import keys
from ..messages.arrays import arrays_of, flatten
from ..messages.dispatch import Answers, Cohort, Reply, lay_out_as_sent, only_arrays
from ..messages.records import NUMBERS, as_measured
from .batched import BatchedTrainer
from .noise import own_streams
from .objectives import OBJECTIVES, Objective, Plain
from .probes import ClientRound, Probe, check_named
from .queries import Answer, ClientQuery, Query
from .registries import PROBES, QUERIES
from .settings import TrainingSettings
from .training import LocalResult, Task, evaluate, evaluate_each, train
from .trial import Findings, Kind, Trials, kind_of

log = logging.getLogger("fedweight")

# What an error calls the global model, and the client's own.
RECEIVED = {"given": "the received model", "expected": "this client's model"}

# What an app does not take along to another process.
OF_A_PROCESS = {
    *("_idle", "_cancelled", "_making", "_trainers", "_prepared", "_streams"),
    *("_building", "_modules"),
}

# Trainers are kept for so many values of `mu`: each holds what it traced.
KEPT_TRAINERS = 4


class TrainingApp(ClientApp):
    """A ClientApp that trains a PyTorch classifier on a client's own data.

    It answers ``train``, ``evaluate`` and ``query.ask`` messages, with the records and
    metrics that :mod:`fedweight.messages.keys` names; and ``query.label_counts``, which
    is the query of that name.

    Parameters
    ----------
    model : Callable[[], nn.Module]
        Makes the architecture; the weights come from the server.
    data : Callable[[Context], ClientData]
        Returns the data of the client that a Flower context stands for.
    objective : Objective
        What local training minimises; plain cross-entropy by default. A server that
        tells ``proximal-mu`` (FedProx, ours or Flower's) adds the proximal term.
    settings : TrainingSettings
        Epochs, batches and optimiser.
    num_classes : int
        C, the length of ``label-counts``.
    seed : int
        The run's seed; it orders the examples.
    device : str
        Where training runs, such as ``"cpu"`` or ``"cuda:0"``.
    sizes : Sequence[int], optional
        How many training examples client k has; a simulation then trains clients of
        like size together, the largest first, and tries the model with the examples
        of the largest.
    name_of : Callable[[int], str], optional
        What client k is called in records and messages; by default its number.
    probes : Mapping[str, Probe], optional
        Functions that a strategy may ask for by these names, besides those in
        :data:`~fedweight.clients.registries.PROBES`.
    queries : Mapping[str, Query], optional
        Functions that a strategy may ask before the rounds by these names, besides
        those in :data:`~fedweight.clients.registries.QUERIES`.
    mods : list, optional
        Flower client mods, applied to every message.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from fedweight.data import ClientData, Examples
    >>> part = Examples(np.zeros((4, 2), np.float32), np.array([0, 1, 0, 1]))
    >>> app = TrainingApp(
    ...     model=lambda: torch.nn.Linear(2, 2),
    ...     data=lambda context: ClientData(part, part),
    ...     num_classes=2,
    ... )
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        data: Callable[[Context], ClientData],
        *,
        num_classes: int,
        objective: Objective | None = None,
        settings: TrainingSettings | None = None,
        seed: int = 0,
        device: str = "cpu",
        sizes: Sequence[int] | npt.NDArray[np.int64] | None = None,
        name_of: Callable[[int], str] | None = None,
        probes: Mapping[str, Probe] | None = None,
        queries: Mapping[str, Query] | None = None,
        mods: list[Any] | None = None,
    ) -> None:
        super().__init__(mods=mods)
        self.sizes = sizes
        self.name_of = name_of
        self.probes = dict(probes or {})
        self.queries = dict(queries or {})
        check_named("probe", "TrainingApp", self.probes, PROBES)
        check_named("query", "TrainingApp", self.queries, QUERIES)
        self.mods = list(mods or [])
        self._has_lifespan = False
        self.model = model
        self.data = data
        self.num_classes = num_classes
        self.objective = objective or Plain()
        self.settings = settings or TrainingSettings()
        self.seed = seed
        self.device = device
        self._trials = Trials(
            self._architecture, data, self.objective, self.settings, device, sizes
        )
        self._warned: set[str] = set()
        self._forget()
        self.train()(self._train)
        self.evaluate()(self._evaluate)
        self.query("ask")(self._query)
        self.query("label_counts")(partial(self._query, name=keys.LABEL_COUNTS))

    def _forget(self) -> None:
        """Start without prepared modules: each process makes its own."""
        self._idle: queue.SimpleQueue[FlatModule] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._making, self._building = threading.Lock(), threading.Lock()
        self._trainers: dict[tuple[float | None, int], BatchedTrainer] = {}
        self._prepared: Callable[[], Cohort | None] = lambda: None
        self._streams: dict[tuple[int, int], tuple[int, int]] = {}
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to this process."""
        return {k: v for k, v in self.__dict__.items() if k not in OF_A_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the settings."""
        self.__dict__.update(state)
        self._forget()

    @property
    def thread_safe(self) -> bool:
        """Whether several clients may train at once in threads of one process.

        Not with Flower mods, which may keep state; nor with a model that draws random
        numbers from a stream of the process, as a trial with the first client's
        examples shows.
        """
        if self.mods or self.device != "cpu":
            return False
        clients = 1 if self.sizes is None else len(self.sizes)
        first = Context(
            run_id=0,
            node_id=0,
            node_config={"partition-id": 0, "num-partitions": clients},
            state=RecordDict(),
            run_config={},
        )
        kind = self._trials.kind(first)
        return kind is None or not self._trials.alone(kind, first).draws

    @property
    def answers_cohorts(self) -> bool:
        """Whether :meth:`answer` may be used instead of sending messages.

        Not where somebody wants to see them: Flower mods, a lifespan, a class that
        derives from this one.
        """
        return type(self) is TrainingApp and not self.mods and not self._has_lifespan

    def lifespan(self) -> Any:
        """Register what runs around every message, as any Flower app can."""
        self._has_lifespan = True
        return super().lifespan()

    def cancel(self) -> None:
        """Let clients that are training in other threads stop within a few steps.

        Those that start afterwards are not concerned: the app can be used again.
        """
        cancelled, self._cancelled = self._cancelled, threading.Event()
        cancelled.set()

    def trains_batched(self, context: Context) -> bool:
        """Tell whether clients may train at once: it has to give what each alone gives.

        A trial finds out, once for a kind of input; where it says no, a warning says
        why. See :mod:`fedweight.clients.trial`.

        Parameters
        ----------
        context : Context
            Of any client. The examples are taken from the first clients all the same,
            so that it does not matter which process asks, and when.
        """
        kind = self._trials.kind(context)
        if kind is None:
            self._warn_once(
                "examples",
                "clients train one after another: none of the first ones has examples "
                "here, to find out whether they may train at once.",
            )
        return kind is not None and not self._trials.batched(kind, context)

    def answer(
        self,
        cohort: Cohort,
        nodes: Sequence[int],
        context_of: Callable[[int], Context],
        *,
        batched: bool = False,
    ) -> Answers:
        """Let some clients of a cohort handle what they were sent.

        Parameters
        ----------
        cohort : Cohort
            Of train or evaluate messages.
        nodes : Sequence[int]
            The clients' nodes.
        context_of : Callable[[int], Context]
            A node's context.
        batched : bool
            Train them at once (:mod:`fedweight.clients.batched`), where that gives
            what each alone gives.

        Returns
        -------
        Answers
            Replies in the order of the nodes; a client's failure is its reply's
            ``error``. The models are added up where the cohort allows it.
        """
        replies = self._answer(cohort, nodes, context_of, batched=batched)
        lay_out_as_sent(cohort.arrays, replies)
        answers = Answers(replies)
        if cohort.summed_by is not None:
            answers.sum_up(cohort)
        for reply in replies:
            reply.is_finite()  # Look now, while the model is near.
        return answers

    def _answer(
        self,
        cohort: Cohort,
        nodes: Sequence[int],
        context_of: Callable[[int], Context],
        *,
        batched: bool = False,
    ) -> list[Reply]:
        stage, cancelled = cohort.message_type, self._cancelled
        if stage == "train":
            self._prepare(cohort, context_of)
        work = self._train_all if stage == "train" else self._evaluate_all
        record = cohort.arrays

        def attempt(some: Sequence[int]) -> list[Reply]:
            # Most clients are told the same.
            instructions: dict[int, Instructions] = {}
            clients = []
            for node in some:
                config = cohort.config(node)
                if id(config) not in instructions:
                    instructions[id(config)] = Instructions.of(config)
                clients.append(
                    self._client_task(node, instructions[id(config)], context_of(node))
                )
            return work(record, clients, batched and len(some) > 1)

        try:
            return attempt(nodes)
        except (Exception, SystemExit) as error:  # On a device only it would end.
            if len(nodes) == 1 or cancelled.is_set():
                clients = [client_number(context_of(node)) for node in nodes]
                return [
                    Reply(node, error=describe_failure(client, stage, error))
                    for node, client in zip(nodes, clients, strict=True)
                ]
            # Whose fault it was shows when each is tried alone.
            alone = [self._answer(cohort, [node], context_of)[0] for node in nodes]
            if all(reply.error is None for reply in alone):
                log.warning(
                    "%d clients cannot %s at once, each can alone: %s",
                    len(nodes),
                    stage,
                    error,
                )
            return alone

    # What the app answers.

    def _train(self, message: Message, context: Context) -> Message:
        instructions = Instructions.of(_config(message.content))
        client = self._client_task(context.node_id, instructions, context)
        (reply,) = self._train_all(
            only_arrays(message.content), [client], batched=False
        )
        return reply.message(message)

    def _evaluate(self, message: Message, context: Context) -> Message:
        instructions = Instructions.of(_config(message.content))
        client = self._client_task(context.node_id, instructions, context)
        (reply,) = self._evaluate_all(
            only_arrays(message.content), [client], batched=False
        )
        return reply.message(message)

    def _query(self, message: Message, context: Context, name: str = "") -> Message:
        number = client_number(context)
        name = name or str(_config(message.content).get(keys.QUERY))
        query = self._query_called(name)
        asked = ClientQuery(
            number,
            _config(message.content),
            arrays_of(message.content),
            self.data(context).cast(np.float32, f"client {number}"),
            self.num_classes,
            self.seed,
        )
        answer = query(asked)
        if not isinstance(answer, Answer):
            raise ClientError(
                f"query '{name}' must return an Answer, got {shown(answer)}"
            )
        return answer.message(message)

    def _query_called(self, name: str) -> Query:
        """Return a query of the app's own, or one that is registered."""
        if name in self.queries:
            return self.queries[name]
        if name in QUERIES.entries:
            return QUERIES.resolve(name)  # type: ignore[no-any-return]
        names = sorted({*self.queries, *QUERIES.entries})
        raise ClientError(
            f"there is no query {shown(name)} here.{closest(str(name), names)} There "
            f"are {', '.join(names)}; others are those of the strategy that this "
            "client's own run config names."
        )

    # Steps of the answers.

    def _client_task(
        self, node: int, instructions: Instructions, context: Context
    ) -> ClientTask:
        return ClientTask(
            node, client_number(context), instructions, context, self.data(context)
        )

    def _train_all(
        self, record: ArrayRecord, clients: Sequence[ClientTask], batched: bool
    ) -> list[Reply]:
        """Train some clients from the same global model."""
        cancelled = self._cancelled.is_set  # Of now: see cancel().
        with self._module() as module:
            dtype = _dtype(module)
            clients = [client.cast(dtype) for client in clients]
            start = flatten(record, module.layout, **RECEIVED)
            alike = {(c.instructions.round, c.instructions.mu) for c in clients}
            batched = batched and len(alike) == 1
            kind = self._kind_if_batched(clients, cancelled) if batched else None
            if kind is not None:
                results = self._fit_batched(start, clients, kind, cancelled)
            else:
                results = self._fit_sequentially(module, start, clients, cancelled)
            pairs = list(zip(clients, results, strict=True))
            replies = [
                Reply(
                    client.node,
                    result.model,
                    {
                        keys.NUM_EXAMPLES: len(client.data.train),
                        keys.TRAIN_LOSS: result.loss,
                        keys.TRAIN_ACCURACY: result.accuracy,
                        keys.NUM_STEPS: result.num_steps,
                    },
                )
                for client, result in pairs
            ]
            probed = [
                self._probe(module, start, *pair, reply)
                for pair, reply in zip(pairs, replies, strict=True)
                if pair[0].instructions.request
            ]
        # Only now, when nothing can fail any more, do the clients' states change.
        for view in probed:
            view.commit()
        return replies

    def _probe(
        self,
        module: FlatModule,
        start: FlatModel,
        client: ClientTask,
        result: LocalResult,
        reply: Reply,
    ) -> ClientRound:
        """Measure what the server asks for; numbers are metrics, lists side data."""
        instructions = client.instructions
        view = ClientRound(
            client.number,
            instructions.round,
            instructions.told,
            client.data,
            self.num_classes,
            start,
            result.model,
            result.num_steps,
            self.settings,
            self.settings.learning_rate_in(instructions.round),
            partial(evaluate, module),
            client.context.state,
        )
        measured: dict[str, Any] = {}
        profile: dict[str, Any] = {}
        for name in instructions.request:
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
        return view

    def _probe_called(self, name: str) -> Probe | None:
        """Return a probe of the app's own, or one that is registered."""
        if name in self.probes:
            return self.probes[name]
        return PROBES.resolve(name) if name in PROBES.entries else None

    def _fit_sequentially(
        self,
        module: FlatModule,
        start: FlatModel,
        clients: Sequence[ClientTask],
        cancelled: Callable[[], bool],
    ) -> list[LocalResult]:
        results = []
        for client, task in zip(clients, self._training_tasks(clients), strict=True):
            found = Findings()
            if len(task.examples):
                kind = kind_of(task.examples)
                found = self._trials.alone(
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
                learning_rate=self.settings.learning_rate_in(client.instructions.round),
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
        kind: Kind,
        cancelled: Callable[[], bool],
    ) -> list[LocalResult]:
        tasks = self._training_tasks(clients)
        least = self._trials.alone(kind, clients[0].context).least
        some = [k for k, task in enumerate(tasks) if len(task.examples) >= least]
        results = [LocalResult(start, math.nan, math.nan, 0)] * len(tasks)
        if not some:
            return results
        trained = self._trainer(clients[0].instructions, least).train(
            start,
            [tasks[k] for k in some],
            learning_rate=self.settings.learning_rate_in(clients[0].instructions.round),
            cancelled=cancelled,
        )
        for k, result in zip(some, trained, strict=True):
            results[k] = result
        return results

    def _training_tasks(self, clients: Sequence[ClientTask]) -> list[Task]:
        """Say how much each client trains, and give it its streams."""
        for client in clients:
            labels = client.data.train.y
            least = np.minimum.reduce(labels) if len(labels) else 0
            if least < 0:
                raise ClientError(
                    f"client {client.number} has an example with label {least}; labels "
                    "name classes, from 0."
                )
        streams = self._streams
        if any((c.instructions.round, c.number) not in streams for c in clients):
            streams = {}
            for round in {c.instructions.round for c in clients}:
                numbers = [c.number for c in clients if c.instructions.round == round]
                streams |= self._streams_of(round, numbers)
        return [
            Task(
                client.data.train,
                client.instructions.epochs or self.settings.epochs,
                *streams[client.instructions.round, client.number],
            )
            for client in clients
        ]

    def _streams_of(
        self, round: int, clients: Sequence[int]
    ) -> dict[tuple[int, int], tuple[int, int]]:
        """Return the keys of order and noise, by round and client."""
        purposes = [Purpose.SHUFFLE, Purpose.DROPOUT]
        orders, noises = key_table(self.seed, purposes, round, clients)
        pairs = zip(orders.tolist(), (noises >> np.uint64(1)).tolist(), strict=True)
        return dict(zip([(round, client) for client in clients], pairs, strict=True))

    def _prepare(self, cohort: Cohort, context_of: Callable[[int], Context]) -> None:
        """Make the keys of a whole cohort at its first list: one by one they cost."""
        if self._prepared() is cohort:
            return
        with self._making:
            if self._prepared() is cohort:
                return
            round = int(cohort.config(cohort.nodes[0]).get(keys.ROUND, 1))  # type: ignore[arg-type]
            clients = [client_number(context_of(node)) for node in cohort.nodes]
            self._streams = self._streams_of(round, clients)
            self._prepared = weakref.ref(cohort)

    def _evaluate_all(
        self, record: ArrayRecord, clients: Sequence[ClientTask], batched: bool
    ) -> list[Reply]:
        """Evaluate the global model on some clients' held-out data."""
        with self._module() as module:
            dtype = _dtype(module)
            clients = [client.cast(dtype) for client in clients]
            parts = [client.data.held_out for client in clients]
            apart = len(clients) > 1 and self._mixes_examples(clients)
            model = flatten(record, module.layout, **RECEIVED)
            measured = evaluate_each(module, model, parts, apart=apart)
        return [
            Reply(
                client.node,
                metrics={
                    keys.NUM_EXAMPLES: len(part),
                    keys.LOSS: loss,
                    keys.ACCURACY: accuracy,
                },
            )
            for client, part, (loss, accuracy) in zip(
                clients, parts, measured, strict=True
            )
        ]

    @contextmanager
    def _module(self) -> Iterator[FlatModule]:
        """Lend a prepared module: each thread works with its own."""
        try:
            module = self._idle.get_nowait()
        except queue.Empty:
            module = self._new_module()
        try:
            yield module
        finally:
            self._idle.put(module)

    def _new_module(self) -> FlatModule:
        """Build the model; what that draws reaches no client that trains meanwhile."""
        with (
            own_streams(0, torch.device(self.device)),
            torch.inference_mode(False),  # It will be written to outside of it.
        ):
            return FlatModule(self._architecture(), self.device)

    def _architecture(self) -> nn.Module:
        """Build the model; what it has of an earlier one is copied.

        Two threads never work with one module, whatever ``model`` returns.
        """
        with self._building:
            module = self.model()
            if not self._modules.isdisjoint(module.modules()):
                module = copy.deepcopy(module)
            self._modules.update(module.modules())
        return module

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
                    self._new_module(),
                    self._objective(instructions),
                    self.settings,
                    least=least,
                )
            self._trainers[key] = trainer
            return trainer

    def _kind_if_batched(
        self, clients: Sequence[ClientTask], cancelled: Callable[[], bool]
    ) -> Kind | None:
        """Return the clients' one kind of input, if they may train at once."""
        kinds = {kind_of(c.data.train) for c in clients if len(c.data.train)}
        if len(kinds) != 1:
            return None
        (kind,) = kinds
        why_not = self._trials.batched(kind, clients[0].context, cancelled)
        return None if why_not else kind

    def _mixes_examples(self, clients: Sequence[ClientTask]) -> bool:
        """Tell whether clients' examples must not go through the model together."""
        parts = {kind_of(c.data.held_out): c for c in clients if len(c.data.held_out)}
        return any(
            self._trials.mixes_examples(kind, client.context, client.data.held_out)
            for kind, client in parts.items()
        )

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

    def _warn_once(self, about: str, message: str, *values: object) -> None:
        if about not in self._warned:
            self._warned.add(about)
            log.warning(message, *values)


def client_number(context: Context) -> int:
    """Return which client a context stands for: its partition, or its node."""
    return int(context.node_config.get("partition-id", context.node_id))


@dataclass(frozen=True, slots=True)
class Instructions:
    """What the server tells a client."""

    round: int
    request: tuple[str, ...]
    epochs: int | None
    mu: float | None
    told: ConfigRecord

    @classmethod
    def of(cls, config: ConfigRecord) -> Instructions:
        """Read what a message tells."""
        told: Any = dict(config)
        epochs = told.get(keys.LOCAL_EPOCHS)
        if epochs is not None:
            check_range(keys.LOCAL_EPOCHS, epochs, 1)
        mu = told.get(keys.PROXIMAL_MU)
        return cls(
            round=int(told.get(keys.ROUND, 1)),
            request=tuple(told.get(keys.REQUEST, ())),
            epochs=None if epochs is None else int(epochs),
            mu=None if mu is None else float(mu),
            told=config,
        )


class ClientTask(NamedTuple):
    """A client, and what it was sent."""

    node: int
    number: int
    instructions: Instructions
    context: Context
    data: ClientData

    def cast(self, dtype: np.dtype[Any]) -> ClientTask:
        """Return the same with data in the model's types."""
        if self.data.train.fits(dtype) and self.data.held_out.fits(dtype):
            return self
        return self._replace(data=self.data.cast(dtype, f"client {self.number}"))


def _dtype(module: FlatModule) -> np.dtype[Any]:
    double = module.layout.dtype == torch.float64
    return np.dtype(np.float64 if double else np.float32)


def _config(content: RecordDict) -> ConfigRecord:
    records = content.config_records
    return records.get(keys.CONFIG) or next(iter(records.values()), ConfigRecord())
