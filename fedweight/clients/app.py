"""A Flower ClientApp made of a model, data and an objective.

The same app trains many clients in a simulation, where a client is a number, and one
client on a real device, where its data lies at a path.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from ..core.errors import ClientError, closest, describe_failure
from ..core.limits import is_too_large
from ..core.precision import Precision, check_precision
from ..core.rng import Purpose
from ..core.texts import shown
from ..data.federated import ClientData
from ..data.parts import Parts
from ..data.tasks import CLASSIFICATION
from ..messages import keys
from ..messages.arrays import arrays_of
from ..messages.codecs import DENSE, Codec
from ..messages.dispatch import Answers, Cohort, Reply
from ..messages.wire import opened
from ..metrics import Groups, Statistics, task_named
from .bases import take_base
from .client_tasks import (
    ClientTask,
    ClientTasks,
    Instructions,
    client_number,
    config_of,
)
from .coding import Coding
from .cohort_trainer import CohortTrainer
from .local_work import LocalWork
from .modules import Modules
from .objectives import Objective, Plain
from .objectives.base import of_its_own
from .own_objectives import is_own
from .personal.base import Personal
from .personal_models import PersonalModels
from .probes import Probe, check_named
from .queries import Answer, ClientQuery, Query
from .registries import PROBES, QUERIES
from .settings import TrainingSettings
from .task_objectives import for_task
from .trial import Trials

log = logging.getLogger("fedweight")


class TrainingApp(ClientApp):
    """A ClientApp that trains a PyTorch model on a client's own data.

    It answers ``train``, ``evaluate`` and ``query.ask`` messages, with the records and
    metrics that :mod:`fedweight.messages.keys` names; and ``query.label_counts``, which
    is the query of that name. A model that comes without frozen tensors goes back
    without them: the client builds them, or gets them once, with ``query.base``.

    Parameters
    ----------
    model : Callable[[], nn.Module]
        Makes the architecture; the weights come from the server.
    data : Callable[[Context], ClientData]
        Returns the data of the client that a Flower context stands for.
    objective : Objective
        What local training minimises; by default the task's loss, such as plain
        cross-entropy. A server that tells ``proximal-mu`` (FedProx, ours or Flower's)
        adds the proximal term.
    settings : TrainingSettings
        Epochs, batches and optimiser.
    num_classes : int
        C, classes or labels; 0 where numbers are predicted.
    task : str
        What is predicted: one of :data:`fedweight.metrics.TASKS`.
    metrics : Sequence[str], optional
        What is measured in evaluation besides loss and accuracy; by default what the
        task measures.
    seed : int
        The run's seed; it orders the examples.
    device : str
        Where training runs, such as ``"cpu"`` or ``"cuda:0"``.
    sizes : Sequence[int], optional
        How many training examples client k has; a simulation then trains clients of
        like size together, the largest first, and tries the model with the examples
        of the largest.
    parts : Callable[[Sequence[int]], Parts or None], optional
        In a simulation, what clients train on, by their numbers, as rows of arrays that
        all of them share; it is what ``data`` returns one by one.
    name_of : Callable[[int], str], optional
        What client k is called in records and messages; by default its number.
    probes : Mapping[str, Probe], optional
        Functions that a strategy may ask for by these names, besides those in
        :data:`~fedweight.clients.registries.PROBES`.
    queries : Mapping[str, Query], optional
        Functions that a strategy may ask before the rounds by these names, besides
        those in :data:`~fedweight.clients.registries.QUERIES`.
    num_groups : Mapping[str, int], optional
        By attribute of the examples whose codes name groups, how many there are; for
        an objective that wants groups.
    groups : Groups, optional
        By which groups of the held-out examples is measured, too, and how small one may
        be. What is left out of it never leaves the client.
    personal : Personal, optional
        What clients train for themselves, and keep; see
        :mod:`fedweight.clients.personal`.
    codec : Codec
        How trained models are written on the wire; by default as they are. The
        server's strategy has the same.
    precision : {"fp32", "tf32", "bf16"}
        In which the model is computed, in training and in evaluation; weights, their
        sums and updates are float32 in any case. ``"fp32"`` multiplies in float32 on
        every device, though PyTorch would let a GPU round in convolutions; ``"tf32"``
        lets an NVIDIA GPU round factors to 10 bits of the fraction; ``"bf16"`` is
        ``torch.autocast`` to bfloat16, with 7 bits, on a CPU, too.
    trace : bool
        Whether the training step of many clients at once is traced. Without, it stands
        on PyTorch's public functions alone, and is slower.
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
        num_classes: int = 0,
        task: str = CLASSIFICATION,
        metrics: Sequence[str] | None = None,
        objective: Objective | None = None,
        settings: TrainingSettings | None = None,
        seed: int = 0,
        device: str = "cpu",
        sizes: Sequence[int] | npt.NDArray[np.int64] | None = None,
        parts: Callable[[Sequence[int]], Parts | None] | None = None,
        name_of: Callable[[int], str] | None = None,
        probes: Mapping[str, Probe] | None = None,
        queries: Mapping[str, Query] | None = None,
        num_groups: Mapping[str, int] | None = None,
        groups: Groups | None = None,
        personal: Personal | None = None,
        codec: Codec = DENSE,
        precision: Precision = "fp32",
        trace: bool = True,
        mods: list[Any] | None = None,
    ) -> None:
        super().__init__(mods=mods)
        self.sizes = sizes
        self.parts = parts
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
        statistics = Statistics(task_named(task), num_classes, metrics, groups=groups)
        self.task = statistics.task
        self.objective = for_task(objective or Plain(), self.task)
        self.settings = settings or TrainingSettings()
        self.seed = seed
        self.device = device
        check_precision("precision", precision, device)
        modules = Modules(model, device, precision)
        coding = Coding(num_classes, dict(num_groups or {}), self.task)

        def trainer_of(modules: Modules, goal: Objective, **own: Any) -> CohortTrainer:
            trials = Trials(
                modules.architecture,
                data,
                goal,
                self.settings,
                device,
                sizes,
                coding,
                precision=precision,
                traced=trace,
            )
            return CohortTrainer(
                modules, trials, goal, self.settings, seed, coding, **own
            )

        self._trainer = trainer_of(modules, self.objective)
        self._trials = self._trainer.trials
        own = None
        if personal is not None:
            make_trainer = partial(
                trainer_of,
                purposes=(Purpose.PERSONAL_SHUFFLE, Purpose.PERSONAL_DROPOUT),
                owner="personal",
            )
            own = PersonalModels(
                personal,
                of_its_own(self.objective),
                modules,
                make_trainer,
                replace(statistics, groups=None),
            )
        self._modules = modules
        self._work = LocalWork(
            modules,
            self._trials,
            self._trainer,
            self.settings,
            statistics,
            self.probes,
            own,
            codec=codec,
            seed=seed,
        )
        self._cancelled = threading.Event()
        self.train()(self._train)
        self.evaluate()(self._evaluate)
        self.query("ask")(self._query)
        self.query(keys.BASE)(self._take_base)
        self.query("label_counts")(partial(self._query, name=keys.LABEL_COUNTS))

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to this process."""
        return {k: v for k, v in self.__dict__.items() if k != "_cancelled"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the settings."""
        self.__dict__.update(state)
        self._cancelled = threading.Event()

    @property
    def thread_safe(self) -> bool:
        """Whether several clients may train at once in threads of one process.

        Not with Flower mods, which may keep state; nor with a model that draws random
        numbers from a stream of the process, as a trial with the first client's
        examples shows.
        """
        if self.mods or self.device != "cpu":
            return False
        first = self.first_context
        kind = self._trials.kind(first)
        return kind is None or not self._trials.alone(kind, first).draws

    @property
    def first_context(self) -> Context:
        """The context of the first client of a simulation."""
        clients = 1 if self.sizes is None else len(self.sizes)
        return Context(
            run_id=0,
            node_id=0,
            node_config={"partition-id": 0, "num-partitions": clients},
            state=RecordDict(),
            run_config={},
        )

    @property
    def own_trials(self) -> list[Trials]:
        """The trials of objectives that are a user's, and not this library's."""
        several = [trainer.trials for trainer in self._trainers]
        own = {id(one): one for one in several if is_own(one.objective)}
        return [*own.values()]

    @property
    def kept_tables(self) -> Mapping[str, Sequence[str]]:
        """The tables of the store that clients read, by the type of a message."""
        train = ["objective"] if self._trainer.carries else []
        personal = self._work.personal
        own = [] if personal is None else ["personal"]
        in_rounds = own if personal is not None and personal.in_rounds else []
        return {"train": train + in_rounds, "evaluate": own}

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

    def let_go(self) -> None:
        """Give back memory that is kept for the next clients that train at once."""
        for trainer in self._trainers:
            trainer.let_go()
        if self.device != "cpu":
            gc.collect()  # An error's traceback holds on to tensors.
            torch.cuda.empty_cache()

    @property
    def _trainers(self) -> list[CohortTrainer]:
        personal = self._work.personal
        own = [] if personal is None else [trainer for trainer, _ in personal.phases]
        return [self._trainer, *own]

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
        return self._trainer.trains_batched(context)

    def answer(
        self,
        cohort: Cohort,
        nodes: Sequence[int],
        context_of: Callable[[int], Context],
        *,
        batched: bool = False,
        number_of: Callable[[int], int] | None = None,
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
            Train them at once (:mod:`fedweight.clients.steps.batched`), where that
            gives what each alone gives.
        number_of : Callable[[int], int], optional
            A node's client, in a simulation that says no more of it.

        Returns
        -------
        Answers
            Replies in the order of the nodes; a client's failure is its reply's
            ``error``. The models are added up where the cohort allows it. Where the
            device has no room for so many at once,
            :attr:`~fedweight.messages.dispatch.Answers.were_too_many` says so, and
            nothing has changed.
        """
        answers = self._answer(cohort, nodes, context_of, number_of, batched=batched)
        if batched and answers.were_too_many:
            self.let_go()
            return answers
        if cohort.summed_by is not None:
            answers.sum_up(cohort)
        else:
            answers.hand_out(cohort.arrays)
        for reply in answers.replies:
            reply.is_finite()  # Look now, while the model is near.
        return answers

    def _answer(
        self,
        cohort: Cohort,
        nodes: Sequence[int],
        context_of: Callable[[int], Context],
        number_of: Callable[[int], int] | None = None,
        *,
        batched: bool = False,
    ) -> Answers:
        stage, cancelled = cohort.message_type, self._cancelled

        def number(node: int) -> int:
            return client_number(context_of(node))

        if stage == "train":
            self._trainer.prepare(cohort, number_of or number)

        def attempt(some: Sequence[int]) -> Answers:
            clients = self._client_tasks(cohort, some, context_of, number_of)
            at_once = batched and len(some) > 1
            stopped = self._cancelled.is_set  # Of now: see cancel().
            if stage == "train":
                return self._work.train(
                    cohort.content, clients, batched=at_once, cancelled=stopped
                )
            replies = self._work.evaluate(
                cohort.content, clients, batched=at_once, cancelled=stopped
            )
            return Answers(replies)

        try:
            return attempt(nodes)
        except (Exception, SystemExit) as error:  # On a device only it would end.
            if len(nodes) == 1 or cancelled.is_set():
                return Answers(
                    [
                        Reply(node, error=describe_failure(number(node), stage, error))
                        for node in nodes
                    ]
                )
            if batched and stage == "train" and is_too_large(error):
                why = str(error).split("\n", 1)[0] or type(error).__name__
                return Answers.too_many(nodes, why)
            # Whose fault it was shows when each is tried alone.
            alone: list[Reply] = []
            for node in nodes:
                answers = self._answer(cohort, [node], context_of, number_of)
                answers.hand_out(cohort.arrays)
                alone += answers.replies
            if all(reply.error is None for reply in alone):
                log.warning(
                    "%d clients cannot %s at once, each can alone: %s",
                    len(nodes),
                    stage,
                    error,
                )
            return Answers(alone)

    # What the app answers.

    def _train(self, message: Message, context: Context) -> Message:
        instructions = Instructions.of(config_of(message.content))
        client = self._client_task(context.node_id, instructions, context)
        cancelled = self._cancelled.is_set
        answers = self._work.train(
            opened(message.content), [client], batched=False, cancelled=cancelled
        )
        answers.hand_out()
        (reply,) = answers.replies
        return reply.message(message)

    def _evaluate(self, message: Message, context: Context) -> Message:
        instructions = Instructions.of(config_of(message.content))
        client = self._client_task(context.node_id, instructions, context)
        cancelled = self._cancelled.is_set
        (reply,) = self._work.evaluate(
            opened(message.content), [client], batched=False, cancelled=cancelled
        )
        return reply.message(message)

    def _query(self, message: Message, context: Context, name: str = "") -> Message:
        number = client_number(context)
        name = name or str(config_of(message.content).get(keys.QUERY))
        query = self._query_called(name)
        asked = ClientQuery(
            number,
            config_of(message.content),
            arrays_of(message.content),
            self.data(context).cast(np.float32, f"client {number}", self.task.name),
            self.num_classes,
            self.seed,
        )
        answer = query(asked)
        if not isinstance(answer, Answer):
            raise ClientError(
                f"query '{name}' must return an Answer, got {shown(answer)}"
            )
        return answer.message(message)

    def _take_base(self, message: Message, context: Context) -> Message:
        """Say whether the client has the server's frozen tensors, or take them."""
        return take_base(self._modules.base, message, context.state)

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

    def _client_tasks(
        self,
        cohort: Cohort,
        nodes: Sequence[int],
        context_of: Callable[[int], Context],
        number_of: Callable[[int], int] | None,
    ) -> Sequence[ClientTask]:
        """Return some clients of a cohort; as columns, where that can be."""
        configs: Iterable[ConfigRecord] = map(cohort.config, nodes)
        if not cohort.own:
            configs = repeat(cohort.config(nodes[0]), len(nodes))
        read: dict[int, Instructions] = {}
        told = []
        for config in configs:  # Most clients are told the same.
            if id(config) not in read:
                read[id(config)] = Instructions.of(config)
            told.append(read[id(config)])
        if number_of is not None and self.parts is not None:
            numbers = [*map(number_of, nodes)]
            parts = self.parts(numbers)
            if parts is not None:
                return ClientTasks(nodes, numbers, told, parts, context_of, self.data)
        return [
            self._client_task(node, one, context_of(node))
            for node, one in zip(nodes, told, strict=True)
        ]

    def _client_task(
        self, node: int, instructions: Instructions, context: Context
    ) -> ClientTask:
        return ClientTask(
            node, client_number(context), instructions, context, self.data(context)
        )
