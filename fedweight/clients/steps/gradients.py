"""Gradients by PyTorch's public functions alone.

In place of :func:`._torch.differentiation.grad`, which knows more and starts faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .client_step import Found

T = TypeVar("T")

Function = Callable[..., tuple[Tensor, T]]
Differentiated = Callable[..., tuple[list[Tensor], T]]


def plain_grad(function: Function[T], with_gradient: list[int]) -> Differentiated[T]:
    """Return what returns the gradients by a function's first argument.

    By autograd, for one client: it cannot be batched. The arguments are those of
    :func:`._torch.differentiation.grad`.
    """

    def differentiated(given: list[Tensor], *others: Any) -> tuple[list[Tensor], T]:
        with torch.enable_grad():
            by = [tensor.detach().clone().requires_grad_() for tensor in given]
            value, besides = function(by, *others)
            found: list[Tensor | None] = [
                *torch.autograd.grad(value, by, allow_unused=True)
            ]
        with_gradient[:] = [k for k, g in enumerate(found) if g is not None]
        return [g for g in found if g is not None], besides

    return differentiated


class Grad(Protocol):
    """Returns what returns the gradients by a function's first argument."""

    def __call__(
        self, function: Function[T], with_gradient: list[int]
    ) -> Differentiated[T]:
        """Return it; ``with_gradient`` is told of what there are any."""


def public_grad(known: Found) -> Grad:
    """Return a way to gradients that can be batched, by ``torch.func.grad``.

    Parameters
    ----------
    known : Found
        What the loss depends on: this does not tell a gradient of 0 from none.
    """

    def grad(function: Function[T], with_gradient: list[int]) -> Differentiated[T]:
        def differentiated(by: list[Tensor], *others: Any) -> tuple[list[Tensor], T]:
            of: Any = torch.func.grad(function, has_aux=True)
            gradients, besides = of(by, *others)
            with_gradient[:] = known.with_gradient
            return [gradients[k] for k in known.with_gradient], besides

        return differentiated

    return grad
