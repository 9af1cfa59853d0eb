"""A model by its name, with weights of a seed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import ConfigurationError, check_range
from ..core.memory import check_memory
from ..core.options import check_options, options_of
from ..core.registry import check_callable, make
from ..core.rng import Purpose, torch_seed
from ..core.texts import shown
from . import MODELS
from .adapters import ADAPTERS
from .weights import has_tensors_of, load_weights

# A matrix of so many values or more is looked at before it is made.
LARGE = 10**8

# A run holds a model at least so often: the global one, a client's, and its gradient.
COPIES = 3


def build(
    name: str,
    input_shape: Sequence[int],
    num_classes: int,
    *,
    seed: int | None = None,
    adapters: str = "none",
    weights: str | Path = "",
    **options: Any,
) -> nn.Module:
    """Build a model with fresh weights.

    Parameters
    ----------
    name : str
        One of :func:`~fedweight.models.catalogue`, or ``"module:function"`` for one of
        your own: it is called as ``function(input_shape, num_classes, **options)``.
    input_shape : sequence of int
        The shape of one example, such as ``(1, 28, 28)``.
    num_classes : int
        C, how many logits the model gives; 1 where it predicts a number.
    seed : int, optional
        The same seed gives the same weights, and the global random numbers of PyTorch
        are left as they were. Without it the weights come from the global ones.
    adapters : str
        What is trained in its place: one of
        :data:`~fedweight.models.adapters.ADAPTERS`, or ``"module:function"`` for one of
        your own, called as ``function(model, **options)``. The weights of the model
        are those that it has without.
    weights : str or Path
        A safetensors file with the weights that the model begins with, such as a run's
        ``model.safetensors``: those of the model without adapters, or those with them.
        See :func:`~fedweight.models.weights.load_weights`.
    **options
        The model's options, such as ``hidden``, and those of the adapters.

    Examples
    --------
    >>> model = build("mlp", (1, 8, 8), 10, hidden=32, seed=0)
    >>> model(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """
    model, what = MODELS.resolve(name), f"model '{name}'"
    check_callable(what, model, "function(input_shape, num_classes, **options)", 2)
    adapted, options, own = _adapters(adapters, options, options_of(model))
    options = check_options(what, model, options, list(options_of(model))[:2])
    check_range("num_classes", num_classes, 1)
    if name in MODELS.entries:
        _check_size(what, model, tuple(input_shape), num_classes, options)
    with contextlib.nullcontext() if seed is None else _seeded(seed):
        module = make(what, lambda: model(tuple(input_shape), num_classes, **options))
        if isinstance(module, nn.Module):
            base = bool(weights) and has_tensors_of(weights, module)
            if base:
                load_weights(module, weights)
            module = make(
                f"model.adapters '{adapters}'", lambda: adapted(module, **own)
            )
            if weights and not base:
                load_weights(module, weights)
    if not isinstance(module, nn.Module):
        raise ConfigurationError(
            f"model '{name}' gave {type(module).__name__}. Return a torch.nn.Module."
        )
    return module


def _adapters(
    name: str, options: Mapping[str, Any], of_model: Collection[str]
) -> tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]:
    """Return what makes adapters, and the options of the model and of the adapters."""
    what = f"model.adapters '{name}'"
    function = ADAPTERS.resolve(name)
    check_callable(what, function, "function(model, **options)", 1)
    takes = {*list(options_of(function))[1:]}
    for both in sorted(takes & {*list(of_model)[2:]} & {*options}):
        raise ConfigurationError(
            f"model: both the model and {what} take '{both}'. Give the model's another "
            "name."
        )
    own = {key: value for key, value in options.items() if key in takes}
    left = {key: value for key, value in options.items() if key not in takes}
    own = check_options(what, function, own, list(options_of(function))[:1])
    return function, left, own


def _check_size(
    what: str,
    model: Callable[..., nn.Module],
    input_shape: tuple[int, ...],
    num_classes: int,
    options: Mapping[str, Any],
) -> None:
    """Refuse a model that this machine cannot hold, before it tries to."""
    widths = [math.prod(input_shape), num_classes]
    for value in options.values():
        several = value if isinstance(value, list | tuple) else [value]
        widths += [width for width in several if isinstance(width, int)]
    if math.prod(sorted(widths)[-2:]) < LARGE:
        return
    try:
        with torch.device("meta"):  # Shapes only: nothing is allocated.
            module = model(input_shape, num_classes, **options)
        size = sum(p.numel() * p.element_size() for p in module.parameters())
    except (RuntimeError, OverflowError, TypeError):  # Beyond what a number can say.
        size = 2**63
    check_memory(
        f"{what} with options {shown(options)}",
        COPIES * size,
        "Make it smaller.",
    )


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch_seed(seed, Purpose.MODEL))
        yield
