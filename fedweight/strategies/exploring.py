"""Training before the first round, of which the method alone makes something."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from ..core.errors import AggregationError
from ..core.records import ClientRecord, RoundRecord
from ..core.threads import one_thread
from ..messages import keys
from ..messages import shared as told_to_all
from ..messages.arrays import FlatRecord
from ..messages.codecs import DENSE, num_bytes
from ..messages.dispatch import Cohort
from ..messages.grids import staged
from ..messages.shared import mask_among, shared_record
from .checks import checked_long
from .making import round_of
from .now import Asked, Now
from .receiving import sort
from .round import PerParameter, Round

if TYPE_CHECKING:
    from .base import WeightingStrategy


def explore(
    strategy: WeightingStrategy,
    now: Now,
    grid: Grid,
    config: ConfigRecord,
    record: RoundRecord,
    nodes: Mapping[int, int],
    epochs: int,
    start: Tensor | None,
    told_to: Callable[[int], Mapping[str, Tensor]] | None,
    timeout: float | None,
) -> Round:
    """Let some clients train; see :meth:`fedweight.server.phase.Population.train`.

    Parameters
    ----------
    config : ConfigRecord
        What clients are told in a round.
    record : RoundRecord
        Of round 0.
    nodes : Mapping[int, int]
        The clients' nodes, by their numbers.
    """
    whole = now.model
    assert whole is not None
    model = whole if start is None else whole.with_parameters(start)
    size = model.layout.num_parameters
    long = {
        name: checked_long("population.train", name, PerParameter(values), model)
        for name, values in (told_to(size) if told_to is not None else {}).items()
    }
    told = ConfigRecord({**config, keys.ROUND: 0, keys.LOCAL_EPOCHS: epochs})
    content = RecordDict(
        {
            strategy.arrayrecord_key: FlatRecord(model),
            strategy.configrecord_key: told,
            **({keys.SHARED: shared_record(long, model.layout)} if long else {}),
        }
    )
    mask = mask_among(long)
    now.bytes_down = num_bytes(DENSE, model.layout, mask)
    now.bytes_down += told_to_all.num_bytes([*long.values(), now.class_totals])
    now.bytes_up = num_bytes(strategy.codec, model.layout, mask)
    now.asked = {node: Asked(client, False, ()) for client, node in nodes.items()}
    now.cohort = Cohort(
        content,
        list(now.asked),
        MessageType.TRAIN,
        config_key=strategy.configrecord_key,
    )
    now.model, phase = model, RoundRecord(0)
    try:
        with staged(grid):  # What clients would keep of it is dropped.
            replies = grid.send_and_receive(now.cohort, timeout=timeout)
            with one_thread():
                accepted, models = sort(strategy, now, 0, replies, phase)
        _note(record, phase)
        now.errors.tell(0, phase.clients)
        if len(accepted) < min(strategy.min_replies, len(nodes)):
            raise AggregationError(
                f"before the first round {len(accepted)} of {len(nodes)} clients "
                f"trained, min_replies is {strategy.min_replies}; the log says why."
            )
        return round_of(strategy, now, 0, model, accepted, models, None)
    finally:
        now.model = whole


def _note(record: RoundRecord, phase: RoundRecord) -> None:
    """Add what a phase was to the record of round 0, a line for each client."""
    entries = {entry.client: entry for entry in record.clients}
    for new in phase.clients:
        old = entries.get(new.client)
        if old is None:
            record.clients.append(new)
            continue
        record.clients[record.clients.index(old)] = _added(old, new)
    record.clients.sort(key=lambda entry: entry.client)


def _added(old: ClientRecord, new: ClientRecord) -> ClientRecord:
    """Return what a client did in two phases: what failed counts."""
    worse = old if old.status != "ok" else new
    return replace(
        worse,
        bytes_down=old.bytes_down + new.bytes_down,
        bytes_up=old.bytes_up + new.bytes_up,
    )
