"""The replies to a round's messages: which are aggregated, and why others are not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import TYPE_CHECKING, TypeVar

from flwr.app import Message

from ..core.errors import AggregationError
from ..core.layout import FlatModel
from ..core.limits import is_too_large
from ..core.local_models import LocalModels
from ..core.records import ClientRecord, RoundRecord
from ..core.texts import TRACEBACK_LENGTH, clients_called, plain_lines
from ..messages import keys
from ..messages.dispatch import Replies, Reply, held_models
from ..server.admission import (
    Unfit,
    check_asked,
    check_model,
    check_profile,
    check_sender,
    check_trained,
    far_longer,
    of_another_kind,
    size_of,
    update_norm,
)
from ..server.reported import AcceptedReply, sort_metrics
from .now import Asked, Now
from .round import TIMES_MEDIAN, Report

if TYPE_CHECKING:
    from .base import WeightingStrategy

log = logging.getLogger("fedweight")

T = TypeVar("T")


def read(
    strategy: WeightingStrategy, now: Now, replies: Iterable[Message]
) -> tuple[
    list[tuple[int, Asked | None, Reply | AggregationError]], LocalModels | None
]:
    """Return who was asked what and answered what, by the clients' numbers.

    In that order nothing depends on who answered first. What cannot be read comes as
    the error that says why. An error reply that the SuperLink writes for a lost client
    carries the SuperLink's node; the message it answers tells whose. The models come
    with it where the replies do not hold them.
    """
    asked, now.asked = now.asked, {}
    cohort, now.cohort = now.cohort, None
    plain, models = None, None
    if isinstance(replies, Replies) and replies.plain is not None:
        plain, models = replies.plain, replies.models
    found: list[tuple[int, Asked | None, Reply | AggregationError]] = []
    if plain is not None:
        for answer in plain:
            sent = asked.get(answer.node)
            found.append((sent.client if sent else answer.node, sent, answer))
    else:
        assert now.model is not None
        for message in replies:
            node = message.metadata.src_node_id
            if node not in asked and cohort is not None:
                answers = message.metadata.reply_to_message_id
                node = cohort.node_of(answers) or node
            sent = asked.get(node)
            reply: Reply | AggregationError
            try:
                reply = Reply.of(message, now.model.layout, strategy.arrayrecord_key)
            except AggregationError as error:
                reply = error
            found.append((sent.client if sent else node, sent, reply))
    known = {client for client, _, _ in found}
    for sent in asked.values():
        if sent.client not in known:
            found.append((sent.client, sent, Unfit("missing", "no reply in time")))
    return sorted(found, key=lambda row: row[0]), models


def sort(
    strategy: WeightingStrategy,
    now: Now,
    round: int,
    replies: Iterable[Message],
    record: RoundRecord,
) -> tuple[list[AcceptedReply], LocalModels]:
    """Tell good replies from bad ones, in the order of the clients' numbers."""
    assert now.model is not None
    anybody = not (now.asked or now.not_asked)
    entries = {c: now.entry(c, "dropped", why) for c, why in now.not_asked.items()}
    record.clients += entries.values()
    accepted: dict[int, AcceptedReply] = {}
    lengths: dict[int, float] = {}
    asks: dict[int, tuple[str, ...]] = {}
    answered: set[int] = set()
    found, models = read(strategy, now, replies)
    looks = strategy.overrides("admit")
    arrived = models is None  # As messages, perhaps from another machine.
    for client, sent, reply in found:
        entry = now.entry(client, "ok")
        record.clients.append(entry)
        entry.bytes_down = now.bytes_down + sent.bytes_told if sent else 0
        try:
            check_sender(sent is not None or anybody, client in answered)
            answered.add(client)
            if isinstance(reply, AggregationError):
                raise reply
            if reply.model is not None or reply.summed:
                entry.bytes_up = now.bytes_up
                if sent is not None and sent.asks:
                    entry.bytes_up += _num_bytes(reply, sent.asks)
            sent = sent or Asked(client, False, strategy.request)
            accepted[client] = _admit(strategy, round, sent, reply, entry, looks)
            entries[client] = entry
            if sent.asks:
                asks[client] = sent.asks
            if arrived and isinstance(reply.model, FlatModel):
                lengths[client] = update_norm(reply.model, now.start_of(sent))
        except Unfit as error:
            entry.status, entry.reason = error.status, reason_of(error)
        except AggregationError as error:
            entry.status, entry.reason = "rejected", reason_of(error)
        if entry.reason == keys.NO_EXAMPLES:
            now.leave_out({client})
    odd = of_another_kind({c: accepted[c].reply for c in asks}, asks) if asks else {}
    for client in odd:
        del accepted[client]
    odd |= _screened(strategy, now, accepted)
    for client, reason in odd.items():
        entries[client].status, entries[client].reason = "rejected", reason
        accepted.pop(client, None)
    for client, times in far_longer(lengths).items():
        entry = entries[client]
        entry.metrics = {**entry.metrics, TIMES_MEDIAN: times}
        log.warning(
            "round %d: the update of %s is %.3g times as long as the median; "
            "max_update_norm would reject it",
            round,
            clients_called([client], now.name_of),
            times,
        )
    record.clients.sort(key=lambda entry: entry.client)
    if models is None:
        models = held_models([one.reply for one in accepted.values()])
    return list(accepted.values()), models


