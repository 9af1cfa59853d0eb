"""What of a model no round changes: a client has it, and the server need not send it.

A client builds it with its model. Where that is not the server's (another machine may
draw other numbers, or lack a file), the server sends it once, with a query, and the
client keeps it in its state.
"""

from __future__ import annotations

from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from ..core.errors import AggregationError, ClientError
from ..core.layout import Base
from ..messages import keys
from ..messages.arrays import flatten
from ..messages.records import records_of


def base_of(own: Base, told: ConfigRecord, state: RecordDict) -> Base:
    """Return the base that the server means.

    Parameters
    ----------
    own : Base
        What the client has built.
    told : ConfigRecord
        With the digest of the server's, or nothing of it.
    state : RecordDict
        The client's, with what the server may have sent.

    Raises
    ------
    ClientError
        If the client has no base of that digest.
    """
    digest = told.get(keys.BASE)
    if digest is None or digest == own.digest:
        return own
    sent = _sent(own, state)
    if sent is not None and sent.digest == digest:
        return sent
    raise ClientError(
        f"{keys.OTHER_BASE}: they have the digest {own.digest[:12]}, and the server's "
        f"have {str(digest)[:12]}. The server sends them before the next round; in a "
        "simulation, let 'model' build the same weights each time."
    )


def take_base(own: Base, message: Message, state: RecordDict) -> Message:
    """Answer whether the client has the server's base; keep it where it comes along."""
    configs = records_of(message.content, ConfigRecord)
    told: Any = next(iter(configs.values()), ConfigRecord())
    records = list(records_of(message.content, ArrayRecord).values())
    before = state.get(keys.BASE)
    if records:
        state[keys.BASE] = records[0]
    try:
        base_of(own, told, state)
        has = True
    except (ClientError, AggregationError):
        has = False
        if records and before is None:
            del state[keys.BASE]
        elif before is not None:
            state[keys.BASE] = before
    answer = ConfigRecord({keys.BASE: has})
    return Message(RecordDict({keys.BASE: answer}), reply_to=message)


def _sent(own: Base, state: RecordDict) -> Base | None:
    """Return what the server has sent, if it fits the client's model."""
    record: Any = state.get(keys.BASE)
    if record is None:
        return None
    whose = {"given": "the server's base", "expected": "this client's model"}
    return Base(own.layout, flatten(record, own.alone.layout, **whose).frozen)
