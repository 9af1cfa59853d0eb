"""Who does how many steps in a chunk of clients, and with which examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...core.batches import num_batches
from ...core.layout import as_tensor
from ...core.rng import permutations
from .task import Task, Tasks

# A batch that is larger than this is no larger than it must be for the clients at hand:
# a size that is to mean "all examples" would take all memory.
WIDEST = 1 << 14

# Clients are shuffled together whose sizes are no further apart than this factor.
LIKE_SIZE = 1.5


@dataclass(frozen=True)
class Schedule:
    """Who does how many steps, and how full each step is.

    A client's steps follow one another without a gap, whatever the others do: its
    momentum must not notice them.

    Attributes
    ----------
    batch_size : int
        B: examples of a client in each step but its last ones.
    width : int
        Places for examples in a step: B, or B + 1 where somebody's last example has
        joined the batch before it.
    per_epoch, steps : ndarray
        ``[C]``: a client's steps in one pass, and in all.
    counts : Tensor
        ``[total, C]``: real examples of each client in each step, float32.
    ragged : bool
        Whether any step of any client is not full.
    ended : dict[int, list[int]]
        By step, the clients whose last step was the one before; not the last ones.
    passes : dict[int, list[tuple[list[int], int, int]]]
        By step, who begins a pass over the own data there: clients of one size
        together, with that size and the number of the pass.
    like_size : list of ndarray
        The clients in lists, in each of which the largest has at most
        :data:`LIKE_SIZE` times as many examples as the smallest.
    """

    batch_size: int
    width: int
    per_epoch: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    counts: Tensor
    ragged: bool
    ended: dict[int, list[int]]
    passes: dict[int, list[tuple[list[int], int, int]]]
    like_size: list[npt.NDArray[np.int64]]

    @classmethod
    def of(cls, tasks: Sequence[Task], batch_size: int, least: int) -> Schedule:
        """Lay out the steps of some clients."""
        columns = Tasks.of(tasks)
        sizes = columns.sizes
        if batch_size > WIDEST:  # By powers of 2: a step is made anew for each width.
            batch_size = min(batch_size, 1 << (int(sizes.max()) - 1).bit_length())
        # Clients are often of the same size.
        return _schedule(sizes.tobytes(), columns.epochs.tobytes(), batch_size, least)

    @property
    def total(self) -> int:
        """Steps of the chunk."""
        return self.counts.shape[0]

    def check(self, least: int) -> None:
        """Raise if a step has too few examples for the model."""
        if self.ragged and ((self.counts > 0) & (self.counts < least)).any():
            raise ValueError(
                f"Expected more than {least - 1} value per channel when training"
            )

    def fill(self, tasks: Sequence[Task], step: int, x: Tensor, y: Tensor) -> None:
        """Shuffle the data of the clients that begin a pass into ``x`` and ``y``."""
        for alike, orders in self._orders(tasks, step):
            steps = orders.shape[1]
            together = torch.from_numpy(orders.reshape(len(alike), -1))
            for k, order in zip(alike, together.unbind(), strict=True):
                examples = tasks[k].examples
                for source, target in ((examples.x, x), (examples.y, y)):
                    rows = target[k, :steps].flatten(0, 1)
                    torch.index_select(as_tensor(source), 0, order, out=rows)

    def _orders(
        self, tasks: Sequence[Task], step: int
    ) -> Iterator[tuple[list[int], npt.NDArray[np.int64]]]:
        """Yield who begins a pass, those of one size together, and what they take.

        The examples of each step of the pass, ``[K, steps, width]``. Padding is the
        client's own first one: it is masked, but a model need not be defined for
        examples that nobody has.
        """
        for alike, size, epoch in self.passes.get(step, ()):
            keys = Tasks.of(tasks).order_keys[alike]
            orders = permutations(keys, epoch, size)
            steps = int(self.per_epoch[alike[0]])
            before = (steps - 1) * self.batch_size
            if size == steps * self.width:  # Every step is full.
                yield alike, orders.reshape(len(alike), steps, self.width)
                continue
            rows = np.zeros((len(alike), steps, self.width), np.int64)
            full = len(alike), steps - 1, self.batch_size
            rows[:, :-1, : self.batch_size] = orders[:, :before].reshape(full)
            rows[:, -1, : size - before] = orders[:, before:]
            yield alike, rows

    def rows(
        self,
        tasks: Sequence[Task],
        first: Sequence[int] | npt.NDArray[np.int64],
    ) -> npt.NDArray[np.int64]:
        """Return the row of each example in a common array, ``[total, C, width]``.

        ``first`` is where each client's rows begin; padding points there, too.
        """
        rows = np.empty((self.total, len(tasks), self.width), np.int64)
        rows[:] = np.asarray(first)[:, None]
        if len(self.like_size) < len(self.passes[0]) / 2:
            self._add_orders(rows, Tasks.of(tasks))
            return rows
        for step in self.passes:
            for alike, orders in self._orders(tasks, step):
                these = alike if len(alike) < len(tasks) else slice(None)
                steps = orders.shape[1]
                rows[step : step + steps, these] += orders.transpose(1, 0, 2)
        return rows

    def _add_orders(self, rows: npt.NDArray[np.int64], tasks: Tasks) -> None:
        """Add to ``[total, C, width]`` what each step takes, of clients of many sizes.

        Those of like size are shuffled together.
        """
        flat, clients = rows.reshape(-1), len(tasks)
        for alike in self.like_size:
            for epoch in range(int(tasks.epochs[alike].max())):
                some = alike[tasks.epochs[alike] > epoch]
                sizes, per_epoch = tasks.sizes[some][:, None], self.per_epoch[some]
                orders = permutations(tasks.order_keys[some], epoch, sizes[:, 0])
                nth = np.arange(orders.shape[1])
                step = np.minimum(nth // self.batch_size, per_epoch[:, None] - 1)
                place = nth - step * self.batch_size
                step += epoch * per_epoch[:, None]
                place += (step * clients + some[:, None]) * self.width
                real = nth < sizes
                flat[place[real]] += orders[real]

    def batch(self, step: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return a step's batch of every client, x and y ``[C, width, ...]``."""
        place = step % self.per_epoch
        if (place == place[0]).all():
            return x[:, int(place[0])], y[:, int(place[0])]
        client, at = torch.arange(len(place)), torch.from_numpy(place)
        return x[client, at], y[client, at]

    def all_go_on(self, step: int, steps: int) -> bool:
        """Tell whether there are so many steps from one on, and nobody ends between."""
        between = range(step + 1, step + steps)
        return step + steps <= self.total and self.ended.keys().isdisjoint(between)


