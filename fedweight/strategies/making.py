"""The second half of a round: the next global model, of the good replies."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from ..core.errors import AggregationError
from ..core.layout import FlatModel, is_finite
from ..core.local_models import LocalModels, middle, moved
from ..core.records import ClientRecord, RoundRecord
from ..core.texts import cause, one_of, plain, shown, without_numbers
from ..core.updates import Updates
from ..messages import keys
from ..messages.arrays import FlatRecord
from ..server.admission import check_sender, size_of
from ..server.reported import (
    LARGE,
    AcceptedReply,
    mean_metrics,
    measured,
    recorded_metrics,
    sort_metrics,
)
from .checks import as_parameters, check_values, check_weights, masked
from .now import Asked, GlobalModel, Now
from .receiving import read, reason_of, sort, where_room_is
from .round import OddReplies, Round
from .weights import effective_clients, size_weights

if TYPE_CHECKING:
    from .base import WeightingStrategy

log = logging.getLogger("fedweight")

MetricsFn = Callable[[list[RecordDict], str], MetricRecord]


def next_model(
    strategy: WeightingStrategy, now: Now, number: int, replies: Iterable[Message]
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """Make the next global model of the good replies; record all of them."""
    if now.model is None:
        raise AggregationError(
            "aggregate_train was called before configure_train: the global model "
            "is not known. Let Strategy.start run both."
        )
    record = now.history[-1]
    if not (now.asked or now.not_asked) and strategy.fraction_train == 0:
        record.status, record.reason = "ok", ""
        return None, None
    accepted, models = sort(strategy, now, number, replies, record)
    chosen = now.own_metrics.limit(record.clients)
    short = partial(_short_enough, strategy, now, accepted, models, record)
    accepted = where_room_is(now, models, short)
    now.errors.tell(number, record.clients)
    while True:
        if len(accepted) < strategy.min_replies:
            return _fail(record, _too_few(strategy, accepted, record))
        try:
            make = partial(_made, strategy, now, number, accepted, models)
            made, state, optimizers = where_room_is(now, models, make)
            break
        except OddReplies as error:  # Without them, of what there was before.
            fewer = _without(accepted, error.reasons, record)
            if len(fewer) == len(accepted):
                return _fail(record, str(error))
            accepted = fewer
            now.errors.tell(number, record.clients)
        except AggregationError as error:
            return _fail(record, str(error))
    # Only now: a failed round leaves all that is carried as it was.
    now.method, now.optimizers = state, optimizers
    for name in now.unpooled(strategy.pools, number):
        _pool(now, name, accepted)
    metrics = _metrics(strategy, accepted, chosen, strategy.train_metrics_aggr_fn)
    record.status, record.reason = "ok", ""
    record.metrics |= recorded_metrics(metrics)
    for which, (round, _) in made.items():
        _record(record, round, f"-model-{which}" if now.models else "")
    record.metrics["effective-clients"] = effective_clients(
        torch.cat([round.logged_clients["weight"] for round, _ in made.values()])
    )
    if not now.models:
        [(_, model)] = made.values()
        return FlatRecord(model), metrics
    now.models = [
        _as_carried(*made[which]) if which in made else own
        for which, own in enumerate(now.models)
    ]
    return FlatRecord(mean_model(now)), metrics


def _pool(now: Now, name: str, accepted: Sequence[AcceptedReply]) -> None:
    """Add up what clients measured; what no examples can have does not count.

    Each number is a sum over a client's examples of numbers from 0 to 1.
    """
    lists = []
    for one in accepted:
        own, most = one.reply.profile.get(name), one.num_examples * (1 + 1e-6)
        if isinstance(own, list) and own and 0 <= min(own) <= max(own) <= most:
            lists.append(own)
    lengths = Counter(map(len, lists))
    usual = max(lengths, key=lambda length: (lengths[length], length), default=0)
    some = [own for own in lists if len(own) == usual]
    if len(some) < len(accepted):
        log.warning(
            "'%s' is of %d of %d clients alone: the others gave no sums that they can "
            "have",
            name,
            len(some),
            len(accepted),
        )
    if some:
        sums = [math.fsum(column) for column in zip(*some, strict=True)]
        now.pooled = {**now.pooled, name: sums}


def _made(
    strategy: WeightingStrategy,
    now: Now,
    number: int,
    accepted: list[AcceptedReply],
    models: LocalModels,
) -> tuple[dict[int, tuple[Round, FlatModel]], Any, dict[int, Any]]:
    """Return the next global models by number, and the states that come with them."""
    made: dict[int, tuple[Round, FlatModel]] = {}
    state, optimizers = now.method, dict(now.optimizers)
    for which, some in _by_model(now, accepted).items():
        start = now.global_model(which)
        round = round_of(strategy, now, number, start, some, models, state)
        parameters, state = parted(strategy.aggregate(round), state)
        parameters, optimizers[which] = _stepped(
            strategy, now, parameters, round, optimizers.get(which)
        )
        parameters = masked(strategy, parameters, state)
        made[which] = (
            round,
            _with_buffers(strategy, parameters, round, some, models),
        )
    return made, state, optimizers


def _without(
    accepted: Sequence[AcceptedReply], odd: Mapping[int, str], record: RoundRecord
) -> list[AcceptedReply]:
    """Reject some of the replies."""
    for entry in record.clients:
        if entry.status == "ok" and entry.client in odd:
            entry.status, entry.reason = "rejected", odd[entry.client]
    return [one for one in accepted if one.client not in odd]


def mean_model(now: Now) -> FlatModel:
    """Return the mean of several global models, by how many examples made each."""
    assert now.model is not None
    sizes = torch.tensor([own.examples for own in now.models], dtype=torch.float64)
    shares = size_weights(sizes).tolist()

    def mean(vectors: Sequence[Tensor]) -> Tensor:
        total = torch.zeros_like(vectors[0], dtype=torch.float64)
        for vector, share in zip(vectors, shares, strict=True):
            total.add_(vector, alpha=share)
        return total.to(vectors[0].dtype)

    return replace(
        now.model,
        parameters=mean([own.parameters for own in now.models]),
        buffers=mean([own.buffers for own in now.models]),
        integers=middle([own.integers for own in now.models]),
    )


def _as_carried(round: Round, model: FlatModel) -> GlobalModel:
    examples = min(float(round.num_examples.sum()), LARGE)
    return GlobalModel(model.parameters, model.buffers, model.integers, examples)


def _by_model(
    now: Now, accepted: Sequence[AcceptedReply]
) -> dict[int, list[AcceptedReply]]:
    """Return the replies by the global model that their clients trained."""
    if not now.models:
        return {0: list(accepted)}
    found: dict[int, list[AcceptedReply]] = {}
    for one in accepted:
        found.setdefault(_sent(now, one).which, []).append(one)
    return dict(sorted(found.items()))


def _sent(now: Now, one: AcceptedReply) -> Asked:
    return now.sent.get(one.client) or Asked(one.client, False, ())


def round_of(
    strategy: WeightingStrategy,
    now: Now,
    number: int,
    model: FlatModel,
    accepted: list[AcceptedReply],
    models: LocalModels,
    state: Any,
) -> Round:
    """Return what the method sees of the clients that trained one global model."""
    round = Round(
        number=number,
        clients=tuple(one.client for one in accepted),
        model=model,
        updates=_updates(strategy, now, accepted, models),
        num_examples=torch.tensor(
            [one.num_examples for one in accepted], dtype=torch.float64
        ),
        metrics=tuple(one.reply.metrics for one in accepted),
        profiles=tuple(one.reply.profile for one in accepted),
        state=state,
        population=now.population,
    )
    if now.models:
        which = _sent(now, accepted[0]).which
        round.logged_clients["model"] = torch.full((len(accepted),), float(which))
    if now.arrivals is None:
        return round
    arrivals = [a for one in accepted if (a := _sent(now, one).arrival) is not None]
    staleness = [float(number - arrival.round) for arrival in arrivals]
    round.logged_clients["staleness"] = torch.tensor(staleness, dtype=torch.float64)
    discounts = [arrival.discount for arrival in arrivals]
    nodes = [one.reply.node for one in accepted]
    return replace(
        round,
        discounts=torch.tensor(discounts, dtype=torch.float64),
        since_now=partial(models.updates, nodes, model, **_precision(strategy)),
    )


def _updates(
    strategy: WeightingStrategy,
    now: Now,
    accepted: Sequence[AcceptedReply],
    models: LocalModels,
) -> Updates:
    """Return what each client's training added to the model that it began with."""
    options = _precision(strategy)
    if now.arrivals is None:
        model = now.global_model(_sent(now, accepted[0]).which)
        nodes = [one.reply.node for one in accepted]
        return models.updates(nodes, model, **options)
    sent = [_sent(now, one) for one in accepted]
    model = now.global_model(0)
    alike: dict[int, tuple[FlatModel, list[int]]] = {}
    for k, one in enumerate(sent):
        start = now.start_of(one) if one.arrival else model
        alike.setdefault(id(start), (start, []))[1].append(k)
    parts = [
        models.updates([accepted[k].reply.node for k in some], start, **options)
        for start, some in alike.values()
    ]
    if [*alike] == [id(model)]:
        return parts[0]
    return moved(parts, [some for _, some in alike.values()], model, **options)


