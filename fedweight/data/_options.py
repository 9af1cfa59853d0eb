"""Checks the options that a user gives to something picked by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from ..errors import ConfigurationError, FedweightError, closest

# What an option must be, by the type of its default; other defaults say too little.
_KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int, np.integer), "a whole number"),
    float: ((int, float, np.integer, np.floating), "a number"),
}


def check_options(
    what: str,
    function: Callable[..., Any],
    options: Mapping[str, Any],
    given: Collection[str],
    error: type[FedweightError] = ConfigurationError,
) -> None:
    """Raise unless ``function`` takes these options and has all it needs.

    An option whose default is a flag or a number must be one too.

    Parameters
    ----------
    what : str
        How the message calls it, such as ``"model 'mlp'"``.
    function : callable
        Its parameters, but for those in ``given``, are the options.
    options : Mapping[str, Any]
        What the user gave.
    given : Collection[str]
        Parameters that the library fills in itself.
    error : type[FedweightError]
        What is raised.

    Examples
    --------
    >>> def mlp(num_classes, *, hidden=64): ...
    >>> check_options("model 'mlp'", mlp, {"hiden": 8}, ["num_classes"])
    Traceback (most recent call last):
    fedweight.errors.ConfigurationError: model 'mlp' has no option 'hiden'. \
Did you mean 'hidden'? It takes hidden.
    """
    parameters = inspect.signature(function).parameters
    named = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in given
    }
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for option in options:
            if option not in named:
                takes = ", ".join(named) or "none"
                near = closest(option, named)
                raise error(f"{what} has no option '{option}'.{near} It takes {takes}.")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in options:
            raise error(f"{what} needs the option '{name}'.")
        kind = _KINDS.get(type(parameter.default))
        if name in options and kind is not None:
            types, wanted = kind
            value = options[name]
            is_flag = isinstance(value, bool) and bool not in types
            if is_flag or not isinstance(value, types):
                raise error(f"{what}: {name} must be {wanted}, got {value!r}.")
