"""What a stopped run goes on from: all that is carried between rounds, in one file.

But for what clients keep: that lies beside it (:mod:`fedweight.core.client_store`).

It holds tensors and a text, and nothing that is executed when it is read.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..core.errors import ConfigurationError, DataError
from ..core.state import pack, unpack
from ..messages.arrays import view
from .wrapped import inner_strategies

FORMAT = "2"


class Carries(Protocol):
    """A strategy whose state is one value."""

    @property
    def state(self) -> Any:
        """What it carries from round to round."""
        ...

    def restore(self, state: Any) -> None:
        """Take over what another one carried."""
        ...


# ------------------------------------------------------------------------------- file


def write(content: Mapping[str, Any]) -> bytes:
    """Return a checkpoint's bytes.

    Parameters
    ----------
    content : Mapping[str, Any]
        Values that :func:`~fedweight.core.state.pack` takes.
    """
    text, tensors = pack(dict(content), "checkpoint")
    described = {"format": FORMAT, "state": text, "digest": _digest(text, tensors)}
    return save(tensors, metadata=described)


def read(path: Path) -> dict[str, Any]:
    """Return what was written to a checkpoint.

    Raises
    ------
    DataError
        If the file is missing, truncated, altered, or no checkpoint of this version.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing: there is no checkpoint to go on from.")
    try:
        with safe_open(path, "pt") as file:
            described = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(
            f"{path} is no whole checkpoint: {' '.join(str(error).split())}."
        ) from error
    if described.keys() != {"format", "state", "digest"}:
        raise DataError(f"{path} is no checkpoint of fedweight.")
    if described["format"] != FORMAT:
        raise DataError(
            f"{path} has format {described['format']}; this version reads {FORMAT}."
        )
    if described["digest"] != _digest(described["state"], tensors):
        raise DataError(f"{path} has been altered since it was written.")
    content = unpack(described["state"], tensors)
    assert isinstance(content, dict)
    return content


def _digest(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors, key=int):
        if tensors[name].numel():  # An empty one may have any strides.
            values = tensors[name].reshape(-1).view(torch.uint8).numpy()
            digest.update(values.data)
    return digest.hexdigest()


# ---------------------------------------------------------------------------- records

_RECORDS = {"arrays": ArrayRecord, "config": ConfigRecord, "metrics": MetricRecord}


def plain_record(record: ArrayRecord | ConfigRecord | MetricRecord) -> dict[str, Any]:
    """Return a record's kind and content as plain values."""
    if isinstance(record, ArrayRecord):
        items: Any = {name: np.array(view(array)) for name, array in record.items()}
        return {"kind": "arrays", "items": items}
    kind = "config" if isinstance(record, ConfigRecord) else "metrics"
    return {"kind": kind, "items": dict(record)}


def record_of(plain: Mapping[str, Any]) -> ArrayRecord | ConfigRecord | MetricRecord:
    """Return the record that :func:`plain_record` was given."""
    items = dict(plain["items"])
    if plain["kind"] == "arrays":
        return ArrayRecord({name: Array(values) for name, values in items.items()})
    made: ConfigRecord | MetricRecord = _RECORDS[plain["kind"]](items)
    return made


def plain_records(records: RecordDict) -> dict[str, Any]:
    """Return what a client keeps as plain values."""
    return {name: plain_record(record) for name, record in records.items()}


def records_of(plain: Mapping[str, Any]) -> RecordDict:
    """Return what :func:`plain_records` was given."""
    return RecordDict({name: record_of(record) for name, record in plain.items()})


# ------------------------------------------------------------------------- strategies


def _carries(strategy: Any) -> TypeGuard[Carries]:
    """Tell whether a strategy's own class has a state, not one that it wraps."""
    own = type(strategy)
    return hasattr(own, "state") and hasattr(own, "restore")


def carried_by(strategy: Strategy) -> Any:
    """Return what a strategy carries from round to round, as plain values.

    Of one that does not tell, its attributes that can be written down, those of the
    strategies inside it included, and what the process's random streams are at: such a
    strategy draws from those.
    """
    if _carries(strategy):
        return strategy.state
    return {"attributes": _attributes(strategy), "streams": _streams()}


def give_back(strategy: Strategy, carried: Any) -> None:
    """Let a strategy of the same options go on with what another one carried."""
    if _carries(strategy):
        strategy.restore(carried)
        return
    _set_attributes(strategy, carried["attributes"])
    own, numpys = carried["streams"]["random"], carried["streams"]["numpy"]
    random.setstate(own)
    np.random.set_state(numpys)  # noqa: NPY002


def not_carried(strategy: Strategy) -> list[str]:
    """Return the attributes that a checkpoint cannot hold, if they change.

    Functions, and what the constructor was given, do not.
    """
    if _carries(strategy):
        return []
    odd, inside = [], inner_strategies(strategy)
    for name, value in vars(strategy).items():
        if name in inside:
            odd += [f"{name}.{inner}" for inner in not_carried(inside[name])]
        elif not callable(value) and not _is_plain(value):
            odd.append(name)
    return odd


def _streams() -> dict[str, Any]:
    return {"random": random.getstate(), "numpy": np.random.get_state()}  # noqa: NPY002


def _attributes(strategy: Strategy) -> dict[str, Any]:
    found: dict[str, Any] = {}
    inside = inner_strategies(strategy)
    for name, value in vars(strategy).items():
        if name in inside:
            if _carries(value):
                found[name] = {"carried": value.state}
            else:
                found[name] = {"strategy": _attributes(value)}
        elif isinstance(value, ArrayRecord | ConfigRecord | MetricRecord):
            found[name] = {"record": plain_record(value)}
        elif not callable(value) and _is_plain(value):
            found[name] = {"value": value}
    return found


def _set_attributes(strategy: Strategy, found: Mapping[str, Any]) -> None:
    for name, ((kind, value),) in ((n, v.items()) for n, v in found.items()):
        if kind == "carried":
            getattr(strategy, name).restore(value)
        elif kind == "strategy":
            _set_attributes(getattr(strategy, name), value)
        elif kind == "record":
            setattr(strategy, name, record_of(value))
        else:
            setattr(strategy, name, value)


def _is_plain(value: Any) -> bool:
    try:
        pack(value)
    except ConfigurationError:
        return isinstance(value, ArrayRecord | ConfigRecord | MetricRecord)
    return True