def _precision(strategy: WeightingStrategy) -> dict[str, Any]:
    return {"accumulate": strategy.accumulate, "threads": strategy.threads}


def _stepped(
    strategy: WeightingStrategy,
    now: Now,
    given: Any,
    round: Round,
    optimizer: Any,
) -> tuple[Tensor, Any]:
    """Check what the method gives, and let the server's optimiser make the step."""
    parameters = as_parameters(strategy, given, round)
    round.keep_still(parameters)
    check_weights(strategy, round)
    check_values(round, parameters, now.name_of)
    if strategy.server_optimizer is None:
        return parameters, None
    before = round.model.parameters.to(parameters.dtype)
    step, optimizer = strategy.server_optimizer.step(parameters - before, optimizer)
    parameters = before + step
    check_values(round, parameters, now.name_of)
    return parameters, optimizer


def _with_buffers(
    strategy: WeightingStrategy,
    parameters: Tensor,
    round: Round,
    accepted: Sequence[AcceptedReply],
    models: LocalModels,
) -> FlatModel:
    """Round to the model's dtype; average its buffers, take its integers."""
    model = round.model.with_parameters(parameters)
    nodes = [one.reply.node for one in accepted]
    if model.buffers.numel():
        rows = models.buffers(nodes, round.model)
        model.buffers = strategy.aggregate_buffers(round, rows).to(model.buffers.dtype)
        if not is_finite(model.buffers):
            raise AggregationError("the aggregated buffers are not finite")
    if model.integers:
        model.integers = middle(models.integers(nodes))
    return model