@lru_cache(maxsize=64)
def _schedule(sizes: bytes, epochs: bytes, batch_size: int, least: int) -> Schedule:
    examples, rounds = np.frombuffer(sizes, np.int64), np.frombuffer(epochs, np.int64)
    per_epoch = num_batches(examples, batch_size, least)
    steps = per_epoch * rounds
    step = np.arange(steps.max())[:, None]
    place = step % per_epoch
    left = np.where(
        place < per_epoch - 1, batch_size, examples - (per_epoch - 1) * batch_size
    )
    counts = left * (step < steps)
    width = max(batch_size, int(counts.max()))
    ended: dict[int, list[int]] = {}
    for k, end in enumerate(steps.tolist()):
        if end < len(counts):
            ended.setdefault(end, []).append(k)
    passes: dict[int, list[tuple[list[int], int, int]]] = {}
    by_size = np.argsort(examples, kind="stable")
    ends = np.flatnonzero(np.diff(examples[by_size])) + 1
    for alike in np.split(by_size, ends):
        several = rounds[alike]
        n, own_steps = int(examples[alike[0]]), int(per_epoch[alike[0]])
        for epoch in range(int(several.max())):
            busy = alike[several > epoch].tolist()
            passes.setdefault(epoch * own_steps, []).append((busy, n, epoch))
    return Schedule(
        batch_size,
        width,
        per_epoch,
        steps,
        torch.from_numpy(counts.astype(np.float32)),
        bool((counts != width).any()),
        ended,
        passes,
        _like_size(examples[by_size], by_size),
    )


def _like_size(
    sizes: npt.NDArray[np.int64], clients: npt.NDArray[np.int64]
) -> list[npt.NDArray[np.int64]]:
    """Cut clients, the smallest first, into lists of like size."""
    ends = [0]
    while ends[-1] < len(sizes):
        most = LIKE_SIZE * int(sizes[ends[-1]])
        ends.append(int(np.searchsorted(sizes, most, "right")))
    return [clients[begin:end] for begin, end in pairwise(ends)]
