"""The Flower strategy that all of ours share.

A method derives from :class:`WeightingStrategy` and answers one question,
``weights(round)``; or ``aggregate(round)`` where a weighted sum is not enough. What
it needs from the clients it names in ``request``. Sampling, bad replies, buffers, the
server's optimiser and the record of every round are done here, once.
"""

from __future__ import annotations

import logging
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Set,
)
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Annotated, Any, ClassVar, NamedTuple, dataclass_transform

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
from pydantic import Field
from torch import Tensor

from ..clients.probes import Probe
from ..core.errors import AggregationError, ConfigurationError
from ..core.layout import FlatModel, is_finite
from ..core.local_models import LocalModels, middle
from ..core.options import GIVEN, InFile, checked_fields
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
from ..server.sampling import known_empty, sample, straggler_epochs
from .checks import (
    as_parameters,
    as_weights,
    asked_names,
    check_values,
    check_weights,
    told_columns,
)
from .round import TIMES_MEDIAN, Report, Round, Selection
from .server_optimizers import ServerOptimizer
from .weights import cap, effective_clients

log = logging.getLogger("fedweight")

MetricsFn = Callable[[list[RecordDict], str], MetricRecord]

# A number for all clients, or one for each.
Told = float | int | Sequence[float | int | None] | Tensor


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(field,)
)
@checked_fields
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
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

    Notes
    -----
    A class that derives from this one declares its options as annotated fields, such as
    ``tolerance: Annotated[float, Field(gt=0)] = 2.0``; it becomes a frozen dataclass
    whose values are checked. What changes from round to round is :attr:`state`.
    """

    request: ClassVar[tuple[str, ...]] = ()
    """What the method asks the clients for, beyond what every reply reports."""

    probes: ClassVar[Mapping[str, Probe]] = {}
    """Functions of the method's own that clients measure with, by name; see
    :mod:`fedweight.clients.probes`."""

    needs: ClassVar[tuple[str, ...]] = ()
    """What of the server's the method takes as fields: "model", "proxy"."""

    caps_weights: ClassVar[bool] = False
    """Whether an :meth:`aggregate` of the class's own observes ``max_share``."""

    fraction_train: Annotated[float, Field(ge=0, le=1)] = 1.0
    fraction_evaluate: Annotated[float, Field(ge=0, le=1)] = 1.0
    min_train_nodes: Annotated[int, Field(ge=0), InFile(1)] = 2
    min_evaluate_nodes: Annotated[int, Field(ge=0), InFile(1)] = 2
    min_available_nodes: Annotated[int, Field(ge=0), InFile(1)] = 2
    weighted_by_key: Annotated[str, GIVEN] = keys.NUM_EXAMPLES
    arrayrecord_key: Annotated[str, GIVEN] = keys.ARRAYS
    configrecord_key: Annotated[str, GIVEN] = keys.CONFIG
    train_metrics_aggr_fn: Annotated[MetricsFn | None, GIVEN] = None
    evaluate_metrics_aggr_fn: Annotated[MetricsFn | None, GIVEN] = None
    seed: Annotated[int, Field(ge=0), GIVEN] = 0
    min_replies: Annotated[int, Field(ge=1)] = 1
    stragglers: Annotated[float, Field(ge=0, lt=1)] = 0.0
    server_optimizer: Annotated[ServerOptimizer | None, GIVEN] = None
    accumulate: Accumulate | None = None
    buffers: Annotated[Collection[str] | None, GIVEN] = None
    frozen: Annotated[Collection[str] | None, GIVEN] = None
    max_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_update_norm: Annotated[float, Field(gt=0)] | None = None
    threads: Annotated[Annotated[int, Field(ge=1)] | None, GIVEN] = None

    _now: _Now = field(init=False)

    def __init_subclass__(cls, **named: Any) -> None:
        """Make the class a frozen dataclass whose fields are checked."""
        super().__init_subclass__(**named)
        if isinstance(cls.request, str):
            raise ConfigurationError(
                f"{cls.__name__}.request must be a tuple of names, got "
                f"{cls.request!r}. Write ({cls.request!r},)."
            )
        own, inherited = vars(cls), {one.name for one in fields(cls)}
        for name in inherited & own.keys() - own.get("__annotations__", {}).keys():
            raise ConfigurationError(
                f"{cls.__name__}.{name} is an option: another default needs its type, "
                f"as in `{name}: {type(own[name]).__name__} = {own[name]!r}`."
            )
        checked_fields(dataclass(frozen=True, kw_only=True, eq=False, repr=False)(cls))

    def __post_init__(self) -> None:
        """Refuse what defines no rule, or has options that the rule does not use."""
        cls = type(self)
        own = cls.aggregate is not WeightingStrategy.aggregate
        if not own and cls.weights is WeightingStrategy.weights:
            raise ConfigurationError(
                f"{cls.__name__} must define weights(round) or aggregate(round)."
            )
        if self.max_share < 1 and own and not self.caps_weights:
            raise ConfigurationError(
                f"max_share is {self.max_share:g}, but {cls.__name__} makes the "
                "model in an aggregate(round) of its own, which does not use it. Leave "
                "it out, or define weights(round) instead."
            )
        # All that changes; everything else is fixed.
        object.__setattr__(self, "_now", _Now(method=self.begin()))

    def __repr__(self) -> str:
        """Return the options that are not the defaults."""
        options = (one for one in fields(self) if one.init)
        told = (
            f"{one.name}={getattr(self, one.name)!r}"
            for one in options
            if getattr(self, one.name) is not one.default
        )
        return f"{type(self).__name__}({', '.join(told)})"

    @property
    def history(self) -> list[RoundRecord]:
        """The weight log: every round with every client that was drawn."""
        return self._now.history

    @property
    def state(self) -> dict[str, Any]:
        """What is carried from round to round: numbers, texts, arrays, lists, dicts.

        It is replaced whole when a round ends, and a failed round leaves it as it was.
        A strategy that is given it by :meth:`restore` goes on as this one would.
        """
        now = self._now
        return {
            "method": now.method,
            "server-optimizer": now.optimizer,
            "without-examples": sorted(now.without_examples),
            "own-metrics": now.own_metrics.names,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the :attr:`state` of a strategy with the same options.

        Raises
        ------
        ConfigurationError
            If it is not such a state.
        """
        expected = self.state.keys()
        given: Any = state  # Of a user's, or of a file.
        if not isinstance(given, Mapping) or given.keys() != expected:
            raise ConfigurationError(
                f"{type(self).__name__}.restore takes what `state` of such a strategy "
                f"gives, with the keys {', '.join(expected)}; got {shown(state)}."
            )
        self._now.method = state["method"]
        self._now.optimizer = state["server-optimizer"]
        self._now.without_examples = set(state["without-examples"])
        self._now.own_metrics.restore(state["own-metrics"])

    # What a method answers.

    def begin(self) -> Any:
        """Return the method's state before the first round; ``None`` without memory."""
        return None

    def weights(self, round: Round) -> Tensor | tuple[Tensor, Any]:
        """Return how much each client counts in this round.

        Parameters
        ----------
        round : Round
            The clients and their updates; K is 1 or more.

        Returns
        -------
        Tensor, or Tensor and state
            Shape ``[K]``, or ``[K, T]`` for weights per named tensor. Finite; whether
            they sum to one is the method's own law. A method with memory returns its
            next state too; the last one is ``round.state``.
        """
        raise NotImplementedError

    def aggregate(self, round: Round) -> Tensor | tuple[Tensor, Any]:
        """Return the next global parameters, ``[P]``, and the next state if any.

        By default ``w + sum_k weights_k * (w_k - w)``, which is ``sum_k weights_k *
        w_k`` where the weights sum to one. A method that overrides this logs the
        weights that it used: ``round.log("weight", weights)``.
        """
        given = self.weights(round)
        remembers = _has_state(given)
        weights = given[0] if remembers else given
        weights = cap(as_weights(self, weights, round), self.max_share)
        round.log("weight", weights if weights.ndim == 1 else weights.mean(1))
        model = round.updates.combine(weights).add_(round.model.parameters)
        return (model, given[1]) if remembers else model

    def tell(self, selection: Selection) -> Mapping[str, Told]:
        """Return what the method tells the clients of a round; nothing by default.

        By name a number for all, or a number for each (``None``: that one is told
        nothing).
        """
        return {}

    def ask(self, selection: Selection) -> Mapping[str, bool | Sequence[bool]]:
        """Return what the method asks the clients for; :attr:`request` by default.

        By name whether all are asked, or whether each is.
        """
        return dict.fromkeys(self.request, True)

    def admit(self, report: Report) -> None:
        """Look at one client's reply before the round is aggregated.

        Raise :class:`AggregationError` to reject the reply, with the reason. Whatever
        else this raises rejects it, too: a client may have sent anything.
        """

    def screen(self, reports: Sequence[Report], state: Any) -> Mapping[int, str]:
        """Return why to reject some of the clients whose replies were admitted.

        For what shows only where replies are compared with each other. They come in
        the order of the clients' numbers. Nobody by default.
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

    # Flower's hooks.

    def start(self, *arguments: Any, **named: Any) -> Result:
        """Run the rounds, as Flower's ``Strategy.start`` does."""
        # A wrapper runs the rounds itself, and may look into the replies.
        self._now.outermost = True
        try:
            return super().start(*arguments, **named)
        finally:
            self._now.outermost = False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Tell, in a ``with`` block, that nobody else reads replies or old rounds.

        Then local models may be added up as they come, and :attr:`history` holds the
        last round only.
        """
        self._now.outermost = self._now.forgets = True
        try:
            yield
        finally:
            self._now.outermost = self._now.forgets = False

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose the round's clients and write them their messages."""
        layout = self._now.model.layout if self._now.model else None
        if layout is None or len(arrays) != len(layout.entries):
            layout = layout_of(arrays, self.buffers, self.frozen)
        self._now.model = flatten(arrays, layout)
        # It counts as failed until it is aggregated: a wrapper may never get there.
        unfinished = RoundRecord(server_round, "failed", "its replies did not arrive")
        if self._now.forgets:
            self._now.history.clear()
        self._now.history.append(unfinished)
        nodes = self._drawn(
            grid,
            self.fraction_train,
            self.min_train_nodes,
            Purpose.SAMPLING,
            server_round,
        )
        config[keys.ROUND] = server_round
        epochs = straggler_epochs(
            self.seed, server_round, self.stragglers, len(nodes), config
        )
        self._now.asked = {}
        empty = known_empty(
            grid, [client for client, _ in nodes], self._now.without_examples
        )
        chosen = [
            (client, node, part)
            for (client, node), part in zip(nodes, epochs, strict=True)
            if client not in empty
        ]
        self._now.not_asked = [client for client, _ in nodes if client in empty]
        self._now.leave_out(empty)
        clients = tuple(client for client, _, _ in chosen)
        selection = Selection(
            server_round, clients, self._now.method, self._now.population
        )
        shared, columns = told_columns(self, selection)
        for key, value in shared.items():
            config[key] = value
        asks = asked_names(self, selection)
        own = {}
        # Clients that are told the same share one record.
        records: dict[tuple[tuple[str, Any], ...], ConfigRecord] = {}
        for k, (client, node, part) in enumerate(chosen):
            self._now.asked[node] = _Asked(client, part is not None, asks[k])
            told: dict[str, Any] = {
                name: column[k]
                for name, column in columns.items()
                if column[k] is not None
            }
            if part is not None:
                told[keys.LOCAL_EPOCHS] = part
            if asks[k]:
                told[keys.REQUEST] = asks[k]
            if told:
                same = tuple(told.items())
                if same not in records:
                    told |= _request(config, asks[k])
                    records[same] = ConfigRecord({**dict(config), **told})
                own[node] = records[same]
        # As vectors, so that clients of ours answer in this layout.
        content = RecordDict(
            {
                self.arrayrecord_key: _flat(arrays, self._now.model),
                self.configrecord_key: config,
            }
        )
        sums = (
            self._now.outermost
            and self.weighs_by_size
            and self.weighted_by_key == keys.NUM_EXAMPLES  # always there, and finite
            and self.accumulate is None
            and self.max_share == 1
            and self.max_update_norm is None
            and getattr(grid, "sums_models", False)
        )
        left_out = [
            node
            for node, asked in self._now.asked.items()
            if sums and not self.keeps(server_round, asked.client, asked.straggler)
        ]
        self._now.cohort = Cohort(
            content,
            list(self._now.asked),
            MessageType.TRAIN,
            own,
            self.configrecord_key,
            summed_by=self.weighted_by_key if sums else None,
            left_out=left_out,
        )
        return self._now.cohort

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Make the next global model of the good replies; record all of them."""
        with one_thread():
            result = self._aggregate_train(server_round, replies)
        ours = type(self).aggregate_train is WeightingStrategy.aggregate_train
        if ours and self._now.outermost and isinstance(replies, Replies):
            replies.forget()
        return result

    def _aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        if self._now.model is None:
            raise AggregationError(
                "aggregate_train was called before configure_train: the global model "
                "is not known. Let Strategy.start run both."
            )
        record = self.history[-1]
        if not (self._now.asked or self._now.not_asked) and self.fraction_train == 0:
            record.status, record.reason = "ok", ""
            return None, None
        accepted, models = self._sort(server_round, replies, record)
        chosen = self._now.own_metrics.limit(record.clients)
        accepted = self._short_enough(accepted, models, record)
        self._now.errors.tell(server_round, record.clients)
        if len(accepted) < self.min_replies:
            return self._fail(record, self._too_few(accepted, record))
        optimizer = self._now.optimizer
        try:
            round = self._round(server_round, accepted, models)
            made, state = _parted(self.aggregate(round), round.state)
            parameters = as_parameters(self, made, round)
            round.keep_still(parameters)
            check_weights(self, round)
            check_values(round, parameters, self._now.name_of)
            if self.server_optimizer is not None:
                before = self._now.model.parameters.to(parameters.dtype)
                step, optimizer = self.server_optimizer.step(
                    parameters - before, optimizer
                )
                parameters = before + step
                check_values(round, parameters, self._now.name_of)
            model = self._next_model(parameters, round, accepted, models)
        except AggregationError as error:
            return self._fail(record, str(error))
        # Only now: a failed round leaves all that is carried as it was.
        self._now.method, self._now.optimizer = state, optimizer
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
        self._now.asked, self._now.not_asked = {}, []
        if self.fraction_evaluate == 0:
            return []
        nodes = self._drawn(
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
        empty = known_empty(
            grid, [client for client, _ in nodes], self._now.without_examples
        )
        self._now.asked = {
            node: _Asked(client, False, ())
            for client, node in nodes
            if client not in empty
        }
        self._now.cohort = Cohort(
            content,
            list(self._now.asked),
            MessageType.EVALUATE,
            config_key=self.configrecord_key,
        )
        return self._now.cohort

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the clients' evaluation metrics by data size; record them."""
        record = self.history[-1] if self.history else RoundRecord(server_round)
        entries: dict[int, ClientRecord] = {}
        for row in record.clients:  # Of a client that replied twice, the first.
            entries.setdefault(row.client, row)
        nbytes = self._now.model.layout.num_bytes if self._now.model else 0
        answered = set()
        accepted: list[AcceptedReply] = []
        bad = []
        with_own = []
        anybody = not self._now.asked
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
        self._now.errors.tell(server_round, bad)
        chosen = self._now.own_metrics.limit(evaluated for _, evaluated in with_own)
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
        log.info("%r", self)

    # Steps of the hooks.

    def _drawn(
        self, grid: Grid, fraction: float, least: int, purpose: Purpose, round: int
    ) -> list[tuple[int, int]]:
        """Draw ``(client, node)`` pairs, in the order of the clients' numbers."""
        self._now.name_of = getattr(grid, "name_of", None) or str
        stream = partial(generator, self.seed, purpose, round)
        drawn, self._now.population = sample(
            grid,
            stream,
            fraction,
            least,
            self.min_available_nodes,
            self._now.without_examples,
        )
        return drawn

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
        asked, self._now.asked = self._now.asked, {}
        cohort, self._now.cohort = self._now.cohort, None
        plain, models = None, None
        if isinstance(replies, Replies) and replies.plain is not None:
            plain, models = replies.plain, replies.models
        read: list[tuple[int, _Asked | None, Reply | AggregationError]] = []
        if plain is not None:
            for answer in plain:
                sent = asked.get(answer.node)
                read.append((sent.client if sent else answer.node, sent, answer))
        else:
            assert self._now.model is not None
            for message in replies:
                node = message.metadata.src_node_id
                if node not in asked and cohort is not None:
                    answers = message.metadata.reply_to_message_id
                    node = cohort.node_of(answers) or node
                sent = asked.get(node)
                reply: Reply | AggregationError
                try:
                    reply = Reply.of(
                        message, self._now.model.layout, self.arrayrecord_key
                    )
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
        assert self._now.model is not None
        nbytes = self._now.model.layout.num_bytes
        anybody = not (self._now.asked or self._now.not_asked)
        entries = {
            c: self._entry(c, "dropped", keys.NO_EXAMPLES) for c in self._now.not_asked
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
                    lengths[client] = update_norm(reply.model, self._now.model)
            except Unfit as error:
                entry.status, entry.reason = error.status, _reason(error)
            except AggregationError as error:
                entry.status, entry.reason = "rejected", _reason(error)
            if entry.reason == keys.NO_EXAMPLES:
                self._now.leave_out({client})
        for client, reason in self._screened(accepted).items():
            entries[client].status, entries[client].reason = "rejected", reason
            del accepted[client]
        for client, times in far_longer(lengths).items():
            entry = entries[client]
            entry.metrics = {**entry.metrics, TIMES_MEDIAN: times}
            log.warning(
                "round %d: the update of %s is %.3g times as long as the median; "
                "max_update_norm would reject it",
                round,
                clients_called([client], self._now.name_of),
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
        assert self._now.model is not None
        if reply.error is not None:
            raise Unfit("missing" if reply.lost else "failed", reply.error)
        known, own = sort_metrics(reply.metrics)
        entry.metrics, entry.own_metrics = known, own
        size = size_of(reply.metrics, self.weighted_by_key)
        check_trained(size, known)
        check_model(reply, self.arrayrecord_key)
        check_asked(reply, sent.asks)
        self._looked_at(Report(sent.client, reply.metrics, reply.profile))
        if not self.keeps(round, sent.client, sent.straggler):
            raise Unfit("dropped", keys.STRAGGLER)
        return AcceptedReply(sent.client, reply, size, known, own)

    def _looked_at(self, report: Report) -> None:
        """Let the method look at a reply; what it cannot take rejects the reply."""
        try:
            self.admit(report)
        except AggregationError:
            raise
        except Exception as error:
            log.debug("client %d", report.client, exc_info=True)
            raise AggregationError(
                f"{type(self).__name__}.admit cannot take it: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _screened(self, accepted: Mapping[int, AcceptedReply]) -> Mapping[int, str]:
        """Let the method look at all replies; those that it names are rejected."""
        reports = [
            Report(client, one.reply.metrics, one.reply.profile)
            for client, one in accepted.items()
        ]
        try:
            odd = self.screen(reports, self._now.method) or {}
            return {client: str(odd[client]) for client in accepted if client in odd}
        except Exception as error:
            log.debug("screen", exc_info=True)
            why = (
                f"{type(self).__name__}.screen cannot take the replies: "
                f"{type(error).__name__}: {error}"
            )
            return dict.fromkeys(accepted, why)

    def _entry(self, client: int, status: Status, reason: str = "") -> ClientRecord:
        if self._now.name_of is str:
            return ClientRecord(client, status, reason)
        name = own_name(client, self._now.name_of(client))
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
        assert self._now.model is not None
        return Round(
            number=number,
            clients=tuple(one.client for one in accepted),
            model=self._now.model,
            updates=self._updates(accepted, models),
            num_examples=torch.tensor(
                [one.num_examples for one in accepted], dtype=torch.float64
            ),
            metrics=tuple(one.reply.metrics for one in accepted),
            profiles=tuple(one.reply.profile for one in accepted),
            state=self._now.method,
            population=self._now.population,
        )

    def _updates(self, accepted: list[AcceptedReply], models: LocalModels) -> Updates:
        assert self._now.model is not None
        return models.updates(
            [one.reply.node for one in accepted],
            self._now.model,
            accumulate=self.accumulate,
            threads=self.threads,
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
        assert self._now.model is not None
        model = self._now.model.with_parameters(parameters)
        nodes = [one.reply.node for one in accepted]
        if model.buffers.numel():
            rows = models.buffers(nodes, self._now.model)
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


@dataclass
class _Now:
    """What changes while a strategy runs.

    Attributes
    ----------
    method, optimizer : Any
        What the method and the server's optimiser carry from round to round.
    history : list[RoundRecord]
        The weight log.
    model : FlatModel, optional
        The global model of the round that goes on.
    asked : dict[int, _Asked]
        By node, who was asked and has not answered.
    not_asked : list[int]
        The clients that were drawn but are known to have no examples.
    without_examples : set[int]
        The clients that said so, or are known to.
    population : int
        How many clients there were when the last ones were drawn, without these.
    cohort : Cohort, optional
        The messages of the phase that goes on.
    outermost : bool
        Whether no wrapper runs the rounds, which may look into the replies.
    forgets : bool
        Whether the log holds the last round only.
    """

    method: Any
    optimizer: Any = None
    history: list[RoundRecord] = field(default_factory=list)
    model: FlatModel | None = None
    asked: dict[int, _Asked] = field(default_factory=dict)
    not_asked: list[int] = field(default_factory=list)
    without_examples: set[int] = field(default_factory=set)
    population: int = 0
    errors: KnownErrors = field(default_factory=KnownErrors)
    own_metrics: OwnMetrics = field(default_factory=OwnMetrics)
    name_of: Callable[[int], str] = str
    cohort: Cohort | None = None
    outermost: bool = False
    forgets: bool = False

    def leave_out(self, empty: Set[int]) -> None:
        """Remember that these clients, drawn in this round, have no examples."""
        self.population -= len(empty - self.without_examples)
        self.without_examples |= empty


class _Asked(NamedTuple):
    """A client that was asked, by its node."""

    client: int
    straggler: bool
    asks: tuple[str, ...]


def _has_state(given: Any) -> bool:
    """Tell whether a method gives its next state, too, and not a tuple of weights."""
    pair = isinstance(given, tuple) and len(given) == 2
    return pair and not isinstance(given[0], int | float)


def _parted(given: Any, state: Any) -> tuple[Any, Any]:
    """Return what a method gives, and the next state: by default the last one."""
    return given if _has_state(given) else (given, state)


def _reason(error: AggregationError) -> str:
    return plain_lines(str(error), TRACEBACK_LENGTH)


def _request(config: ConfigRecord, asks: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the config's own request, if it has one, with the method's added."""
    if not asks:
        return {}
    already = config.get(keys.REQUEST)
    names = [str(n) for n in already] if isinstance(already, list) else []
    return {keys.REQUEST: [*names, *(n for n in asks if n not in names)]}