def has_state(given: Any) -> bool:
    """Tell whether a method gives its next state, too, and not a tuple of weights."""
    pair = isinstance(given, tuple) and len(given) == 2
    return pair and not isinstance(given[0], int | float)


def parted(given: Any, state: Any) -> tuple[Any, Any]:
    """Return what a method gives, and the next state: by default the last one."""
    return given if has_state(given) else (given, state)


def _short_enough(
    strategy: WeightingStrategy,
    now: Now,
    accepted: list[AcceptedReply],
    models: LocalModels,
    record: RoundRecord,
) -> list[AcceptedReply]:
    """Return the clients whose updates are not too long, if there is a limit."""
    if strategy.max_update_norm is None or not accepted:
        return accepted
    entries = {c.client: c for c in record.clients if c.status == "ok"}
    for some in _by_model(now, accepted).values():
        norms = _updates(strategy, now, some, models).norms()
        for one, norm in zip(some, norms.tolist(), strict=True):
            entry = entries[one.client]
            if not norm <= strategy.max_update_norm:
                entry.status = "rejected"
                entry.reason = (
                    f"its update has norm {norm:.4g}, above max_update_norm "
                    f"{strategy.max_update_norm:g}"
                )
    return [one for one in accepted if entries[one.client].status == "ok"]


def _too_few(
    strategy: WeightingStrategy, accepted: Sequence[AcceptedReply], record: RoundRecord
) -> str:
    if all(c.reason == keys.NO_EXAMPLES for c in record.clients) and record.clients:
        return f"none of the {len(record.clients)} clients drawn has examples"
    asked = {c.client for c in record.clients if c.bytes_down}
    return (
        f"{len(accepted)} good replies of {len(asked)} clients asked, "
        f"min_replies is {strategy.min_replies}"
    )


def _fail(record: RoundRecord, reason: str) -> tuple[None, None]:
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


