"""The Flower strategy that all of ours share.

A method derives from :class:`WeightingStrategy` and answers one question,
``weights(round)``; or ``aggregate(round)`` where a weighted sum is not enough. What
it needs from the clients it names in ``request``. Sampling, bad replies, buffers, the
server's optimiser and the record of every round are done here, once.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from ..core.errors import AggregationError, ConfigurationError, check_range
from ..core.layout import FlatModel, is_finite
from ..core.local_models import LocalModels, middle
from ..core.records import ClientRecord, RoundRecord, Status
from ..core.rng import Purpose, generator
from ..core.texts import (
    TRACEBACK_LENGTH,
    cause,
    clients_called,
    one_of,
    own_name,
    plain,
    plain_lines,
    shown,
    without_numbers,
)
from ..core.threads import one_thread
from ..core.updates import Accumulate, Updates
from ..messages import keys
from ..messages.arrays import FlatRecord, flatten, layout_of
from ..messages.dispatch import Cohort, Replies, Reply, held_models
from ..server.admission import (
    Unfit,
    check_asked,
    check_model,
    check_sender,
    check_trained,
    far_longer,
    size_of,
    update_norm,
)
from ..server.known_errors import KnownErrors
from ..server.reported import (
    AcceptedReply,
    OwnMetrics,
    mean_metrics,
    recorded_metrics,
    sort_metrics,
)
from .round import TIMES_MEDIAN, Round
from .server_optimizers import ServerOptimizer
from .weights import cap, effective_clients

log = logging.getLogger("fedweight")

# A model with larger values is no model to start training from: a few layers multiply
# them beyond what float32 holds.
LARGEST_VALUE = 2.0**32


MetricsFn = Callable[[list[RecordDict], str], MetricRecord]


class StrategyArguments(TypedDict, total=False):
    """The keyword arguments that every strategy takes besides its method's own.

    The first ten are those of Flower's ``FedAvg`` and mean the same.
    """

    fraction_train: float
    fraction_evaluate: float
    min_train_nodes: int
    min_evaluate_nodes: int
    min_available_nodes: int
    weighted_by_key: str
    arrayrecord_key: str
    configrecord_key: str
    train_metrics_aggr_fn: MetricsFn | None
    evaluate_metrics_aggr_fn: MetricsFn | None
    seed: int
    min_replies: int
    stragglers: float
    server_optimizer: ServerOptimizer | None
    accumulate: Accumulate | None
    buffers: Collection[str] | None
    frozen: Collection[str] | None
    max_share: float
    max_update_norm: float | None
    threads: int | None


class WeightingStrategy(Strategy):
    """Sample clients, weigh their updates, make the next global model.

    Parameters
    ----------
    fraction_train, fraction_evaluate : float
        Share of the clients that train, and that evaluate, in a round; in [0, 1]. At 0
        nobody does.
    min_train_nodes, min_evaluate_nodes, min_available_nodes : int
        0 or more; at least so many train, evaluate, and must be connected first.
    weighted_by_key : str
        The metric that says how much data a client has; ``num-examples``.
    arrayrecord_key, configrecord_key : str
        Names of the records in a message.
    train_metrics_aggr_fn, evaluate_metrics_aggr_fn : callable, optional
        How the clients' metrics become the round's; by default their mean, weighted
        by data size.
    seed : int
        0 or more; seed of the sampling of clients. Use the run's.
    min_replies : int
        1 or more; with fewer good replies than this the round fails and the global
        model stays.
    stragglers : float
        Share of each round's clients that have time for only a part of their local
        epochs, in [0, 1). The seed alone decides who, so every strategy meets the
        same stragglers; needs the train config to say ``local-epochs`` of 2 or more.
    server_optimizer : ServerOptimizer, optional
        Turns the aggregated update into the step of the global model; by default the
        update is the step.
    accumulate : {"float64", "float32"}, optional
        What sums over clients and parameters are made in; by default what the model
        is in. See :class:`~fedweight.core.updates.StackedUpdates` for the precision.
    buffers : Collection[str], optional
        Names of floating tensors that change without being trained (running
        statistics). Known BatchNorm names are recognised by default.
    frozen : Collection[str], optional
        Names of floating tensors that nobody trains: they keep their bits, and no
        distance sees them. Where the first model comes as a
        :class:`~fedweight.messages.arrays.FlatRecord` it says so itself, of the buffers
        too.
        Whatever is told, a tensor that no client of a round changed keeps its bits.
    max_share : float
        In (0, 1]; no client's weight is more than this share of the weights' sum. What
        is cut goes to the others in proportion. With ``K`` clients and ``1 / K`` or
        less the weights are uniform; 1 limits nothing.
    max_update_norm : float, optional
        Above 0; a client whose update is longer (Euclidean, trained parameters) is
        rejected.
    threads : int, optional
        1 or more: threads for the arithmetic over the updates; by default as many as
        there are cores where there is enough to do. It never changes the result.

    Attributes
    ----------
    history : list[RoundRecord]
        The weight log: every round with every client that was drawn.
    """

    request: tuple[str, ...] = ()
    """What the method asks the clients for, beyond what every reply reports."""

    needs: ClassVar[tuple[str, ...]] = ()
    """What of the server's the constructor takes: "model", "proxy"."""

    caps_weights: ClassVar[bool] = False
    """Whether an :meth:`aggregate` of the class's own observes ``max_share``."""

    def __init__(self, **arguments: Unpack[StrategyArguments]) -> None:
        unknown = sorted(set(arguments) - set(StrategyArguments.__annotations__))
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no argument '{unknown[0]}'; there are "
                f"{', '.join(StrategyArguments.__annotations__)} besides its own."
            )
        self.fraction_train = float(arguments.get("fraction_train", 1.0))
        self.fraction_evaluate = float(arguments.get("fraction_evaluate", 1.0))
        self.min_train_nodes = int(arguments.get("min_train_nodes", 2))
        self.min_evaluate_nodes = int(arguments.get("min_evaluate_nodes", 2))
        self.min_available_nodes = int(arguments.get("min_available_nodes", 2))
        self.weighted_by_key: str = arguments.get("weighted_by_key", keys.NUM_EXAMPLES)
        self.arrayrecord_key = arguments.get("arrayrecord_key", keys.ARRAYS)
        self.configrecord_key = arguments.get("configrecord_key", keys.CONFIG)
        self.train_metrics_aggr_fn = arguments.get("train_metrics_aggr_fn")
        self.evaluate_metrics_aggr_fn = arguments.get("evaluate_metrics_aggr_fn")
        self.seed = int(arguments.get("seed", 0))
        self.min_replies = int(arguments.get("min_replies", 1))
        self.stragglers = float(arguments.get("stragglers", 0.0))
        self.server_optimizer = arguments.get("server_optimizer")
        self.accumulate: Accumulate | None = arguments.get("accumulate")
        self.buffers = arguments.get("buffers")
        self.frozen = arguments.get("frozen")
        self.max_share = float(arguments.get("max_share", 1.0))
        self.max_update_norm = arguments.get("max_update_norm")
        self.threads = arguments.get("threads")
        check_range("fraction_train", self.fraction_train, 0, 1)
        check_range("fraction_evaluate", self.fraction_evaluate, 0, 1)
        check_range("stragglers", self.stragglers, 0, 1, high_open=True)
        check_range("min_replies", self.min_replies, 1)
        check_range("min_train_nodes", self.min_train_nodes, 0)
        check_range("min_evaluate_nodes", self.min_evaluate_nodes, 0)
        check_range("min_available_nodes", self.min_available_nodes, 0)
        check_range("max_share", self.max_share, 0, 1, low_open=True)
        own = type(self).aggregate is not WeightingStrategy.aggregate
        if not own and type(self).weights is WeightingStrategy.weights:
            raise ConfigurationError(
                f"{type(self).__name__} must define weights(round) or aggregate(round)."
            )
        if self.max_share < 1 and own and not self.caps_weights:
            raise ConfigurationError(
                f"max_share is {self.max_share:g}, but {type(self).__name__} makes the "
                "model in an aggregate(round) of its own, which does not use it. Leave "
                "it out, or define weights(round) instead."
            )
        if self.max_update_norm is not None:
            check_range("max_update_norm", self.max_update_norm, 0, low_open=True)
        if self.threads is not None:
            check_range("threads", self.threads, 1)
        if isinstance(self.request, str):
            raise ConfigurationError(
                f"{type(self).__name__}.request must be a tuple of names, got "
                f"{self.request!r}. Write ({self.request!r},)."
            )
        check_range("seed", self.seed, 0)
        self.history: list[RoundRecord] = []
        self._model: FlatModel | None = None
        self._asked: dict[int, _Asked] = {}
        self._not_asked: list[int] = []
        self._without_examples: set[int] = set()
        self._errors = KnownErrors()
        self._own_metrics = OwnMetrics()
        self._name_of: Callable[[int], str] = str
        self._cohort: Cohort | None = None
        self._outermost = False

    # What a method answers.

    def weights(self, round: Round) -> Tensor:
        """Return how much each client counts in this round.

        Parameters
        ----------
        round : Round
            The clients and their updates; K is 1 or more.

        Returns
        -------
        Tensor
            Shape ``[K]``, or ``[K, T]`` for weights per named tensor. Finite; whether
            they sum to one is the method's own law.
        """
        raise NotImplementedError

    def aggregate(self, round: Round) -> Tensor:
        """Return the next global parameters, ``[P]``.

        By default ``w + sum_k weights_k * (w_k - w)``, which is ``sum_k weights_k *
        w_k`` where the weights sum to one. A method that overrides this logs the
        weights that it used: ``round.log("weight", weights)``.
        """
        weights = cap(_as_weights(self, self.weights(round), round), self.max_share)
        round.log("weight", weights if weights.ndim == 1 else weights.mean(1))
        step = round.updates.combine(weights)
        return step.add_(round.model.parameters)

    def train_config(self, round: int) -> dict[str, float | int]:
        """Return what the method tells every client alike; nothing by default."""
        return {}

    def client_config(self, round: int, client: int) -> dict[str, float | int]:
        """Return what the method tells one client; nothing by default."""
        return {}

    def asks(self, round: int, client: int) -> tuple[str, ...]:
        """Return what the method asks one client for; :attr:`request` by default."""
        return self.request

    def receive(
        self, client: int, metrics: Mapping[str, Any], profile: Mapping[str, Any]
    ) -> None:
        """Look at one client's reply before the round is aggregated.

        Clients come in the order of their numbers, whatever order they answered in.
        Raise :class:`AggregationError` to reject the reply, with the reason. Whatever
        else this raises rejects it, too: a client may have sent anything.
        """

    def screen(self, clients: Sequence[int]) -> Mapping[int, str]:
        """Return why to reject some of the clients whose replies were received.

        For what shows only where replies are compared with each other. Nobody by
        default.
        """
        return {}

    def aggregate_buffers(self, round: Round, buffers: Updates) -> Tensor:
        """Return the next global buffers, ``[B]``; by default averaged by data size.

        ``buffers`` are the clients' buffers, as :attr:`Round.updates` are their
        parameters. Asked for only where the model has some.
        """
        before = round.model.buffers.double()
        return before + buffers.combine(round.size_weights)

    def keeps(self, round: int, client: int, straggler: bool) -> bool:
        """Return whether a client's good reply takes part in the aggregation."""
        return True

    @property
    def weighs_by_size(self) -> bool:
        """Whether the rule is the mean by data size, and nothing else.

        Then a grid of ours may add the local models up as they come and keep none.
        """
        return False

    def state(self) -> dict[str, Any]:
        """Return what the method carries from round to round, as plain values.

        A strategy that is given this by :meth:`load_state` goes on as this one would.
        """
        optimizer = self.server_optimizer
        own = {} if optimizer is None else {"server-optimizer": optimizer.state()}
        return own | {"without-examples": sorted(self._without_examples)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self._without_examples = set(state.get("without-examples", ()))
        if self.server_optimizer is not None:
            self.server_optimizer.load_state(state["server-optimizer"])

    # Flower's hooks.

    def start(self, *arguments: Any, **named: Any) -> Result:
        """Run the rounds, as Flower's ``Strategy.start`` does."""
        # A wrapper runs the rounds itself, and may look into the replies.
        self._outermost = True
        try:
            return super().start(*arguments, **named)
        finally:
            self._outermost = False

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose the round's clients and write them their messages."""
        layout = self._model.layout if self._model else None
        if layout is None or len(arrays) != len(layout.entries):
            layout = layout_of(arrays, self.buffers, self.frozen)
        self._model = flatten(arrays, layout)
        # It counts as failed until it is aggregated: a wrapper may never get there.
        unfinished = RoundRecord(server_round, "failed", "its replies did not arrive")
        self.history.append(unfinished)
        nodes = self._sample(
            grid,
            self.fraction_train,
            self.min_train_nodes,
            Purpose.SAMPLING,
            server_round,
        )
        config[keys.ROUND] = server_round
        for key, value in self.train_config(server_round).items():
            config[key] = value
        epochs = self._straggler_epochs(server_round, len(nodes), config)
        self._asked, self._not_asked = {}, []
        empty = self._empty([client for client, _ in nodes], grid)
        own = {}
        # Clients that are told the same share one record.
        records: dict[tuple[tuple[str, Any], ...], ConfigRecord] = {}
        for (client, node), part in zip(nodes, epochs, strict=True):
            if client in empty:
                self._not_asked.append(client)
                continue
            asks = self.asks(server_round, client)
            self._asked[node] = _Asked(client, part is not None, asks)
            told: dict[str, Any] = dict(self.client_config(server_round, client))
            if part is not None:
                told[keys.LOCAL_EPOCHS] = part
            if asks:
                told[keys.REQUEST] = asks
            if told:
                same = tuple(told.items())
                if same not in records:
                    told |= _request(config, asks)
                    records[same] = ConfigRecord({**dict(config), **told})
                own[node] = records[same]
        # As vectors, so that clients of ours answer in this layout.
        content = RecordDict(
            {
                self.arrayrecord_key: _flat(arrays, self._model),
                self.configrecord_key: config,
            }
        )
        sums = (
            self._outermost
            and self.weighs_by_size
            and self.weighted_by_key == keys.NUM_EXAMPLES  # always there, and finite
            and self.accumulate is None
            and self.max_share == 1
            and self.max_update_norm is None
            and getattr(grid, "sums_models", False)
        )
        left_out = [
            node
            for node, asked in self._asked.items()
            if sums and not self.keeps(server_round, asked.client, asked.straggler)
        ]
        self._cohort = Cohort(
            content,
            list(self._asked),
            MessageType.TRAIN,
            own,
            self.configrecord_key,
            summed_by=self.weighted_by_key if sums else None,
            left_out=left_out,
        )
        return self._cohort

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Make the next global model of the good replies; record all of them."""
        with one_thread():
            result = self._aggregate_train(server_round, replies)
        ours = type(self).aggregate_train is WeightingStrategy.aggregate_train
        if ours and self._outermost and isinstance(replies, Replies):
            replies.forget()
        return result

    def _aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        if self._model is None:
            raise AggregationError(
                "aggregate_train was called before configure_train: the global model "
                "is not known. Let Strategy.start run both."
            )
        record = self.history[-1]
        if not (self._asked or self._not_asked) and self.fraction_train == 0:
            record.status, record.reason = "ok", ""
            return None, None
        accepted, models = self._sort(server_round, replies, record)
        chosen = self._own_metrics.limit(record.clients)
        accepted = self._short_enough(accepted, models, record)
        self._errors.tell(server_round, record.clients)
        if len(accepted) < self.min_replies:
            return self._fail(record, self._too_few(accepted, record))
        saved = self.state()
        try:
            round = self._round(server_round, accepted, models)
            parameters = _as_parameters(self, self.aggregate(round), round)
            round.keep_still(parameters)
            self._check_weights(round)
            self._check_values(round, parameters)
            if self.server_optimizer is not None:
                before = self._model.parameters.to(parameters.dtype)
                parameters = before + self.server_optimizer.step(parameters - before)
                self._check_values(round, parameters)
            model = self._next_model(parameters, round, accepted, models)
        except AggregationError as error:
            self.load_state(saved)  # A failed round leaves the method as it was.
            return self._fail(record, str(error))
        metrics = self._metrics(accepted, chosen, self.train_metrics_aggr_fn)
        record.status, record.reason = "ok", ""
        record.metrics |= recorded_metrics(metrics)
        self._record(record, round)
        record.metrics |= round.logged
        return FlatRecord(model), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose the clients that evaluate the global model on their held-out data."""
        self._asked, self._not_asked = {}, []
        if self.fraction_evaluate == 0:
            return []
        nodes = self._sample(
            grid,
            self.fraction_evaluate,
            self.min_evaluate_nodes,
            Purpose.EVALUATION,
            server_round,
        )
        config[keys.ROUND] = server_round
        content = RecordDict(
            {self.arrayrecord_key: arrays, self.configrecord_key: config}
        )
        empty = self._empty([client for client, _ in nodes], grid)
        self._asked = {
            node: _Asked(client, False, ())
            for client, node in nodes
            if client not in empty
        }
        self._cohort = Cohort(
            content,
            list(self._asked),
            MessageType.EVALUATE,
            config_key=self.configrecord_key,
        )
        return self._cohort

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the clients' evaluation metrics by data size; record them."""
        record = self.history[-1] if self.history else RoundRecord(server_round)
        entries: dict[int, ClientRecord] = {}
        for row in record.clients:  # Of a client that replied twice, the first.
            entries.setdefault(row.client, row)
        nbytes = self._model.layout.num_bytes if self._model else 0
        answered = set()
        accepted: list[AcceptedReply] = []
        bad = []
        with_own = []
        anybody = not self._asked
        for client, sent, reply in self._read(replies)[0]:
            entry = entries.get(client)
            if entry is None:
                entry = entries[client] = self._entry(client, "evaluated")
                record.clients.append(entry)
            entry.bytes_down += nbytes if sent else 0
            try:
                if isinstance(reply, AggregationError):
                    raise AggregationError(str(reply))
                if reply.error is not None:
                    raise AggregationError(reply.error)
                check_sender(sent is not None or anybody, client in answered)
                size = size_of(reply.metrics, self.weighted_by_key)
            except AggregationError as error:
                note = f"evaluation failed: {_reason(error)}"
                entry.reason = f"{entry.reason}; {note}" if entry.reason else note
                bad.append(self._entry(client, "failed", note))
                continue
            answered.add(client)
            known, own = sort_metrics(reply.metrics)
            accepted.append(AcceptedReply(client, reply, size, known, own))
            entry.metrics |= {f"evaluate-{name}": known[name] for name in known}
            if own:
                evaluated = ClientRecord(client, "evaluated", own_metrics=own)
                with_own.append((entry, evaluated))
        record.clients.sort(key=lambda c: c.client)
        self._errors.tell(server_round, bad)
        chosen = self._own_metrics.limit(evaluated for _, evaluated in with_own)
        for entry, evaluated in with_own:
            own = evaluated.own_metrics
            named = {f"evaluate-{name}": own[name] for name in own}
            entry.own_metrics = {**entry.own_metrics, **named}
        if not accepted:
            return None
        result = self._metrics(accepted, chosen, self.evaluate_metrics_aggr_fn)
        record.metrics |= recorded_metrics(result, "evaluate-")
        return result

    def summary(self) -> None:
        """Log the method and its settings."""
        log.info("%s: %s", type(self).__name__, _settings(self))

    # Steps of the hooks.

    def _sample(
        self, grid: Grid, fraction: float, least: int, purpose: Purpose, round: int
    ) -> list[tuple[int, int]]:
        """Draw ``(client, node)`` pairs, in the order of the clients' numbers."""
        if fraction == 0:
            return []
        number = getattr(grid, "client_of", int)
        self._name_of = getattr(grid, "name_of", None) or str
        complete = getattr(grid, "complete", False)
        nodes = grid.get_node_ids()
        # A simulation's range is in the clients' order, and is not written out.
        if not (complete and isinstance(nodes, range)):
            nodes = list(nodes)
        while len(nodes) < max(self.min_available_nodes, least):
            if complete:
                raise ConfigurationError(
                    f"the strategy waits for "
                    f"{max(self.min_available_nodes, least)} clients (min_train_nodes, "
                    f"min_evaluate_nodes, min_available_nodes), but the simulation "
                    f"has {len(nodes)}. Lower those or simulate more clients."
                )
            log.info("waiting for clients: %d connected", len(nodes))
            time.sleep(1)  # Flower's Grid offers no event for a node that connects.
            nodes = list(grid.get_node_ids())
        size = max(int(len(nodes) * fraction), least)
        if isinstance(nodes, list):
            nodes.sort(key=number)
        if size < len(nodes):
            stream = generator(self.seed, purpose, round)
            chosen = np.sort(stream.choice(len(nodes), size, replace=False))
            nodes = [nodes[i] for i in chosen.tolist()]
        return [(number(node), node) for node in nodes]

    def _empty(self, clients: Sequence[int], grid: Grid) -> set[int]:
        """Return which clients are known to have no examples.

        A simulation knows; of others, those whose reply has said so.
        """
        sizes_of = getattr(grid, "sizes_of", None)
        sizes = None if sizes_of is None else sizes_of(clients)
        empty = self._without_examples.intersection(clients)
        if sizes is not None:
            empty |= {c for c, size in zip(clients, sizes, strict=True) if size == 0}
        return empty

    def _straggler_epochs(
        self, round: int, cohort: int, config: ConfigRecord
    ) -> list[int | None]:
        """Return the epochs of each straggler, ``None`` for all other clients.

        Tian Li et al., "Federated Optimization in Heterogeneous Networks", MLSys
        2020: all but ``round(K * (1 - share))`` clients do U{1, ..., E - 1} epochs.
        """
        epochs: list[int | None] = [None] * cohort
        if self.stragglers == 0:
            return epochs
        full = config.get(keys.LOCAL_EPOCHS)
        if not isinstance(full, int) or full < 2:
            raise ConfigurationError(
                f"stragglers = {self.stragglers:g} needs local epochs of 2 or more "
                f"(the train config's '{keys.LOCAL_EPOCHS}'), got {full!r}: a "
                "straggler does fewer epochs than the others, but at least one."
            )
        stream = generator(self.seed, Purpose.STRAGGLERS, round)
        slow = cohort - math.floor(cohort * (1 - self.stragglers) + 0.5)
        for k in stream.choice(cohort, slow, replace=False):
            epochs[k] = int(stream.integers(1, full))
        return epochs

    def _read(
        self, replies: Iterable[Message]
    ) -> tuple[
        list[tuple[int, _Asked | None, Reply | AggregationError]], LocalModels | None
    ]:
        """Return who was asked what and answered what, by the clients' numbers.

        In that order nothing depends on who answered first. What cannot be read comes
        as the error that says why. An error reply that the SuperLink writes for a
        lost client carries the SuperLink's node; the message it answers tells whose.
        The models come with it where the replies do not hold them.
        """
        asked, self._asked = self._asked, {}
        cohort, self._cohort = self._cohort, None
        plain, models = None, None
        if isinstance(replies, Replies) and replies.plain is not None:
            plain, models = replies.plain, replies.models
        read: list[tuple[int, _Asked | None, Reply | AggregationError]] = []
        if plain is not None:
            for answer in plain:
                sent = asked.get(answer.node)
                read.append((sent.client if sent else answer.node, sent, answer))
        else:
            assert self._model is not None
            for message in replies:
                node = message.metadata.src_node_id
                if node not in asked and cohort is not None:
                    answers = message.metadata.reply_to_message_id
                    node = cohort.node_of(answers) or node
                sent = asked.get(node)
                reply: Reply | AggregationError
                try:
                    reply = Reply.of(message, self._model.layout, self.arrayrecord_key)
                except AggregationError as error:
                    reply = error
                read.append((sent.client if sent else node, sent, reply))
        known = {client for client, _, _ in read}
        for sent in asked.values():
            if sent.client not in known:
                read.append((sent.client, sent, Unfit("missing", "no reply in time")))
        return sorted(read, key=lambda row: row[0]), models

    def _sort(
        self, round: int, replies: Iterable[Message], record: RoundRecord
    ) -> tuple[list[AcceptedReply], LocalModels]:
        """Tell good replies from bad ones, in the order of the clients' numbers."""
        assert self._model is not None
        nbytes = self._model.layout.num_bytes
        anybody = not (self._asked or self._not_asked)
        entries = {
            c: self._entry(c, "dropped", keys.NO_EXAMPLES) for c in self._not_asked
        }
        record.clients += entries.values()
        accepted: dict[int, AcceptedReply] = {}
        lengths: dict[int, float] = {}
        answered: set[int] = set()
        read, models = self._read(replies)
        arrived = models is None  # As messages, perhaps from another machine.
        for client, sent, reply in read:
            entry = self._entry(client, "ok")
            record.clients.append(entry)
            entry.bytes_down = nbytes if sent else 0
            try:
                check_sender(sent is not None or anybody, client in answered)
                answered.add(client)
                if isinstance(reply, AggregationError):
                    raise reply
                if reply.model is not None or reply.summed:
                    entry.bytes_up = nbytes
                sent = sent or _Asked(client, False, self.request)
                accepted[client] = self._admit(round, sent, reply, entry)
                entries[client] = entry
                if arrived and isinstance(reply.model, FlatModel):
                    lengths[client] = update_norm(reply.model, self._model)
            except Unfit as error:
                entry.status, entry.reason = error.status, _reason(error)
            except AggregationError as error:
                entry.status, entry.reason = "rejected", _reason(error)
            if entry.reason == keys.NO_EXAMPLES:
                self._without_examples.add(client)
        for client, reason in self._screened(list(accepted)).items():
            entries[client].status, entries[client].reason = "rejected", reason
            del accepted[client]
        for client, times in far_longer(lengths).items():
            entry = entries[client]
            entry.metrics = {**entry.metrics, TIMES_MEDIAN: times}
            log.warning(
                "round %d: the update of %s is %.3g times as long as the median; "
                "max_update_norm would reject it",
                round,
                clients_called([client], self._name_of),
                times,
            )
        record.clients.sort(key=lambda entry: entry.client)
        if models is None:
            models = held_models([one.reply for one in accepted.values()])
        return list(accepted.values()), models

    def _admit(
        self, round: int, sent: _Asked, reply: Reply, entry: ClientRecord
    ) -> AcceptedReply:
        """Check a reply, and record what it reports.

        Raises
        ------
        AggregationError
            With the reason, if it is not to be aggregated.
        """
        assert self._model is not None
        if reply.error is not None:
            raise Unfit("missing" if reply.lost else "failed", reply.error)
        known, own = sort_metrics(reply.metrics)
        entry.metrics, entry.own_metrics = known, own
        size = size_of(reply.metrics, self.weighted_by_key)
        check_trained(size, known)
        check_model(reply, self.arrayrecord_key)
        check_asked(reply, sent.asks)
        self._received(sent.client, reply)
        if not self.keeps(round, sent.client, sent.straggler):
            raise Unfit("dropped", keys.STRAGGLER)
        return AcceptedReply(sent.client, reply, size, known, own)

    def _received(self, client: int, reply: Reply) -> None:
        """Let the method look at a reply; what it cannot take rejects the reply."""
        try:
            self.receive(client, reply.metrics, reply.profile)
        except AggregationError:
            raise
        except Exception as error:
            log.debug("client %d", client, exc_info=True)
            raise AggregationError(
                f"{type(self).__name__}.receive cannot take it: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _screened(self, clients: list[int]) -> Mapping[int, str]:
        """Let the method look at all replies; those that it names are rejected."""
        try:
            odd = self.screen(clients) or {}
            return {client: str(odd[client]) for client in clients if client in odd}
        except Exception as error:
            log.debug("screen", exc_info=True)
            why = (
                f"{type(self).__name__}.screen cannot take the replies: "
                f"{type(error).__name__}: {error}"
            )
            return dict.fromkeys(clients, why)

    def _entry(self, client: int, status: Status, reason: str = "") -> ClientRecord:
        if self._name_of is str:
            return ClientRecord(client, status, reason)
        name = own_name(client, self._name_of(client))
        return ClientRecord(client, status, reason, name=name)

    def _short_enough(
        self, accepted: list[AcceptedReply], models: LocalModels, record: RoundRecord
    ) -> list[AcceptedReply]:
        """Return the clients whose updates are not too long, if there is a limit."""
        if self.max_update_norm is None or not accepted:
            return accepted
        entries = {c.client: c for c in record.clients if c.status == "ok"}
        norms = self._updates(accepted, models).norms()
        for one, norm in zip(accepted, norms.tolist(), strict=True):
            entry = entries[one.client]
            if not norm <= self.max_update_norm:
                entry.status = "rejected"
                entry.reason = (
                    f"its update has norm {norm:.4g}, above max_update_norm "
                    f"{self.max_update_norm:g}"
                )
        return [one for one in accepted if entries[one.client].status == "ok"]

    def _too_few(self, accepted: list[AcceptedReply], record: RoundRecord) -> str:
        if all(c.reason == keys.NO_EXAMPLES for c in record.clients) and record.clients:
            return f"none of the {len(record.clients)} clients drawn has examples"
        asked = {c.client for c in record.clients if c.bytes_down}
        return (
            f"{len(accepted)} good replies of {len(asked)} clients asked, "
            f"min_replies is {self.min_replies}"
        )

    def _round(
        self, number: int, accepted: list[AcceptedReply], models: LocalModels
    ) -> Round:
        assert self._model is not None
        return Round(
            number=number,
            clients=tuple(one.client for one in accepted),
            model=self._model,
            updates=self._updates(accepted, models),
            num_examples=torch.tensor(
                [one.num_examples for one in accepted], dtype=torch.float64
            ),
            metrics=tuple(one.reply.metrics for one in accepted),
            profiles=tuple(one.reply.profile for one in accepted),
        )

    def _updates(self, accepted: list[AcceptedReply], models: LocalModels) -> Updates:
        assert self._model is not None
        return models.updates(
            [one.reply.node for one in accepted],
            self._model,
            accumulate=self.accumulate,
            threads=self.threads,
        )

    def _check_weights(self, round: Round) -> None:
        """Refuse weights that are not finite, all 0, or not one for each client."""
        name = type(self).__name__
        weights = round.logged_clients.get("weight")
        if weights is None:
            raise ConfigurationError(
                f"{name}.aggregate must record the weights it used: "
                'round.log("weight", weights), one for each client.'
            )
        values = weights.tolist()
        if len(values) != round.num_clients or not all(map(math.isfinite, values)):
            raise AggregationError(
                f"{name} gave weights {_shortened(weights)} for {round.num_clients} "
                "clients; they must be finite, one each"
            )
        if not any(values):
            raise AggregationError(f"{name} gave every client the weight 0")

    def _check_values(self, round: Round, parameters: Tensor) -> None:
        """Refuse a model from which training cannot start."""
        largest = _largest(parameters)
        if not math.isfinite(largest):
            raise AggregationError("the aggregated model has NaN or infinite values")
        if largest > LARGEST_VALUE and largest > _largest(round.model.parameters):
            raise AggregationError(
                f"the aggregated model has values of up to {largest:.3g}, from which "
                f"training cannot start (at most {LARGEST_VALUE:.3g})"
                f"{self._longest(round)}"
            )

    def _longest(self, round: Round) -> str:
        """Say whose update is the longest, where the updates are at hand."""
        try:
            norms = round.updates.norms()
        except AggregationError:  # They were added up as they came.
            return ""
        k = int(norms.argmax())
        whose = clients_called([round.clients[k]], self._name_of)
        return (
            f"; {whose} has the longest update, of norm {float(norms[k]):.3g} where "
            f"the median is {float(norms.median()):.3g}"
        )

    def _record(self, record: RoundRecord, round: Round) -> None:
        """Write down the weights and what else the method logged."""
        entries = {c.client: c for c in record.clients if c.status == "ok"}
        for name, values in round.logged_clients.items():
            for client, value in zip(round.clients, values.tolist(), strict=True):
                if name == "weight":
                    entries[client].weight = value
                else:
                    entries[client].metrics[name] = value
        record.metrics["effective-clients"] = effective_clients(
            round.logged_clients["weight"]
        )

    def _next_model(
        self,
        parameters: Tensor,
        round: Round,
        accepted: list[AcceptedReply],
        models: LocalModels,
    ) -> FlatModel:
        """Round to the model's dtype; average its buffers, take its integers."""
        assert self._model is not None
        model = self._model.with_parameters(parameters)
        nodes = [one.reply.node for one in accepted]
        if model.buffers.numel():
            rows = models.buffers(nodes, self._model)
            model.buffers = self.aggregate_buffers(round, rows).to(model.buffers.dtype)
            if not is_finite(model.buffers):
                raise AggregationError("the aggregated buffers are not finite")
        if model.integers:
            model.integers = middle(models.integers(nodes))
        return model

    def _fail(self, record: RoundRecord, reason: str) -> tuple[None, None]:
        """Keep the global model, and say so."""
        record.status, record.reason = "failed", reason
        alike: dict[str, list[str]] = {}
        for entry in record.clients:
            if entry.status != "ok":
                why = cause(entry.reason)
                alike.setdefault(without_numbers(why), []).append(why)
        common = sorted(alike.values(), key=len, reverse=True)[:3]
        causes = "; ".join(f"{len(some)} x {one_of(some)}" for some in common)
        log.error(
            "round %d failed, the global model is kept: %s%s",
            record.number,
            plain(reason),
            f" ({causes})" if causes else "",
        )
        return None, None

    def _metrics(
        self,
        accepted: list[AcceptedReply],
        chosen: Collection[str],
        custom: MetricsFn | None,
    ) -> MetricRecord:
        """Make the round's metrics of the clients'.

        A function of the user's is given what clients report, which may be anything:
        an error of it costs the round its metrics, and not the run.
        """
        if custom is None:
            return mean_metrics(accepted, self.weighted_by_key, chosen)
        contents = [
            RecordDict({keys.METRICS: MetricRecord(dict(one.reply.metrics))})
            for one in accepted
        ]
        try:
            made = custom(contents, self.weighted_by_key)
            if not isinstance(made, MetricRecord):
                raise TypeError(f"it returned {shown(made)}, and not a MetricRecord")
            return made
        except Exception as error:
            name = getattr(custom, "__name__", str(custom))
            log.exception(
                "a round has no metrics: %s raised %s", name, type(error).__name__
            )
            return MetricRecord()


def _flat(arrays: ArrayRecord, model: FlatModel) -> ArrayRecord:
    """Return arrays as a record that says how they are laid out."""
    known = isinstance(arrays, FlatRecord) and arrays.flat is model
    return arrays if known else FlatRecord(model)


def _largest(values: Tensor) -> float:
    """Return the largest absolute value; NaN if there is one, 0 if there is none."""
    if not values.numel():
        return 0.0
    low, high = torch.aminmax(values)
    return max(-float(low), float(high))


def _shortened(values: Tensor, most: int = 5) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values.tolist()[:most])
    return f"[{shown}, ...]" if len(values) > most else f"[{shown}]"


def _as_parameters(strategy: WeightingStrategy, made: Any, round: Round) -> Tensor:
    """Return what ``aggregate(round)`` gave, if it is a vector of parameters."""
    shape = list(round.model.parameters.shape)
    if isinstance(made, Tensor) and made.is_floating_point():
        if list(made.shape) == shape:
            return made
        got = f"shape {list(made.shape)}"
    else:
        got = str(made.dtype) if isinstance(made, Tensor) else type(made).__name__
    raise ConfigurationError(
        f"{type(strategy).__name__}.aggregate must return the next global parameters, "
        f"a floating tensor of shape {shape}, got {got}."
    )


def _as_weights(strategy: WeightingStrategy, weights: Any, round: Round) -> Tensor:
    """Return what ``weights(round)`` gave as a tensor, if it is one weight each."""
    try:
        tensor = torch.as_tensor(weights)
        if tensor.is_complex():
            raise TypeError("complex numbers are no weights")
        tensor = tensor.double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"{type(strategy).__name__}.weights must return numbers, got "
            f"{type(weights).__name__}: {error}."
        ) from None
    clients, tensors = round.num_clients, round.updates.num_tensors
    if tensor.shape not in ((clients,), (clients, tensors)):
        raise ConfigurationError(
            f"{type(strategy).__name__}.weights must return one weight for each of "
            f"the {clients} clients, shape [{clients}] (or [{clients}, {tensors}], one "
            f"for each named tensor), got shape {list(tensor.shape)}."
        )
    return tensor


class _Asked(NamedTuple):
    """A client that was asked, by its node."""

    client: int
    straggler: bool
    asks: tuple[str, ...]


def _reason(error: AggregationError) -> str:
    return plain_lines(str(error), TRACEBACK_LENGTH)


def _request(config: ConfigRecord, asks: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the config's own request, if it has one, with the method's added."""
    if not asks:
        return {}
    already = config.get(keys.REQUEST)
    names = [str(n) for n in already] if isinstance(already, list) else []
    return {keys.REQUEST: [*names, *(n for n in asks if n not in names)]}


def _settings(strategy: WeightingStrategy) -> str:
    public = {k: v for k, v in vars(strategy).items() if not k.startswith("_")}
    public.pop("history")
    return ", ".join(f"{name}={value!r}" for name, value in public.items())
