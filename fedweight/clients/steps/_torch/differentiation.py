"""Gradients, and what cannot be batched, by what PyTorch keeps to itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def grad(
    function: Callable[..., tuple[Tensor, T]], with_gradient: list[int]
) -> Callable[..., tuple[list[Tensor], T]]:
    """Return what returns the gradients by a function's first argument.

    ``torch.func.grad(function, has_aux=True)``, but for two things. That one imports
    PyTorch's compiler to tell it that there is nothing to compile: a second, at every
    start. And it does not tell a gradient of 0 from none.

    Parameters
    ----------
    function : Callable
        Takes a list of tensors, and more; returns a scalar, and something besides.
    with_gradient : list[int]
        Is told which of the tensors the scalar depends on: only these have a gradient.
    """
    from torch._functorch.eager_transforms import (
        _create_differentiable,
        _undo_create_differentiable,
        _wrap_all_tensors,
        grad_increment_nesting,
    )

    def differentiated(*given: Any) -> tuple[list[Tensor], T]:
        with grad_increment_nesting() as level, torch.enable_grad():
            by, *others = _wrap_all_tensors(given, level)
            for tensor in by:
                _create_differentiable(tensor, level)
            value, besides = function(by, *others)
            found = torch.autograd.grad(value, by, create_graph=True, allow_unused=True)
            with_gradient[:] = [k for k, g in enumerate(found) if g is not None]
            undo: Callable[..., Any] = _undo_create_differentiable
            some = [found[k] for k in with_gradient]
            gradients, besides = undo((some, besides), level)
        return gradients, besides

    return differentiated


@contextmanager
def plain_attention() -> Iterator[None]:
    """Let attention be made of operations that can be batched, in all threads.

    PyTorch's fused one on a CPU goes from client to client. So it does where PyTorch
    does not let one choose any more.
    """
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield
