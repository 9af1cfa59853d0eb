"""Examples for trials of a model, of the first clients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from flwr.app import Context, RecordDict

from ..data.examples import Examples
from ..data.federated import ClientData

log = logging.getLogger("fedweight")

# Different examples that a trial wants.
ROWS = 4

# The shape of an input, and its dtype.
Kind = tuple[tuple[int, ...], str]

# So many clients are asked for examples, and so many trials are made.
ASKED = 20
TRIALS = 3


def kind_of(examples: Examples) -> Kind:
    """Return the kind of some examples' inputs."""
    return examples.x.shape[1:], examples.x.dtype.str


class Samples:
    """Examples for trials, of the first clients.

    They are the same whichever client a trial is about: it must not depend on who
    came first.

    Parameters
    ----------
    data : Callable[[Context], ClientData]
        Returns a client's data.
    context : Context
        Of a client. In a simulation, where clients have numbers, the examples are
        those of the largest client, or of the first ones.
    sizes : Sequence[int], optional
        How many examples clients have.
    """

    def __init__(
        self,
        data: Callable[[Context], ClientData],
        context: Context,
        sizes: Sequence[int] | npt.NDArray[np.int64] | None,
    ) -> None:
        self.data = data
        self.context = context
        self.sizes = sizes

    def kind(self) -> Kind | None:
        """Return what their inputs are; ``None`` if nobody has examples."""
        return next((kind_of(part) for part in self._parts()), None)

    def of(self, kind: Kind, own: Examples | None = None) -> Iterator[Examples]:
        """Yield :data:`ROWS` examples of a kind at a time, a few times.

        ``own`` are a client's own, for where the others have none.
        """
        few: list[Examples] = []
        given = 0
        for part in self._parts():
            if kind_of(part) == kind and given < TRIALS:
                some = _distinct(part)
                if len(some) == ROWS:
                    given += 1
                    yield some
                else:
                    few.append(some)
        if own is not None and not given:
            few.append(_distinct(own))
        if sum(map(len, few)):
            x, y = (np.concatenate([getattr(f, name) for f in few]) for name in "xy")
            attributes = {
                name: np.concatenate([part.attributes[name] for part in few])
                for name in few[0].attributes
                if all(name in part.attributes for part in few)
            }
            rows = np.resize(np.arange(len(y)), ROWS)  # Some twice, if need be.
            yield Examples(x, y, attributes).take(rows)

    def _parts(self) -> Iterator[Examples]:
        """Yield the examples of some clients that have any."""
        for context in self._contexts():
            try:
                part = self.data(context).train
            except Exception as error:  # It will be that client's error.
                log.debug("a trial has no examples of a client: %s", error)
                continue
            if len(part):
                yield part

    def _contexts(self) -> Iterator[Context]:
        """Yield contexts of clients whose data are within reach."""
        config = self.context.node_config
        if "partition-id" not in config:
            yield self.context
            return
        clients = range(min(int(config.get("num-partitions", 1)), ASKED))
        if self.sizes is not None and len(self.sizes):
            largest = int(np.argmax(self.sizes))
            clients = range(largest, largest + 1)
        for client in clients:
            yield Context(
                run_id=self.context.run_id,
                node_id=self.context.node_id,
                node_config={**config, "partition-id": client},
                state=RecordDict(),
                run_config=self.context.run_config,
            )


def _distinct(examples: Examples) -> Examples:
    """Return a few examples with labels and finite values, no two of them equal."""
    some = examples.take(slice(16 * ROWS))
    values = some.x.reshape(len(some), -1)
    targets = some.y.reshape(len(some), -1)
    known = np.isfinite(targets) if targets.dtype.kind == "f" else targets >= 0
    good = known.all(1) & np.isfinite(values).all(1)
    rows = np.flatnonzero(good)
    if values.size:
        _, first = np.unique(values[rows], axis=0, return_index=True)
        rows = rows[np.sort(first)]
    return some.take(rows[:ROWS])