def _record(record: RoundRecord, round: Round, suffix: str) -> None:
    """Write down the weights and what else the method logged."""
    entries = {c.client: c for c in record.clients if c.status == "ok"}
    for name, values in round.logged_clients.items():
        for client, value in zip(round.clients, values.tolist(), strict=True):
            if name == "weight":
                entries[client].weight = value
            else:
                entries[client].metrics[name] = value
    record.metrics |= {f"{name}{suffix}": v for name, v in round.logged.items()}


def _metrics(
    strategy: WeightingStrategy,
    accepted: list[AcceptedReply],
    chosen: Collection[str],
    custom: MetricsFn | None,
) -> MetricRecord:
    """Make the round's metrics of the clients'.

    A function of the user's is given what clients report, which may be anything: an
    error of it costs the round its metrics, and not the run.
    """
    if custom is None:
        return mean_metrics(accepted, strategy.weighted_by_key, chosen)
    contents = [
        RecordDict({keys.METRICS: MetricRecord(dict(one.reply.metrics))})
        for one in accepted
    ]
    try:
        made = custom(contents, strategy.weighted_by_key)
        if not isinstance(made, MetricRecord):
            raise TypeError(f"it returned {shown(made)}, and not a MetricRecord")
        return made
    except Exception as error:
        name = getattr(custom, "__name__", str(custom))
        log.exception(
            "a round has no metrics: %s raised %s", name, type(error).__name__
        )
        return MetricRecord()


def mean_evaluation(
    strategy: WeightingStrategy, now: Now, number: int, replies: Iterable[Message]
) -> MetricRecord | None:
    """Average the clients' evaluation metrics by data size; record them."""
    record = now.history[-1] if now.history else RoundRecord(number)
    entries: dict[int, ClientRecord] = {}
    for row in record.clients:  # Of a client that replied twice, the first.
        entries.setdefault(row.client, row)
    good: dict[int, AcceptedReply] = {}
    bad: list[ClientRecord] = []

    def reject(client: int, why: str) -> None:
        entry, note = entries[client], f"evaluation failed: {why}"
        entry.reason = f"{entry.reason}; {note}" if entry.reason else note
        bad.append(now.entry(client, "failed", note))

    anybody = not now.asked
    for client, sent, reply in read(strategy, now, replies)[0]:
        entry = entries.get(client)
        if entry is None:
            entry = entries[client] = now.entry(client, "evaluated")
            record.clients.append(entry)
        entry.bytes_down += now.bytes_down if sent else 0
        try:
            if isinstance(reply, AggregationError):
                raise AggregationError(str(reply))
            if reply.error is not None:
                raise AggregationError(reply.error)
            check_sender(sent is not None or anybody, client in good)
            size = size_of(reply.metrics, strategy.weighted_by_key)
        except AggregationError as error:
            reject(client, reason_of(error))
            continue
        good[client] = AcceptedReply(client, reply, size, *sort_metrics(reply.metrics))
    record.clients.sort(key=lambda c: c.client)
    whole: dict[str, float] = {}
    if strategy.statistics is not None and good:
        reported = {client: one.reply.metrics for client, one in good.items()}
        whole, each, odd, record.by_group = measured(strategy.statistics, reported)
        for client, why in odd.items():
            reject(client, why)
            del good[client]
        for client in good:
            entries[client].metrics |= {
                f"evaluate-{name}": value for name, value in each[client].items()
            }
        if good:
            now.errors.left_out(number, set(strategy.statistics.besides) - whole.keys())
    accepted = list(good.values())
    with_own = []
    for one in accepted:
        entry = entries[one.client]
        entry.metrics |= {f"evaluate-{name}": one.known[name] for name in one.known}
        if one.own:
            evaluated = ClientRecord(one.client, "evaluated", own_metrics=one.own)
            with_own.append((entry, evaluated))
    now.errors.tell(number, bad)
    chosen = now.own_metrics.limit(evaluated for _, evaluated in with_own)
    for entry, evaluated in with_own:
        own = evaluated.own_metrics
        named = {f"evaluate-{name}": own[name] for name in own}
        entry.own_metrics = {**entry.own_metrics, **named}
    if not accepted:
        return None
    result = _metrics(strategy, accepted, chosen, strategy.evaluate_metrics_aggr_fn)
    record.metrics |= recorded_metrics(result, "evaluate-")
    record.metrics |= {f"evaluate-{name}": value for name, value in whole.items()}
    return MetricRecord({**result, **whole}) if whole else result
