"""A recorded step without Python, by TorchScript."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from .recording import tensors_in

log = logging.getLogger("fedweight")

# So many operations are few.
FEW = 200


def without_python(
    traced: fx.GraphModule, examples: Sequence[Tensor]
) -> Callable[..., Any]:
    """Return a traced function that runs without the interpreter.

    So threads do not wait for each other between operations. The operations and their
    bits are the same. TorchScript does it; where it cannot, as with a convolution's
    gradient, Python goes on.
    """
    step = _scripted(traced, examples)
    return traced.forward if step is None else step


def _scripted(
    module: nn.Module, examples: Sequence[Any], read: Sequence[Tensor] = ()
) -> Callable[..., Any] | None:
    """Return a module as TorchScript, or ``None`` where that cannot be.

    PyTorch has announced to drop it. Whatever is not there any more, or does not do
    what the module does, leads to ``None``, and training is slower. The examples are
    changed as the module changes them; those in ``read`` it only reads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It is deprecated; nothing else does this.
        try:
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                scripted: Callable[..., Any] = torch.jit.trace(  # type: ignore[no-untyped-call]
                    module, tuple(examples), check_trace=False, _store_inputs=False
                )
                others = copy.deepcopy(examples, {id(t): t for t in read})
                found, wanted = scripted(*examples), module(*others)
        except Exception as error:
            log.debug("a training step or a loop of some runs in Python: %s", error)
            return None
    pairs = zip(
        tensors_in((examples, found)), tensors_in((others, wanted)), strict=True
    )
    if all(map(_identical, *zip(*pairs, strict=True))):
        return scripted
    log.warning("a training step as TorchScript gave other values: not used.")
    return None


def _identical(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors have the same values, of which some may be NaN."""
    if one is other:  # Only read: perhaps the examples of all clients.
        return True
    return bool(((one == other) | ((one != one) & (other != other))).all())


def gather(
    data: Sequence[Tensor], rows: Tensor, batch: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Fill ``batch``, ``[C, B, ...]`` each, with rows ``[C, B]`` of the data."""
    for whole, part in zip(data, batch, strict=True):
        torch.index_select(whole, 0, rows.view(-1), out=part.flatten(0, 1))
    return batch


def has_few_operations(step: Callable[..., Any]) -> bool:
    """Tell whether a step is without Python, and no longer than a small net's."""
    graph: Any = getattr(step, "inlined_graph", None)
    if graph is None:
        return False
    kinds: list[str] = [node.kind() for node in graph.nodes()]
    return sum(kind.startswith("aten::") for kind in kinds) <= FEW


def several(
    step: Callable[..., Any], examples: Sequence[Any]
) -> Callable[..., Any] | None:
    """Return some steps in one call, with batches that are rows of common arrays.

    What the interpreter does for each call is a tenth of a small step, and the other
    threads wait for it. ``None`` is returned where it cannot be.

    Parameters
    ----------
    step : Callable
        A step that :func:`without_python` made, and that changes its state in place.
    examples : Sequence
        What the result will be called with, in these shapes: the step's state; the
        data and the batch as for :func:`gather`; the batches' rows, ``[steps, C, B]``;
        what all steps take, and a tuple of what each takes, ``[steps, ...]``.
    """
    _, data, *_ = examples
    return _scripted(_Several(step), examples, data)


class _Several(nn.Module):
    """TorchScript wants a module around what it calls."""

    def __init__(self, step: Callable[..., Any]) -> None:
        super().__init__()
        self.step = step

    def forward(
        self,
        state: Sequence[Tensor],
        data: Sequence[Tensor],
        batch: Sequence[Tensor],
        rows: Tensor,
        shared: Tensor,
        of_steps: Sequence[Tensor],
    ) -> Tensor:
        for k in range(len(rows)):
            gather(data, rows[k], batch)
            self.step(*state, *batch, shared, *(values[k] for values in of_steps))
        return rows  # A trace must return something.


def plain_execution() -> AbstractContextManager[None]:
    """Return a context in which TorchScript runs what was traced, as it was traced.

    It would measure the first calls and change later ones, and perhaps their bits.
    """
    execution: Any = getattr(torch.jit, "optimized_execution", None)
    return execution(False) if _can_be_entered(execution) else nullcontext()


@cache
def _can_be_entered(execution: Any) -> bool:
    """Tell whether that works; if not, nothing has been made TorchScript either."""
    try:
        with execution(False):
            return True
    except Exception:
        return False