def where_room_is(now: Now, models: LocalModels, make: Callable[[], T]) -> T:
    """Return what is made of local models: on the CPU, if a device has no room for it.

    Then they are brought to the CPU in all rounds that follow.
    """
    if not now.no_room:
        try:
            return make()
        except (MemoryError, RuntimeError) as error:
            if not is_too_large(error) or not models.bring():
                raise
            why = str(error).split("\n", 1)[0] or type(error).__name__
        now.no_room = True
        log.warning(
            "the server works on the clients' models on the CPU: where they trained "
            "there is no room for it (%s)",
            why,
        )
    models.bring()
    return make()


def _num_bytes(reply: Reply, asks: Iterable[str]) -> int:
    """Return how many bytes take the numbers that a client was asked for, 8 each."""
    given = (reply.profile.get(n, reply.metrics.get(n, [])) for n in asks)
    return 8 * sum(len(v) if isinstance(v, Sized) else 1 for v in given)


def reason_of(error: AggregationError) -> str:
    """Return what a record says of an error."""
    return plain_lines(str(error), TRACEBACK_LENGTH)


def _admit(
    strategy: WeightingStrategy,
    round: int,
    sent: Asked,
    reply: Reply,
    entry: ClientRecord,
    looks: bool,
) -> AcceptedReply:
    """Check a reply, and record what it reports; the method has a look, if it does.

    Raises
    ------
    AggregationError
        With the reason, if it is not to be aggregated.
    """
    if reply.error is not None:
        raise Unfit("missing" if reply.lost else "failed", reply.error)
    known, own = sort_metrics(reply.metrics)
    entry.metrics, entry.own_metrics = known, own
    size = size_of(reply.metrics, strategy.weighted_by_key)
    check_trained(size, known)
    check_model(reply, strategy.arrayrecord_key)
    check_asked(reply, sent.asks)
    if reply.profile:  # What nobody asked for is not looked at.
        reply.profile = {n: reply.profile[n] for n in sent.asks if n in reply.profile}
    if looks:
        _look_at(strategy, Report(sent.client, reply.metrics, reply.profile))
    if reply.profile:
        check_profile(reply)
    if not strategy.keeps(round, sent.client, sent.straggler):
        raise Unfit("dropped", keys.STRAGGLER)
    return AcceptedReply(sent.client, reply, size, known, own)


def _look_at(strategy: WeightingStrategy, report: Report) -> None:
    """Let the method look at a reply; what it cannot take rejects the reply."""
    try:
        strategy.admit(report)
    except AggregationError:
        raise
    except Exception as error:
        log.debug("client %d", report.client, exc_info=True)
        raise AggregationError(
            f"{type(strategy).__name__}.admit cannot take it: "
            f"{type(error).__name__}: {error}"
        ) from error


def _screened(
    strategy: WeightingStrategy, now: Now, accepted: Mapping[int, AcceptedReply]
) -> Mapping[int, str]:
    """Let the method look at all replies; those that it names are rejected."""
    if not strategy.overrides("screen"):
        return {}
    reports = [
        Report(client, one.reply.metrics, one.reply.profile)
        for client, one in accepted.items()
    ]
    try:
        odd = strategy.screen(reports, now.method) or {}
        return {client: str(odd[client]) for client in accepted if client in odd}
    except Exception as error:
        log.debug("screen", exc_info=True)
        why = (
            f"{type(strategy).__name__}.screen cannot take the replies: "
            f"{type(error).__name__}: {error}"
        )
        return dict.fromkeys(accepted, why)
