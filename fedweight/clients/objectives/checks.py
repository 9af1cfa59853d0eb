"""What an objective must say and return, and what is told where it does not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, get_args

from torch import Tensor

from ...core.errors import ClientError, ConfigurationError, closest
from ...core.texts import shown
from ...data.tasks import TASKS
from .base import Around, Fact, Loss, Objective, changes
from .plain import Plain


def check_declared(objective: Objective) -> None:
    """Refuse what an objective says of itself, if it cannot be.

    Raises
    ------
    ConfigurationError
        With what it says and what it may.
    """
    name = f"objective {type(objective).__name__}"
    wants: Any = objective.wants
    known = get_args(Fact)
    if isinstance(wants, str) or not _are_names(wants, Collection):
        raise ConfigurationError(
            f"{name}: wants must be a tuple of names, got {shown(wants)}. Write "
            f"wants = ('{known[0]}',)."
        )
    _check_known(f"{name}: wants", wants, known, "which nobody tells")
    for what in ("hears", "tasks"):
        given = getattr(objective, what)
        if not _are_names(given, tuple | list):
            raise ConfigurationError(
                f"{name}: {what} must be a tuple of names, got {shown(given)}. Write "
                f"{what} = ('name',)."
            )
    _check_known(f"{name}: tasks", objective.tasks, [*TASKS], "which there is not")
    for what, kind, meaning in (
        ("per_example", int | float, "first values, numbers by name"),
        ("pools", int, "rounds by the names of probes"),
    ):
        given = getattr(objective, what)
        if not isinstance(given, Mapping) or not all(
            isinstance(one, str) and isinstance(value, kind)
            for one, value in given.items()
        ):
            raise ConfigurationError(
                f"{name}: {what} must be {meaning}, got {shown(given)}."
            )


def _are_names(given: Any, kind: Any) -> bool:
    return isinstance(given, kind) and all(isinstance(one, str) for one in given)


def _check_known(
    where: str, names: Iterable[str], known: Sequence[str], otherwise: str
) -> None:
    for one in names:
        if one not in known:
            raise ConfigurationError(
                f"{where} has {shown(one)}, {otherwise}.{closest(one, known)} There "
                f"are {', '.join(known)}."
            )


def check_loss(
    objective: Objective,
    found: Any,
    carry: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
) -> None:
    """Refuse what is no :class:`Loss`, or does not fit what is carried and kept.

    Parameters
    ----------
    objective : Objective
        Whose it is.
    found : Loss
        What its ``loss`` returned.
    carry, state : Mapping[str, Tensor]
        What was carried, and kept of the batch's examples, before.

    Raises
    ------
    ClientError
        With what was returned and what is to be.
    """
    name = f"objective {type(objective).__name__}"
    if not isinstance(found, Loss):
        raise ClientError(
            f"{name}: loss returned {type(found).__name__}. Return "
            "fedweight.clients.Loss(value, outputs)."
        )
    for part, value in (("value", found.value), ("outputs", found.outputs)):
        if not isinstance(value, Tensor):
            raise ClientError(
                f"{name}: the {part} of its loss is {type(value).__name__}, not a "
                "tensor."
            )
    if found.value.ndim:
        raise ClientError(
            f"{name}: its loss has shape {list(found.value.shape)}. Return one number: "
            "batch.mean(...) of the examples' losses."
        )
    if found.carry:
        _check_kept(f"{name}: what it carries", found.carry, carry)
    if found.state:
        _check_kept(f"{name}: what it keeps of each example", found.state, state)


def check_outputs(objective: Objective, found: Loss, shape: Sequence[int]) -> None:
    """Refuse outputs by which no hits can be counted.

    Parameters
    ----------
    objective : Objective
        Whose they are.
    found : Loss
        What its ``loss`` returned.
    shape : Sequence[int]
        That of the model's outputs for the batch.

    Raises
    ------
    ClientError
        With the shape that they have.
    """
    own = list(found.outputs.shape)
    if own != list(shape):
        raise ClientError(
            f"objective {type(objective).__name__}: the outputs of its loss have shape "
            f"{own}. Return the model's outputs for the batch, {list(shape)}: by them "
            "is counted how often it is right."
        )


def check_carry(
    objective: Objective, by: str, found: Any, carry: Mapping[str, Tensor]
) -> None:
    """Refuse what is no part of what a client carries.

    Parameters
    ----------
    objective : Objective
        Whose it is.
    by : str
        The method that returned it.
    found : Mapping[str, Tensor]
        What it returned.
    carry : Mapping[str, Tensor]
        What was carried before.

    Raises
    ------
    ClientError
        With what was returned and what is to be.
    """
    name = f"objective {type(objective).__name__}"
    tensors = isinstance(found, Mapping) and all(
        isinstance(value, Tensor) for value in found.values()
    )
    if not tensors:
        raise ClientError(f"{name}: {by} must return tensors by name.")
    _check_kept(f"{name}: what it carries", found, carry)


def check_gradient(
    objective: Objective, gradient: Any, parameters: Tensor, calls: int
) -> None:
    """Refuse a gradient of another shape, or one that nobody asked for.

    Parameters
    ----------
    objective : Objective
        Whose it is.
    gradient : Tensor
        What its ``gradient`` returned, ``[P]``.
    parameters : Tensor
        ``[P]``.
    calls : int
        How often ``gradient_at`` was called.

    Raises
    ------
    ClientError
        With what was returned and what is to be.
    """
    if not calls:
        name = type(objective).__name__
        raise ClientError(
            f"objective {name}: gradient must call gradient_at, once or more."
        )
    check_vector(objective, "gradient", gradient, parameters)


def check_vector(objective: Objective, by: str, found: Any, parameters: Tensor) -> None:
    """Refuse what is not a number for each parameter, which broadcasting would hide.

    Parameters
    ----------
    objective : Objective
        Whose it is.
    by : str
        The method that returned it.
    found : Tensor
        What it returned, ``[P]``.
    parameters : Tensor
        ``[P]``.

    Raises
    ------
    ClientError
        With what was returned and what is to be.
    """
    shape = list(found.shape) if isinstance(found, Tensor) else None
    if shape != list(parameters.shape):
        given = type(found).__name__ if shape is None else f"shape {shape}"
        raise ClientError(
            f"objective {type(objective).__name__}: {by} returned {given}, not a "
            f"tensor of the parameters' shape {list(parameters.shape)}."
        )


def check_mean(inner: Objective) -> None:
    """Refuse an objective whose examples another one cannot weigh.

    Raises
    ------
    ConfigurationError
        If it is no plain mean of its examples' losses.
    """
    for name in ("loss", "batch_loss"):
        own = _whose(inner, name)
        if own is not None:
            raise ConfigurationError(
                f"objective {type(own).__name__} makes a batch's loss in its own way, "
                "so that its examples cannot be weighed besides. Choose one that "
                "defines example_losses alone, such as 'plain' or 'focal'; in a "
                "comparison name the pairs that go together (docs/comparisons.md)."
            )


def check_around(objective: Around) -> None:
    """Refuse an objective around one whose loss it would leave out.

    Raises
    ------
    ConfigurationError
        If it changes examples' losses, and the other one's loss is no plain mean of
        them; or if it changes a batch's, and the other one's is not made of outputs.
    """
    if changes(objective, "loss"):
        return
    if changes(objective, "batch_loss"):
        name, own = "batch_loss", _whose(objective.inner, "loss")
    elif changes(objective, "example_losses"):
        name = "example_losses"
        own = _whose(objective.inner, "loss") or _whose(objective.inner, "batch_loss")
    else:
        return
    if own is not None:
        outer = type(objective).__name__
        raise ConfigurationError(
            f"objective {outer} changes {name} of {type(own).__name__}, which makes "
            "its loss in another way: that would be left out. Choose another objective "
            f"inside, or define loss in {outer}."
        )


def _whose(inner: Objective, name: str) -> Objective | None:
    """Return which objective has a method of its own, if that is not the usual one."""
    while isinstance(inner, Around) and not changes(inner, name):
        inner = inner.inner
    own = getattr(type(inner), name)
    usual = own in (getattr(Objective, name), getattr(Plain, name))
    return None if usual else inner


def _check_kept(
    what: str, given: Mapping[str, Tensor], known: Mapping[str, Tensor]
) -> None:
    for name, value in given.items():
        if name not in known:
            raise ClientError(
                f"{what} has no '{name}' at the beginning, only {sorted(known)}. Name "
                "it there, too."
            )
        if value.shape != known[name].shape:
            raise ClientError(
                f"{what} as '{name}' has shape {list(value.shape)}, and had "
                f"{list(known[name].shape)}."
            )
