"""A Flower ClientApp made of a model, data and an objective.

The same app trains many clients in a simulation, where a client is a number, and one
client on a real device, where its data lies at a path.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from .. import keys
from ..data.federated import ClientData
from ..errors import ClientError
from ..parameters import FlatModel, FlatModule, FlatRecord, flatten
from ..rng import Purpose, generator, torch_seed
from .objectives import Objective, Plain, Proximal
from .training import TrainingSettings, evaluate, train

# Where a client keeps what it needs in later rounds, in Flower's Context.state.
PERSONAL_MODEL = "personal-model"
PERSONAL_METRICS = "personal-metrics"


class TrainingApp(ClientApp):
    """A ClientApp that trains a PyTorch classifier on a client's own data.

    It answers ``train``, ``evaluate`` and ``query.label_counts`` messages, with the
    records and metrics that :mod:`fedweight.keys` names.

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
        mods: list[Any] | None = None,
    ) -> None:
        super().__init__(mods=mods)
        self.mods = list(mods or [])
        self.model = model
        self.data = data
        self.num_classes = num_classes
        self.objective = objective or Plain()
        self.settings = settings or TrainingSettings()
        self.seed = seed
        self.device = device
        self._forget()
        self.train()(self._train)
        self.evaluate()(self._evaluate)
        self.query("label_counts")(self._query)

    def _forget(self) -> None:
        """Start without prepared modules: each process makes its own."""
        self._idle: queue.SimpleQueue[FlatModule] = queue.SimpleQueue()
        self._cancelled = threading.Event()

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to this process."""
        own = ("_idle", "_cancelled")
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the settings."""
        self.__dict__.update(state)
        self._forget()

    @property
    def thread_safe(self) -> bool:
        """Whether several clients may train at once in threads of one process.

        Not with Flower mods, which may keep state; nor with a model that draws random
        numbers, whose stream PyTorch keeps for the whole process.
        """
        with self._module(0, 0) as module:
            stochastic = is_stochastic(module.module)
        return not self.mods and not stochastic and self.device == "cpu"

    def cancel(self) -> None:
        """Let clients that are training in other threads stop at their next step.

        Those that start afterwards are not concerned: the app can be used again.
        """
        cancelled, self._cancelled = self._cancelled, threading.Event()
        cancelled.set()

    # What the app answers.

    def _train(self, message: Message, context: Context) -> Message:
        config = _config(message)
        round = int(config.get(keys.ROUND, 1))  # type: ignore[arg-type]
        client = client_number(context)
        data = self.data(context)
        request = list(config.get(keys.REQUEST, ()))  # type: ignore[arg-type]
        metrics: dict[str, Any] = {}
        epochs = config.get(keys.LOCAL_EPOCHS, self.settings.epochs)
        cancelled = self._cancelled  # Of now: see cancel().
        with self._module(round, client) as module:
            start = flatten(_arrays(message), module.layout)
            if keys.LOSS_BEFORE in request:
                loss, _ = evaluate(module, start, data.train)
                metrics[keys.LOSS_BEFORE] = loss
            if keys.MINUS_ERROR in request:
                metrics[keys.MINUS_ERROR] = self._minus_error(
                    module, start, data, config, context
                )
            result = train(
                module,
                start,
                data.train,
                self._objective(config),
                self.settings,
                learning_rate=self.settings.learning_rate_in(round),
                epochs=int(epochs),  # type: ignore[arg-type]
                stream=generator(self.seed, Purpose.SHUFFLE, round, client),
                cancelled=cancelled.is_set,
            )
            if keys.ACCURACY_AFTER in request:
                _, accuracy = evaluate(module, result.model, data.train)
                metrics[keys.ACCURACY_AFTER] = accuracy
        record = FlatRecord(result.model)
        if keys.MINUS_ERROR in request:
            context.state[PERSONAL_MODEL] = record
        metrics |= {
            keys.NUM_EXAMPLES: len(data.train),
            keys.TRAIN_LOSS: result.loss,
            keys.TRAIN_ACCURACY: result.accuracy,
            keys.NUM_STEPS: result.num_steps,
        }
        content = RecordDict({keys.ARRAYS: record, keys.METRICS: MetricRecord(metrics)})
        if keys.LABEL_COUNTS in request:
            content[keys.PROFILE] = self._label_counts(data)
        return Message(content, reply_to=message)

    def _evaluate(self, message: Message, context: Context) -> Message:
        data = self.data(context)
        with self._module(0, 0) as module:
            model = flatten(_arrays(message), module.layout)
            loss, accuracy = evaluate(module, model, data.held_out)
        metrics = MetricRecord(
            {
                keys.NUM_EXAMPLES: len(data.held_out),
                keys.LOSS: loss,
                keys.ACCURACY: accuracy,
            }
        )
        return Message(RecordDict({keys.METRICS: metrics}), reply_to=message)

    def _query(self, message: Message, context: Context) -> Message:
        data = self.data(context)
        content = RecordDict(
            {
                keys.METRICS: MetricRecord({keys.NUM_EXAMPLES: len(data.train)}),
                keys.PROFILE: self._label_counts(data),
            }
        )
        return Message(content, reply_to=message)

    # Steps of the answers.

    @contextmanager
    def _module(self, round: int, client: int) -> Iterator[FlatModule]:
        """Lend a prepared module; one that draws random numbers gets its stream."""
        try:
            module = self._idle.get_nowait()
        except queue.Empty:
            module = FlatModule(self.model(), self.device)
        try:
            if is_stochastic(module.module):
                with torch.random.fork_rng():
                    torch.manual_seed(
                        torch_seed(self.seed, Purpose.DROPOUT, round, client)
                    )
                    yield module
            else:
                yield module
        finally:
            self._idle.put(module)

    def _objective(self, config: ConfigRecord) -> Objective:
        mu = config.get(keys.PROXIMAL_MU)
        if mu is None:
            return self.objective
        inner = self.objective
        if isinstance(inner, Proximal):
            inner = inner.inner
        return Proximal(float(mu), inner)  # type: ignore[arg-type]

    def _label_counts(self, data: ClientData) -> ConfigRecord:
        counts = np.bincount(data.train.y, minlength=self.num_classes)
        return ConfigRecord({keys.LABEL_COUNTS: [int(c) for c in counts]})

    def _minus_error(
        self,
        module: FlatModule,
        start: FlatModel,
        data: ClientData,
        config: ConfigRecord,
        context: Context,
    ) -> float:
        """Return FedCE's historical mean error of the model without this client.

        Meirui Jiang et al., "Fair Federated Medical Image Segmentation via Client
        Contribution Estimation", CVPR 2023. The minus model is ``(w - c w_own) / (1 -
        c)`` with the own model of the last round; its accuracy is measured on the
        held-out part. A first round counts as accuracy 0, and stays in the mean. It
        is one where the server tells no coefficient: it has none of this client.
        """
        past = context.state.get(PERSONAL_METRICS, MetricRecord())
        scores = [float(s) for s in past.get("minus-scores", [])]  # type: ignore[union-attr]
        own = context.state.get(PERSONAL_MODEL)
        told = config.get(keys.COEFFICIENT)
        if own is None or told is None:
            scores = [0.0]
        else:
            before = flatten(own, module.layout)  # type: ignore[arg-type]
            c = min(float(told), 0.999)  # type: ignore[arg-type]
            minus = start.with_parameters(
                (start.parameters - c * before.parameters) / (1 - c)
            )
            minus.buffers = (start.buffers - c * before.buffers) / (1 - c)
            part = data.held_out if len(data.held_out) else data.train
            _, accuracy = evaluate(module, minus, part)
            scores.append(accuracy)
        context.state[PERSONAL_METRICS] = MetricRecord({"minus-scores": scores})
        return 1 - sum(scores) / len(scores)


def client_number(context: Context) -> int:
    """Return which client a context stands for: its partition, or its node."""
    return int(context.node_config.get("partition-id", context.node_id))


def is_stochastic(module: nn.Module) -> bool:
    """Tell whether a module draws random numbers in training, as dropout does."""
    return any(
        isinstance(m, nn.modules.dropout._DropoutNd) or getattr(m, "dropout", 0)
        for m in module.modules()
    )


def _config(message: Message) -> ConfigRecord:
    records = message.content.config_records
    return records.get(keys.CONFIG) or next(iter(records.values()), ConfigRecord())


def _arrays(message: Message) -> Any:
    records = message.content.array_records
    if len(records) != 1:
        raise ClientError(
            f"the message has {len(records)} array records; exactly one, the global "
            "model, is expected."
        )
    return next(iter(records.values()))
