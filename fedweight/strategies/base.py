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
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
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

from .. import keys
from ..cohort import Cohort, Replies, Reply, held_models
from ..errors import AggregationError, ConfigurationError, check_range
from ..local_models import LocalModels
from ..parameters import FlatModel, FlatRecord, Layout, flatten, is_finite
from ..rng import Purpose, generator
from ..threads import one_thread
from ..updates import Accumulate, Updates
from .round import ClientRecord, Round, RoundRecord
from .server_optimizers import ServerOptimizer

log = logging.getLogger("fedweight")

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
    threads: int | None


class WeightingStrategy(Strategy):
    """Sample clients, weigh their updates, make the next global model.

    Parameters
    ----------
    fraction_train, fraction_evaluate : float
        Share of the clients that train, and that evaluate, in a round; in [0, 1].
    min_train_nodes, min_evaluate_nodes, min_available_nodes : int
        At least so many train, evaluate, and must be connected first.
    weighted_by_key : str
        The metric that says how much data a client has; ``num-examples``.
    arrayrecord_key, configrecord_key : str
        Names of the records in a message.
    train_metrics_aggr_fn, evaluate_metrics_aggr_fn : callable, optional
        How the clients' metrics become the round's; by default their mean, weighted
        by data size.
    seed : int
        Seed of the sampling of clients; use the run's.
    min_replies : int
        With fewer good replies than this the round fails and the global model stays.
    stragglers : float
        Share of each round's clients that have time for only a part of their local
        epochs, in [0, 1). The seed alone decides who, so every strategy meets the
        same stragglers; needs the train config to say ``local-epochs`` of 2 or more.
    server_optimizer : ServerOptimizer, optional
        Turns the aggregated update into the step of the global model; by default the
        update is the step.
    accumulate : {"float64", "float32"}, optional
        What sums over clients and parameters are made in; by default what the model
        is in. See :class:`~fedweight.updates.StackedUpdates` for the precision.
    buffers : Collection[str], optional
        Names of floating tensors that are not trained (running statistics). Known
        BatchNorm names are recognised by default.
    threads : int, optional
        Threads for the arithmetic over the updates; by default as many as there are
        cores where there is enough to do. It never changes the result.

    Attributes
    ----------
    history : list[RoundRecord]
        The weight log: every round with every client that was asked.
    """

    request: tuple[str, ...] = ()
    """What the method asks the clients for, beyond what every reply reports."""

    needs: ClassVar[tuple[str, ...]] = ()
    """What of the server's the constructor takes: "model", "proxy"."""

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
        self.threads = arguments.get("threads")
        check_range("fraction_train", self.fraction_train, 0, 1)
        check_range("fraction_evaluate", self.fraction_evaluate, 0, 1)
        check_range("stragglers", self.stragglers, 0, 1, high_open=True)
        check_range("min_replies", self.min_replies, 1)
        check_range("min_train_nodes", self.min_train_nodes, 0)
        check_range("min_evaluate_nodes", self.min_evaluate_nodes, 0)
        check_range("min_available_nodes", self.min_available_nodes, 0)
        if self.threads is not None:
            check_range("threads", self.threads, 1)
        check_range("seed", self.seed, 0)
        self.history: list[RoundRecord] = []
        self._model: FlatModel | None = None
        self._asked: dict[int, _Asked] = {}
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
        raise NotImplementedError(
            f"{type(self).__name__} must define weights(round) or aggregate(round)."
        )

    def aggregate(self, round: Round) -> Tensor:
        """Return the next global parameters, ``[P]``.

        By default ``w + sum_k weights_k * (w_k - w)``, which is ``sum_k weights_k *
        w_k`` where the weights sum to one. A method that overrides this logs the
        weights that it used: ``round.log("weight", weights)``.
        """
        weights = _as_weights(self, self.weights(round), round)
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
        Raise :class:`AggregationError` to reject the reply, with the reason.
        """

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
        return {} if optimizer is None else {"server-optimizer": optimizer.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
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
            layout = Layout.of_record(arrays, self.buffers)
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
        self._asked = {}
        own = {}
        # Clients that are told the same share one record.
        records: dict[tuple[tuple[str, Any], ...], ConfigRecord] = {}
        for (client, node), part in zip(nodes, epochs, strict=True):
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
        content = RecordDict(
            {self.arrayrecord_key: arrays, self.configrecord_key: config}
        )
        sums = (
            self._outermost
            and self.weighs_by_size
            and self.weighted_by_key == keys.NUM_EXAMPLES  # always there, and finite
            and self.accumulate is None
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
        if not self._asked and self.fraction_train == 0:
            record.status, record.reason = "ok", ""
            return None, None
        good, models = self._sort(server_round, replies, record)
        if len(good) < self.min_replies:
            return self._fail(
                record,
                f"{len(good)} good replies of {len(record.clients)} clients asked, "
                f"min_replies is {self.min_replies}",
            )
        saved = self.state()
        try:
            round = self._round(server_round, good, models)
            parameters = self.aggregate(round)
            self._check(round, parameters)
            if self.server_optimizer is not None:
                before = self._model.parameters.to(parameters.dtype)
                parameters = before + self.server_optimizer.step(parameters - before)
                self._check(round, parameters)
        except AggregationError as error:
            self.load_state(saved)  # A failed round leaves the method as it was.
            return self._fail(record, str(error))
        self._record(record, round)
        record.status, record.reason = "ok", ""
        metrics = self._mean_metrics(good, self.train_metrics_aggr_fn)
        record.metrics.update(
            {k: float(v) for k, v in metrics.items() if not isinstance(v, list)}
        )
        record.metrics.update(round.logged)
        return FlatRecord(self._next_model(parameters, round, good, models)), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose the clients that evaluate the global model on their held-out data."""
        self._asked = {}
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
        self._asked = {node: _Asked(client, False, ()) for client, node in nodes}
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
        entries = {c.client: c for c in record.clients}
        answered = set()
        good = []
        anybody = not self._asked
        for client, sent, reply in self._read(replies)[0]:
            entry = entries.get(client)
            if entry is None:
                entry = entries[client] = ClientRecord(client, "evaluated")
                record.clients.append(entry)
            try:
                if isinstance(reply, AggregationError):
                    raise AggregationError(str(reply))
                if reply.error is not None:
                    raise AggregationError(reply.error)
                if sent is None and not anybody:
                    raise AggregationError("it was not asked")
                if client in answered:
                    raise AggregationError("it replied twice")
                size = self._size(reply)
            except AggregationError as error:
                note = f"evaluation failed: {error}"
                entry.reason = f"{entry.reason}; {note}" if entry.reason else note
                log.warning("round %d: client %d: %s", server_round, client, note)
                continue
            answered.add(client)
            good.append(_Good(client, reply, size))
            for name, value in reply.metrics.items():
                if not isinstance(value, list):
                    entry.metrics[f"evaluate-{name}"] = float(value)
        record.clients.sort(key=lambda c: c.client)
        if not good:
            return None
        result = self._mean_metrics(good, self.evaluate_metrics_aggr_fn)
        for name, value in result.items():
            if not isinstance(value, list):
                record.metrics[f"evaluate-{name}"] = float(value)
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
        complete = getattr(grid, "complete", False)
        nodes = grid.get_node_ids()
        # A simulation's range is in the clients' order: a million cost nothing.
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
                read.append((sent.client, sent, MISSING))
        return sorted(read, key=lambda row: row[0]), models

    def _sort(
        self, round: int, replies: Iterable[Message], record: RoundRecord
    ) -> tuple[list[_Good], LocalModels]:
        """Tell good replies from bad ones, in the order of the clients' numbers."""
        assert self._model is not None
        nbytes = self._model.layout.num_bytes
        anybody = not self._asked
        good: dict[int, _Good] = {}
        answered = set()
        read, models = self._read(replies)
        for client, sent, reply in read:
            entry = ClientRecord(client, "ok", bytes_down=nbytes if sent else 0)
            record.clients.append(entry)
            if reply is MISSING:
                entry.status, entry.reason = "missing", str(reply)
            elif isinstance(reply, Reply) and reply.error is not None:
                entry.status, entry.reason = "failed", reply.error
            elif client in answered:
                entry.status, entry.reason = "rejected", "it replied twice"
            elif sent is None and not anybody:
                entry.status, entry.reason = "rejected", "it was not asked"
            else:
                try:
                    if isinstance(reply, AggregationError):
                        raise AggregationError(str(reply))
                    fit = self._fit(client, reply, sent.asks if sent else self.request)
                    entry.metrics = fit.scalars()
                    entry.bytes_up = nbytes
                    if self.keeps(round, client, sent is not None and sent.straggler):
                        good[client] = fit
                    else:
                        entry.status, entry.reason = "dropped", "straggler"
                except AggregationError as error:
                    entry.status, entry.reason = "rejected", str(error)
                    if isinstance(reply, Reply) and self._has_no_data(reply):
                        # What it was asked for cannot be measured without data.
                        entry.status = "dropped"
            answered.add(client)
            if entry.status in ("rejected", "failed", "missing"):
                log.warning(
                    "round %d: client %d %s: %s",
                    round,
                    client,
                    entry.status,
                    entry.reason,
                )
        fit_replies = list(good.values())
        if models is None:
            models = held_models([one.reply for one in fit_replies])
        return fit_replies, models

    def _fit(self, client: int, reply: Reply, asks: tuple[str, ...]) -> _Good:
        """Check a reply; raise ``AggregationError`` with the reason if it is unfit."""
        size = self._size(reply)
        if reply.model is None and not reply.summed:
            raise AggregationError(f"its reply has no '{self.arrayrecord_key}'")
        if not reply.is_finite():
            raise AggregationError("its model has NaN or infinite values")
        for name in asks:
            if name not in reply.metrics and name not in reply.profile:
                raise AggregationError(f"it was asked for '{name}', which is missing")
            value = reply.metrics.get(name, 0.0)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise AggregationError(f"its '{name}' is {value!r}, not a number")
        self.receive(client, reply.metrics, reply.profile)
        return _Good(client, reply, size)

    def _has_no_data(self, reply: Reply) -> bool:
        return reply.metrics.get(self.weighted_by_key) == 0

    def _size(self, reply: Reply) -> float:
        """Return how much data a client has; raise if it does not say."""
        size = reply.metrics.get(self.weighted_by_key)
        if not isinstance(size, int | float) or not 0 <= size < math.inf:
            raise AggregationError(
                f"its '{self.weighted_by_key}' must be a number of 0 or more, "
                f"got {size!r}"
            )
        return float(size)

    def _round(self, number: int, good: list[_Good], models: LocalModels) -> Round:
        assert self._model is not None
        updates = models.updates(
            [one.reply.node for one in good],
            self._model,
            accumulate=self.accumulate,
            threads=self.threads,
        )
        return Round(
            number=number,
            clients=tuple(one.client for one in good),
            model=self._model,
            updates=updates,
            num_examples=torch.tensor(
                [one.num_examples for one in good], dtype=torch.float64
            ),
            metrics=tuple(one.reply.metrics for one in good),
            profiles=tuple(one.reply.profile for one in good),
        )

    def _check(self, round: Round, parameters: Tensor) -> None:
        """Refuse weights and models that are not finite or do not fit."""
        weights = round.logged_clients.get("weight")
        if weights is None:
            raise ConfigurationError(
                f"{type(self).__name__}.aggregate must record the weights it used: "
                'round.log("weight", weights), one for each client.'
            )
        if len(weights) != round.num_clients or not weights.isfinite().all():
            raise AggregationError(
                f"{type(self).__name__} gave weights {weights.tolist()} for "
                f"{round.num_clients} clients; they must be finite, one each"
            )
        if not is_finite(parameters):
            raise AggregationError("the aggregated model has NaN or infinite values")

    def _record(self, record: RoundRecord, round: Round) -> None:
        """Write down the weights and what else the method logged."""
        entries = {c.client: c for c in record.clients if c.status == "ok"}
        for name, values in round.logged_clients.items():
            for client, value in zip(round.clients, values.tolist(), strict=True):
                if name == "weight":
                    entries[client].weight = value
                else:
                    entries[client].metrics[name] = value
        weights = round.logged_clients["weight"]
        # Kish's effective sample size: how many equally weighted clients count as much.
        squares = float(weights.square().sum())
        total = float(weights.sum())
        record.metrics["effective-clients"] = total**2 / squares if squares else 0.0

    def _next_model(
        self, parameters: Tensor, round: Round, good: list[_Good], models: LocalModels
    ) -> FlatModel:
        """Round to the model's dtype; average its buffers, copy its integers."""
        assert self._model is not None
        model = self._model.with_parameters(parameters)
        nodes = [one.reply.node for one in good]
        if model.buffers.numel():
            rows = models.buffers(nodes, self._model)
            model.buffers = self.aggregate_buffers(round, rows).to(model.buffers.dtype)
        if model.integers:
            model.integers = models.integers(nodes[0])
        return model

    def _fail(self, record: RoundRecord, reason: str) -> tuple[None, None]:
        """Keep the global model, and say so."""
        record.status, record.reason = "failed", reason
        counts = Counter(_cause(c.reason) for c in record.clients if c.status != "ok")
        causes = "; ".join(f"{n} x {why}" for why, n in counts.most_common(3))
        log.error(
            "round %d failed, the global model is kept: %s%s",
            record.number,
            reason,
            f" ({causes})" if causes else "",
        )
        return None, None

    def _mean_metrics(
        self, good: list[_Good], custom: MetricsFn | None
    ) -> MetricRecord:
        """Average the clients' metrics by data size; NaN means a client has none."""
        if custom is not None:
            contents = [
                RecordDict({keys.METRICS: MetricRecord(dict(one.reply.metrics))})
                for one in good
            ]
            return custom(contents, self.weighted_by_key)
        metrics = [one.reply.metrics for one in good]
        names = [
            name
            for name in metrics[0]
            if name != self.weighted_by_key
            and all(isinstance(m.get(name), int | float) for m in metrics)
        ]
        values = np.array([[m[name] for m in metrics] for name in names], np.float64)
        values = values.reshape(len(names), len(good))
        known = ~np.isnan(values)
        p = known * np.array([one.num_examples for one in good])
        some = p.any(1, keepdims=True)
        p = np.where(some, p, known)  # Alike, if those who know have no data.
        sums, totals = (np.where(known, values, 0) * p).sum(1), p.sum(1)
        pairs = zip(names, sums.tolist(), totals.tolist(), strict=True)
        return MetricRecord({name: s / total for name, s, total in pairs if total})


def _as_weights(strategy: WeightingStrategy, weights: Any, round: Round) -> Tensor:
    """Return what ``weights(round)`` gave as a tensor, if it is one weight each."""
    try:
        tensor = torch.as_tensor(weights, dtype=torch.float64)
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


def check_fraction(metrics: Mapping[str, Any], name: str) -> None:
    """Raise ``AggregationError`` unless a client reports a number in [0, 1]."""
    value = metrics.get(name)
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise AggregationError(f"its '{name}' must be in [0, 1], got {value!r}")


MISSING = AggregationError("no reply in time")


class _Asked(NamedTuple):
    """A client that was asked, by its node."""

    client: int
    straggler: bool
    asks: tuple[str, ...]


class _Good(NamedTuple):
    """A reply that is fit to be used."""

    client: int
    reply: Reply
    num_examples: float

    def scalars(self) -> dict[str, float]:
        return {
            name: float(value)
            for name, value in self.reply.metrics.items()
            if not isinstance(value, list)
        }


def _cause(reason: str) -> str:
    """Return the first line of a reason, without whose it was."""
    line = reason.strip().split("\n", 1)[0]
    return line.split(", ", 1)[-1] if line.startswith("client ") else line


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
