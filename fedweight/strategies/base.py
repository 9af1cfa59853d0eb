"""The Flower strategy that all of ours share.

A method derives from :class:`WeightingStrategy` and answers one question,
``weights(round)``; or ``aggregate(round)`` where a weighted sum is not enough. What
it needs from the clients it names in ``request``. Sampling, bad replies, buffers, the
server's optimiser and the record of every round are done here, once.
"""

from __future__ import annotations

import logging
from collections.abc import (
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, dataclass_transform

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from pydantic import Field
from torch import Tensor

from ..clients.objectives.base import Objective
from ..clients.probes import OF_CLASSES, SCORES, Probe, check_named
from ..clients.queries import Query
from ..clients.registries import PROBES, QUERIES
from ..core.errors import ConfigurationError
from ..core.layout import FlatModel
from ..core.memory import settled
from ..core.options import GIVEN, InFile, checked_fields
from ..core.products import put_products
from ..core.records import RoundRecord
from ..core.texts import shown
from ..core.threads import one_thread
from ..core.updates import Accumulate, Updates
from ..messages import keys
from ..messages.codecs import DENSE, Codec
from ..messages.dispatch import Replies
from ..server.phase import Population
from ..server.sampling import Draw
from ..server.schedules import Clock
from . import asking, making
from .checks import as_weights
from .making import MetricsFn, has_state
from .now import GlobalModel, Now
from .round import PerParameter, Report, Round, Selection, Vector
from .server_optimizers import ServerOptimizer
from .weights import cap

log = logging.getLogger("fedweight")

# A number or a text for all clients, one for each, or several numbers for all.
Told = float | int | str | Sequence[float | int | None] | Tensor | Vector | PerParameter


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(field,)
)
@checked_fields
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class WeightingStrategy(Strategy):
    """Sample clients, weigh their updates, make the next global model.

    Parameters
    ----------
    fraction_train : float
        Share of the clients that train in a round, in [0, 1]. At 0 nobody does.
    fraction_evaluate : float
        Share of the clients that evaluate in a round, in [0, 1]. At 0 nobody does.
    min_train_nodes : int
        0 or more; at least so many clients train in a round.
    min_evaluate_nodes : int
        0 or more; at least so many clients evaluate in a round.
    min_available_nodes : int
        0 or more; so many clients must be connected before a round begins.
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
    class_totals : bool
        Whether all clients are asked before the first round how many examples of each
        class they have, and then told the sum, as some local objectives want.
    pools : Mapping[str, int], optional
        What some local objective wants added up over clients, by the name of a probe,
        a list of sums over the examples of numbers from 0 to 1: the round from which on
        the clients drawn are asked, until some have answered. All are told the sums,
        by the same name, from then on.
    hears : Sequence[str]
        What the clients' objective hears of what :meth:`tell` gives: a round that does
        not tell it is refused, as all clients would fail.
    codec : Codec
        How trained models are written on the wire; by default as they are. The clients'
        app has the same.
    factors : Sequence[tuple[str, str]]
        Names of pairs of tensors, B ``[out, r]`` and A ``[r, in]``, whose products are
        averaged in place of them: each client's product is made, and factors of rank r
        of their weighted sum, in K r (out + in) numbers and, of the smaller of K r and
        ``min(out, in)``, its cube of time. Models cannot be added up as they come then,
        and a server optimiser is refused: factors have no direction from round to
        round.
    statistics : Statistics, optional
        What clients add up of their held-out examples, besides loss and accuracy: the
        round's measures are those of the sum over all of them. See
        :class:`fedweight.metrics.Statistics`.

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

    queries: ClassVar[Mapping[str, Query]] = {}
    """Functions of the method's own that clients answer with in :meth:`prepare`, by
    name; see :mod:`fedweight.clients.queries`."""

    needs: ClassVar[tuple[str, ...]] = ()
    """What of the server's the method takes as fields: "model", "proxy"."""

    caps_weights: ClassVar[bool] = False
    """Whether an :meth:`aggregate` of the class's own observes ``max_share``."""

    discounts: ClassVar[bool] = False
    """Whether an :meth:`aggregate` of the class's own observes
    :attr:`Round.discounts`."""

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
    class_totals: Annotated[bool, GIVEN] = False
    pools: Annotated[Mapping[str, int] | None, GIVEN] = None
    hears: Annotated[Sequence[str], GIVEN] = ()
    codec: Annotated[Codec, GIVEN] = DENSE
    factors: Annotated[Sequence[tuple[str, str]], GIVEN] = ()
    statistics: Annotated[Any, GIVEN] = None

    _now: Now = field(init=False)

    def __init_subclass__(cls, **named: Any) -> None:
        """Make the class a frozen dataclass whose fields are checked."""
        super().__init_subclass__(**named)
        if isinstance(cls.request, str):
            raise ConfigurationError(
                f"{cls.__name__}.request must be a tuple of names, got "
                f"{cls.request!r}. Write ({cls.request!r},)."
            )
        names: Any = cls.request
        if not isinstance(names, tuple | list) or not all(
            isinstance(name, str) for name in names
        ):
            raise ConfigurationError(
                f"{cls.__name__}.request must be a tuple of names, got {shown(names)}."
            )
        check_named("probe", cls.__name__, cls.probes, PROBES)
        check_named("query", cls.__name__, cls.queries, QUERIES)
        declared = vars(cls).get("__annotations__", {})
        for name in declared:
            there = getattr(WeightingStrategy, name, None)
            if isinstance(there, property) or callable(there):
                raise ConfigurationError(
                    f"{cls.__name__}: an option cannot be called '{name}', which every "
                    "strategy has. Choose another name."
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
        own = self.overrides("aggregate")
        if not own and not self.overrides("weights"):
            raise ConfigurationError(
                f"{cls.__name__} must define weights(round) or aggregate(round)."
            )
        if self.max_share < 1 and own and not self.caps_weights:
            raise ConfigurationError(
                f"max_share is {self.max_share:g}, but {cls.__name__} makes the "
                "model in an aggregate(round) of its own, which does not use it. Leave "
                "it out, or define weights(round) instead."
            )
        if self.factors and (own or self.server_optimizer is not None):
            what = "has a server optimiser"
            if own:
                what = "makes the model in an aggregate(round) of its own"
            raise ConfigurationError(
                f"{cls.__name__} {what}, which does not go with averaged products of "
                "adapters. Choose model.averaged = 'both', or leave that out."
            )
        # All that changes; everything else is fixed.
        object.__setattr__(self, "_now", Now(method=self.begin()))

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
            "server-optimizers": now.optimizers,
            "models": [own._asdict() for own in now.models],
            "first-model": now.first and now.first._asdict(),
            "prepared": now.prepared,
            "class-totals": now.class_totals,
            "pooled": now.pooled,
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
        self._now.optimizers = dict(state["server-optimizers"])
        self._now.models = [GlobalModel(**own) for own in state["models"]]
        first = state["first-model"]
        self._now.first = first and GlobalModel(**first)
        self._now.prepared = state["prepared"]
        self._now.class_totals = list(state["class-totals"])
        self._now.pooled = dict(state["pooled"])
        self._now.without_examples = set(state["without-examples"])
        self._now.own_metrics.restore(state["own-metrics"])

    # What a method answers.

    @classmethod
    def objective(cls, chosen: Objective, options: Mapping[str, Any]) -> Objective:
        """Return what clients minimise: by default what was chosen.

        A method that is more than weights puts an objective of its own around it,
        such as one that :attr:`~fedweight.clients.Objective.hears` what it tells. In a
        run of this library that happens by itself; elsewhere the ClientApp is given it.

        Parameters
        ----------
        chosen : Objective
            What was chosen, plain training for one.
        options : Mapping[str, Any]
            The method's options, by name; on a device, too, where there is no strategy.
        """
        return chosen

    def begin(self) -> Any:
        """Return the method's state before the first round; ``None`` without memory."""
        return None

    def prepare(self, population: Population) -> Any:
        """Return the method's state before the first round, having asked clients.

        Runs once, when the first round is configured, in place of :meth:`begin`.

        Parameters
        ----------
        population : Population
            All clients, and ``population.ask`` to ask them.
        """
        return self.begin()

    def mask(self, state: Any) -> Tensor | None:
        """Return which parameters there are, ``[P]``, bool; ``None``, by default: all.

        The others are 0 in every global model, whatever the server's optimiser makes of
        it, and do not travel, but for the mask: a bit each. Clients keep them at 0 by
        what :meth:`objective` puts around theirs, which hears ``"mask"``.

        Parameters
        ----------
        state : Any
            What the method carries.
        """
        return None

    def assign(self, selection: Selection) -> Sequence[int] | None:
        """Return which global model each client starts from, and trains.

        ``None``, by default, where there is one. Otherwise a number from 0 for each
        client, and :meth:`weights` is asked for each model with the clients that
        trained it. All models begin as the first global model. What others see as the
        global model is their mean, by the data of the clients that trained them.
        """
        return None

    def draw(self, selection: Selection) -> Draw:
        """Return how many clients are drawn next, and how likely each of them is.

        By default a share of ``fraction_train``, all as likely as another. It is not
        asked where ``fraction_train`` is 0: then nobody trains. A buffered schedule,
        which chooses the clients itself, is refused with a method that has this.

        Parameters
        ----------
        selection : Selection
            All clients that are there, in the order of their numbers; those that are
            known to have no examples, who are never drawn by chances, included.

        Returns
        -------
        Draw
            ``Draw(fraction)`` or ``Draw(fraction, chances)``. The draw itself is made
            from the stream that ``seed`` names, as any other.
        """
        return Draw(self.fraction_train)

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
        w_k`` where the weights sum to one; times the schedule's discount of an update
        that began with an older model. A method that overrides this logs the
        weights that it used: ``round.log("weight", weights)``.
        """
        given = self.weights(round)
        remembers = has_state(given)
        weights = given[0] if remembers else given
        weights = as_weights(self, weights, round)
        if not round.in_time:
            discounts = round.discounts
            weights = weights * (discounts if weights.ndim == 1 else discounts[:, None])
        weights = cap(weights, self.max_share)
        round.log("weight", weights if weights.ndim == 1 else weights.mean(1))
        model = round.updates.combine(weights).add_(round.model.parameters)
        if self.factors:
            put_products(model, round.model, round.updates, weights, self.factors)
        return (model, given[1]) if remembers else model

    def tell(self, selection: Selection) -> Mapping[str, Told]:
        """Return what the method tells the clients of a round; nothing by default.

        By name a number or a text for all, one for each (``None``: that one is told
        nothing); or for all a :class:`~fedweight.strategies.Vector` of numbers, or a
        :class:`~fedweight.strategies.PerParameter`, a value of each parameter. What the
        clients' objective :attr:`~fedweight.clients.Objective.hears` is told so.
        ``bytes_down`` counts it: 8 bytes a number, a text as UTF-8, a value of each
        parameter as the model has it.
        """
        return {}

    def ask(self, selection: Selection) -> Mapping[str, bool | Sequence[bool]]:
        """Return what the method asks the clients for; :attr:`request` by default.

        By name whether all are asked, or whether each is. ``bytes_up`` counts what they
        answer, 8 bytes a number.
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
    def of_classes(self) -> bool:
        """Whether it needs examples that have a class each, which can be counted.

        By default where it asks for something that only those have.
        """
        return not OF_CLASSES.isdisjoint(self.request)

    @property
    def of_scores(self) -> bool:
        """Whether it goes by scores from 0 to 1, such as accuracies.

        By default where it asks for one; where numbers are predicted there is none.
        """
        return not SCORES.isdisjoint(self.request)

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
            with settled():
                return super().start(*arguments, **named)
        finally:
            self._now.outermost = False

    def overrides(self, name: str) -> bool:
        """Tell whether the method has a hook of its own, such as ``"prepare"``."""
        own: object = getattr(type(self), name)
        return own is not getattr(WeightingStrategy, name)

    @property
    def models(self) -> list[FlatModel]:
        """The global models, where the method keeps several; else none."""
        now = self._now
        several = [] if now.model is None else range(len(now.models))
        return [now.global_model(which) for which in several]

    @contextmanager
    def following(self, clock: Clock) -> Iterator[None]:
        """Let a schedule say, in a ``with`` block, whose updates come when.

        Raises
        ------
        ConfigurationError
            If it has updates of older models count less, and the class does not; or if
            it chooses the clients, and the method keeps several global models or has a
            say in who is drawn.
        """
        if clock.schedule.chooses and self.overrides("draw"):
            raise ConfigurationError(
                f"schedule.name: {type(self).__name__} says how likely each client is "
                f"drawn, but {type(clock.schedule).__name__} chooses the clients "
                "itself. Choose 'synchronous' or 'deadline'."
            )
        if clock.schedule.chooses and self.factors:
            raise ConfigurationError(
                f"schedule.name: {type(clock.schedule).__name__} lets clients begin "
                "with older models, whose adapters have other factors. Choose "
                "model.averaged = 'both'."
            )
        if clock.schedule.chooses and self.overrides("assign"):
            raise ConfigurationError(
                f"schedule.name: {type(self).__name__} keeps several global models, "
                f"which {type(clock.schedule).__name__} does not know. Choose "
                "'synchronous' or 'deadline'."
            )
        if (
            self.overrides("aggregate")
            and clock.schedule.discounts
            and not self.discounts
        ):
            raise ConfigurationError(
                f"schedule.discount: {type(self).__name__} makes the model in an "
                "aggregate(round) of its own, which does not use it. Choose 'constant'."
            )
        self._now.clock = clock
        try:
            yield
        finally:
            # They hold older models.
            self._now.clock, self._now.sent = None, {}

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
        return asking.train_messages(
            self, self._now, server_round, arrays, config, grid
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Make the next global model of the good replies; record all of them."""
        with one_thread():
            result = making.next_model(self, self._now, server_round, replies)
        ours = not self.overrides("aggregate_train")
        if ours and self._now.outermost and isinstance(replies, Replies):
            replies.forget()
        return result

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose the clients that evaluate the global model on their held-out data."""
        return asking.evaluate_messages(
            self, self._now, server_round, arrays, config, grid
        )

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the clients' evaluation metrics by data size; record them."""
        return making.mean_evaluation(self, self._now, server_round, replies)

    def configure_last(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Write all clients the messages of a phase after the rounds.

        Each is sent the global model that it starts from, to evaluate and, where
        clients have personal models that are trained in the end, to train first. It is
        no hook of Flower's: our own loop calls it.
        """
        return asking.last_messages(self, self._now, server_round, arrays, config, grid)

    def summary(self) -> None:
        """Log the method and its settings."""
        log.info("%r", self)
