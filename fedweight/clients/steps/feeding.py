"""Where the batches of a chunk of clients come from."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...core.layout import as_tensor
from ...data.parts import Parts
from ._torch.torchscript import gather
from .memory import allocate_examples, kind_of_buffer
from .schedule import Schedule
from .task import Task, Tasks

log = logging.getLogger("fedweight")

# Returns examples of a size, to fill, like some of them.
Allocate = Callable[[Sequence[int], tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]

# Data stay on a GPU if they take no more than this share of what is free there.
SHARE_OF_DATA = 0.5


@dataclass(frozen=True)
class Gathering:
    """Feeds each step from common arrays.

    Attributes
    ----------
    data : tuple[Tensor, Tensor]
        All examples, x and y.
    batch : tuple[Tensor, Tensor]
        ``[C, B, ...]`` each, filled anew for each step.
    rows : Tensor
        ``[total, C, B]``: which examples.
    """

    data: tuple[Tensor, Tensor]
    batch: tuple[Tensor, Tensor]
    rows: Tensor

    def __call__(self, step: int) -> Sequence[Tensor]:
        """Return a step's batch, x and y."""
        return gather(self.data, self.rows[step], self.batch)

    def of(self, steps: slice) -> tuple[Any, ...]:
        """Return what several steps are fed from."""
        return self.data, self.batch, self.rows[steps]


class Feeder:
    """Feeds steps with clients' examples, in buffers of each thread.

    Parameters
    ----------
    device : torch.device
        Where steps are made.
    keeps : bool
        Whether data that all clients share are put there, to stay.
    """

    def __init__(self, device: torch.device, *, keeps: bool) -> None:
        self.device = device
        self.keeps = keeps
        self._own = threading.local()
        # By address; None where the device has no memory.
        self._on_device: dict[
            tuple[int, int], tuple[SharedArrays, tuple[Tensor, Tensor] | None]
        ] = {}

    def feed(
        self, tasks: Sequence[Task], plan: Schedule, allocate: Allocate | None = None
    ) -> Callable[[int], Sequence[Tensor]]:
        """Return what gives each step its batch, x and y, ``[C, width, ...]`` each.

        What is gathered on the device lies in what ``allocate`` gives; by default in
        buffers of this thread.
        """
        allocate = allocate or self._buffers_for
        shared = shared_arrays(tasks)
        data = None if shared is None else self._resident(shared)
        if shared is not None and data is not None:
            rows = torch.from_numpy(plan.rows(tasks, shared.first)).to(self.device)
            return Gathering(data, allocate(rows.shape[1:], data), rows)
        size = (len(tasks), int(plan.per_epoch.max()), plan.width)
        own = tasks[0].examples
        x_all, y_all = self._buffers_for(size, (as_tensor(own.x), as_tensor(own.y)))

        def shuffled(step: int) -> tuple[Tensor, Tensor]:
            plan.fill(tasks, step, x_all, y_all)
            x, y = plan.batch(step, x_all, y_all)
            return x.to(self.device), y.to(self.device)

        return shuffled

    def _resident(self, shared: SharedArrays) -> tuple[Tensor, Tensor] | None:
        """Return all data as they lie on the device, where they are put if they fit."""
        own = as_tensor(shared.x), as_tensor(shared.y)
        if self.device.type == "cpu" and not self.keeps:
            return own
        place = address(shared.x), address(shared.y)
        if place not in self._on_device:
            size, free = shared.x.nbytes + shared.y.nbytes, free_bytes(self.device)
            values = None
            if size <= SHARE_OF_DATA * free:
                values = own[0].to(self.device), own[1].to(self.device)
            else:
                log.warning(
                    "the clients' data, %.3g GB, do not stay on %s, where %.3g GB are "
                    "free: what each step needs is copied there",
                    size / 1e9,
                    self.device,
                    free / 1e9,
                )
            self._on_device[place] = (shared, values)
        return self._on_device[place][1]

    def _buffers_for(
        self, size: Sequence[int], like: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return this thread's ``x [*size, ...]`` and ``y [*size, ...]``, to fill."""
        key = kind_of_buffer(size, like)
        if getattr(self._own, "key", None) != key:
            self._own.examples = allocate_examples(size, like)
            self._own.key = key
        examples: tuple[Tensor, Tensor] = self._own.examples
        return examples


def shared_array(
    arrays: Sequence[npt.NDArray[Any]],
) -> tuple[npt.NDArray[Any], list[int]] | None:
    """Return the array whose rows some arrays are, and which row is each one's first.

    Clients' data are slices of the data set's. The result has the arrays' shape but
    for the rows, whatever shape the memory had before: what came from another process
    lies in a vector. ``None`` is returned where the arrays have no common array.

    Examples
    --------
    >>> everybody = np.zeros((10, 3))
    >>> whole, first = shared_array([everybody[4:6], everybody[:4]])
    >>> whole is everybody, first
    (True, [4, 0])
    """
    whole, shape = _base(arrays[0]), arrays[0].shape[1:]
    bytes_of_row = whole.itemsize * math.prod(shape)
    if not bytes_of_row or whole.nbytes % bytes_of_row or not whole.flags.c_contiguous:
        return None
    for array in arrays:
        fits = array.dtype == whole.dtype and array.shape[1:] == shape
        if not fits or not array.flags.c_contiguous or _base(array) is not whole:
            return None
    begin = address(whole)
    places = [divmod(address(array) - begin, bytes_of_row) for array in arrays]
    if any(rest for _, rest in places):
        return None
    if whole.shape[1:] != shape:
        whole = whole.reshape(-1, *shape)
    return whole, [row for row, _ in places]


def _base(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the array that an array is a view of, perhaps itself."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def address(array: npt.NDArray[Any]) -> int:
    """Return where an array's memory begins."""
    place: int = array.__array_interface__["data"][0]
    return place


@dataclass(frozen=True)
class SharedArrays:
    """The arrays that all clients' examples are rows of, and where each one begins."""

    x: npt.NDArray[Any]
    y: npt.NDArray[Any]
    first: Sequence[int] | npt.NDArray[np.int64]


def shared_arrays(tasks: Sequence[Task]) -> SharedArrays | None:
    """Return what the examples of several clients are rows of, if that is the same."""
    if len(tasks) == 1:
        return None
    if isinstance(tasks, Tasks) and isinstance(tasks.examples, Parts):
        parts = tasks.examples
        return SharedArrays(parts.whole.x, parts.whole.y, parts.first)
    x = shared_array([task.examples.x for task in tasks])
    y = shared_array([task.examples.y for task in tasks])
    if x is None or y is None or x[1] != y[1]:
        return None
    return SharedArrays(x[0], y[0], x[1])


def free_bytes(device: torch.device) -> float:
    """Return how much of a device's memory nobody has taken, as far as is known."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return free
