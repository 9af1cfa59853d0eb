"""A step as a CUDA graph."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from ....core.limits import is_too_large

log = logging.getLogger("fedweight")


class Replayed:
    """A step that runs as a CUDA graph: one launch, however many kernels it has.

    A step of a small net is some fifty kernels of a few microseconds; to launch them
    one by one takes longer than to run them. A graph belongs to the memory that it was
    recorded with, which is that of the first call: state that is changed in place, and
    a batch that is filled anew. A call with other tensors runs the step as it is.

    Before it is recorded the step may not wait for the device, as when it copies from
    the host; before it is used the graph is compared with the step. If there is
    anything amiss a warning says so, and the step runs as it is. After a recording that
    broke off nothing is recorded any more in this process, as PyTorch's allocator does
    not recover from it altogether.

    Parameters
    ----------
    step : Callable
        Takes tensors and returns some; changes some of the given in place.
    """

    broken = False

    def __init__(self, step: Callable[..., list[Tensor]]) -> None:
        self._step = step
        self._places: list[int] = []
        self._replay: Callable[[], None] | None = None
        self._given: Sequence[Tensor] = ()
        self._results: list[Tensor] = []

    def __call__(self, *given: Tensor) -> list[Tensor]:
        """Run the step; a graph's results are overwritten by its next run."""
        places = [tensor.data_ptr() for tensor in given]
        if not self._places:
            self._places = places
            if not Replayed.broken:
                self._record(given)
        if self._replay is None or places != self._places:
            return self._step(*given)
        self._replay()
        return self._results

    def _record(self, given: Sequence[Tensor]) -> None:
        """Make the graph, which leaves the tensors as they are."""
        try:
            _warm_up(self._step, copy.deepcopy(given))
        except RuntimeError as error:
            if is_too_large(error):
                raise  # Not because it is a graph: fewer clients at once may do.
            log.warning("a training step cannot be a CUDA graph: %s", error)
            return
        try:
            replay, results = _recorded(lambda: self._step(*given))
        except RuntimeError as error:
            Replayed.broken = True
            log.warning("training steps are no CUDA graphs from now on: %s", error)
            return
        if self._does_the_same(given, replay, results):
            # The tensors are kept: the graph reads and writes their memory.
            self._replay, self._given, self._results = replay, given, results

    def _does_the_same(
        self,
        given: Sequence[Tensor],
        replay: Callable[[], None],
        results: Sequence[Tensor],
    ) -> bool:
        """Compare one run of the graph with one of the step; undo both."""
        try:
            before, expected = copy.deepcopy(given), copy.deepcopy(given)
            wanted = self._step(*expected)
            try:
                replay()
                pairs = zip((*given, *results), (*expected, *wanted), strict=True)
                same = all(_alike(found, right) for found, right in pairs)
            finally:
                for tensor, value in zip(given, before, strict=True):
                    tensor.copy_(value)
        except RuntimeError as error:
            if is_too_large(error):
                raise
            log.warning("a CUDA graph cannot be compared with its step: %s", error)
            return False
        if not same:
            log.warning("a step as a CUDA graph gave other values: not used.")
        return same


def _warm_up(step: Callable[..., object], given: Sequence[Tensor]) -> None:
    """Run a step as often as libraries need to prepare themselves for its stream.

    Raises
    ------
    RuntimeError
        If it waits for the device: a graph cannot.
    """
    stream, mode = _stream(), torch.cuda.get_sync_debug_mode()
    stream.wait_stream(torch.cuda.current_stream())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls what finds waiting a prototype.
        try:
            with torch.cuda.stream(stream):
                step(*given)
                torch.cuda.set_sync_debug_mode("error")
                step(*given)
                step(*given)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.current_stream().wait_stream(stream)


def _recorded(
    run: Callable[[], list[Tensor]],
) -> tuple[Callable[[], None], list[Tensor]]:
    """Return what repeats a run, and the tensors that hold its results."""
    graph, stream = torch.cuda.CUDAGraph(), _stream()
    # Outside, too: the inner context does not leave the stream where it breaks off.
    with (
        torch.cuda.stream(stream),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        results = run()
    return graph.replay, results


def _stream() -> torch.cuda.Stream:
    """Return the stream on which this device's graphs are recorded."""
    return _stream_of(torch.cuda.current_device())


@cache
def _stream_of(device: int) -> torch.cuda.Stream:
    # Libraries keep workspaces for each stream.
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _alike(found: Tensor, right: Tensor) -> bool:
    """Tell whether values are equal but for the order of sums on a GPU."""
    if not found.is_floating_point():
        return torch.equal(found, right)
    return torch.allclose(found, right, rtol=1e-4, atol=1e-5, equal_nan=True)
