"""What clients keep from round to round: personal models, and what objectives carry.

In a simulation it lies in the engine's store, which a client's context brings along; on
a device each client has it in its Flower context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from ..core.client_store import ClientRows
from ..core.errors import ClientError
from ..core.layout import FlatModel, Layout, as_tensor
from .client_tasks import ClientTask
from .steps.results import carried_of, columns_of, models_of
from .steps.task import LocalResult

# Whose it is: that of local training, or of the personal model's.
Owner = Literal["objective", "personal"]

# What of a model is kept: not what is frozen, which all have in common.
PARAMETERS, BUFFERS, INTEGERS = "parameters", "buffers", "integer "

# How names of what is carried begin, and of what is kept of each example.
CARRY, KEPT = "carry ", "kept "

Named = Mapping[str, Tensor]


class KeepsRows(Protocol):
    """Where clients keep something; see :class:`fedweight.core.client_store`."""

    def read(
        self,
        table: str,
        clients: npt.NDArray[np.int64],
        beginning: tuple[str, ...] = ("",),
    ) -> ClientRows:
        """Return what some clients keep."""
        ...

    def write(self, table: str, rows: ClientRows) -> None:
        """Let clients keep something."""
        ...


class OwnStates:
    """Where clients on devices keep something: each in its Flower context.

    Parameters
    ----------
    states : Mapping[int, RecordDict]
        The contexts' state, by the client's number.
    """

    def __init__(self, states: Mapping[int, RecordDict]) -> None:
        self.states = states

    def read(
        self,
        table: str,
        clients: npt.NDArray[np.int64],
        beginning: tuple[str, ...] = ("",),
    ) -> ClientRows:
        """Return what those of some clients keep who keep something."""
        has = [c for c in clients.tolist() if table in self.states[c]]
        records: list[Any] = [self.states[c][table] for c in has]
        parts: dict[str, list[npt.NDArray[Any]]] = {}
        for record in records:
            for name, array in record.items():
                if name.startswith(beginning):
                    parts.setdefault(name, []).append(array.numpy())
        items = {n: arrays for n, arrays in parts.items() if n.startswith(KEPT)}
        return ClientRows(
            np.array(has, np.int64),
            {n: np.stack(arrays) for n, arrays in parts.items() if n not in items},
            {n: np.concatenate(arrays) for n, arrays in items.items()},
            np.array([len(a) for a in next(iter(items.values()), [])], np.int64),
        )

    def write(self, table: str, rows: ClientRows) -> None:
        """Let clients keep something, in place of what they have kept before."""
        ends = rows.ends
        for k, client in enumerate(rows.clients.tolist()):
            own = slice(int(ends[k] - rows.lengths[k]), int(ends[k]))
            arrays = {name: values[k] for name, values in rows.arrays.items()}
            arrays |= {name: values[own] for name, values in rows.items.items()}
            self.states[client][table] = ArrayRecord(
                {name: Array(np.array(values)) for name, values in arrays.items()}
            )


def keeper_of(clients: Sequence[ClientTask]) -> KeepsRows:
    """Return where some clients keep something."""
    store: KeepsRows | None = getattr(clients[0].context, "store", None)
    if store is not None:
        return store
    return OwnStates({client.number: client.context.state for client in clients})


def read_carried(
    clients: Sequence[ClientTask], owner: Owner
) -> dict[int, tuple[Named | None, Named]]:
    """Return what clients carry, and keep of their examples, from earlier rounds.

    By the client's number, of those who do. What is carried is ``None`` where that is
    nothing.
    """
    rows = keeper_of(clients).read(owner, _numbers(clients), (CARRY, KEPT))
    carries = {
        name.removeprefix(CARRY): as_tensor(values)
        for name, values in rows.arrays.items()
    }
    kept = {
        name.removeprefix(KEPT): np.split(values, rows.ends[:-1])
        for name, values in rows.items.items()
    }
    return {
        client: (
            {name: values[k] for name, values in carries.items()} or None,
            {name: as_tensor(parts[k]) for name, parts in kept.items()},
        )
        for k, client in enumerate(rows.clients.tolist())
    }


def read_models(
    clients: Sequence[ClientTask], layout: Layout, frozen: Tensor
) -> dict[int, FlatModel]:
    """Return personal models by the client's number, of those who have one.

    Parameters
    ----------
    clients : Sequence[ClientTask]
        Whose.
    layout : Layout
        The models'.
    frozen : Tensor
        ``[F]``: the values that all models have in common.
    """
    beginning = (PARAMETERS, BUFFERS, INTEGERS)
    rows = keeper_of(clients).read("personal", _numbers(clients), beginning)
    if not len(rows.clients):
        return {}
    parameters = as_tensor(rows.arrays[PARAMETERS])
    buffers = as_tensor(rows.arrays[BUFFERS])
    sizes = parameters.shape[1], buffers.shape[1]
    if sizes != (layout.num_parameters, layout.num_buffers):
        raise ClientError(
            f"its personal model has {sizes[0]} parameters and {sizes[1]} values in "
            f"buffers, and the model has {layout.num_parameters} and "
            f"{layout.num_buffers}. The model must stay the same over the rounds."
        )
    integers = {
        name.removeprefix(INTEGERS): values
        for name, values in rows.arrays.items()
        if name.startswith(INTEGERS)
    }
    return {
        client: FlatModel(
            layout,
            parameters[k],
            buffers[k],
            {name: np.asarray(values[k]) for name, values in integers.items()},
            frozen,
        )
        for k, client in enumerate(rows.clients.tolist())
    }


def write_results(
    clients: Sequence[ClientTask],
    results: Sequence[LocalResult],
    owner: Owner,
    *,
    models: bool = False,
) -> None:
    """Let clients who trained take along what they carry, and their models if wanted.

    Raises
    ------
    ClientError
        If clients carry different things.
    """
    _, _, steps = columns_of(results)
    some = [k for k, number in enumerate(steps) if number]
    if not some:
        return
    own, carried = [clients[k] for k in some], carried_of(results)
    carries, kept = zip(*(carried[k] for k in some), strict=True)
    arrays = {CARRY + n: v for n, v in _joined(carries).items()}
    if models:
        every = models_of(results)
        made = [every[k] for k in some]
        arrays[PARAMETERS] = torch.stack([m.parameters for m in made]).numpy()
        arrays[BUFFERS] = torch.stack([m.buffers for m in made]).numpy()
        for name in made[0].integers:
            values = [np.asarray(m.integers[name]) for m in made]
            arrays[INTEGERS + name] = np.stack(values)
    items = _joined(kept, torch.cat)
    if arrays or items:
        lengths = [len(next(iter(one.values()), ())) for one in kept]
        rows = ClientRows(
            _numbers(own),
            arrays,
            {KEPT + name: values for name, values in items.items()},
            np.array(lengths, np.int64),
        )
        keeper_of(own).write(owner, rows)


def _joined(parts: Sequence[Named], join: Any = torch.stack) -> dict[str, Any]:
    """Return what several clients carry as arrays, by name."""
    try:
        if any(part.keys() != parts[0].keys() for part in parts):
            raise RuntimeError(f"{sorted({n for part in parts for n in part})}")
        return {name: join([p[name] for p in parts]).numpy() for name in parts[0]}
    except RuntimeError as error:
        raise ClientError(
            "objective: clients carry different things from round to round; names and "
            f"shapes must be the same for all: {error}"
        ) from error


def _numbers(clients: Sequence[ClientTask]) -> npt.NDArray[np.int64]:
    return np.array([client.number for client in clients], np.int64)
