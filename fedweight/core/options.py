"""The options of whatever a user picks by name: which there are, and what fits.

What a function or a class takes beside what the library gives it are its options. They
are read from its signature, so that nothing states them twice.
"""

from __future__ import annotations

import inspect
import numbers
import tomllib
import traceback
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import date, time
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from .errors import ConfigurationError, FedweightError, closest
from .texts import shown

T = TypeVar("T")

# The name under which a function that takes any option (**options) says so.
ANY = "**"

# Whole numbers are as long as TOML and Flower write them.
_LEAST, _MOST = -(2**63), 2**63 - 1

# Values are nested no deeper: nothing needs it, and what reads them recurses.
_DEPTH = 20


@dataclass(frozen=True)
class Option:
    """A parameter of something picked by name."""

    default: Any
    annotation: Any


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """Return the parameters of a function or class.

    Keyword arguments typed by a ``TypedDict`` (``**arguments: Unpack[...]``) count
    as parameters without a default of their own. Untyped ones stand for those of the
    next base class; where there is none, :data:`ANY` is among the names.

    Raises
    ------
    ConfigurationError
        If it does not tell its parameters, as much that is written in C does not.
    """
    if not isinstance(function, type):
        return _parameters(function)
    makers = [
        vars(base)["__init__"]
        for base in function.__mro__[:-1]
        if "__init__" in vars(base)
    ]
    options: dict[str, Option] = {}
    for make in makers:
        options.pop(ANY, None)
        _, *inherited = _parameters(make).items()  # the first is self
        options |= {name: o for name, o in inherited if name not in options}
        if ANY not in options:
            break
    return options


def _parameters(function: Callable[..., Any]) -> dict[str, Option]:
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # Names that its module imports for types only.
        hints = {}
    options: dict[str, Option] = {}
    for name, parameter in _signature(function).parameters.items():
        hint = hints.get(name, Any)
        if parameter.kind is parameter.VAR_KEYWORD:
            kinds = typing.get_args(hint)
            for arguments in kinds:
                for key, kind in typing.get_type_hints(arguments).items():
                    options.setdefault(key, Option(None, kind))
            if not kinds:
                options[ANY] = Option(None, Any)
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            options[name] = Option(parameter.default, hint)
    return options


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (ValueError, TypeError):
        raise ConfigurationError(
            f"{shown(function)} does not say which options it takes. Name a function "
            "or class written in Python, which may call it."
        ) from None


def check_callable(what: str, function: Any, call: str, positional: int) -> None:
    """Raise unless something can be called as whatever is picked by name is.

    Parameters
    ----------
    what : str
        How the message calls it, such as ``"model.name"``.
    function : Any
        What was picked.
    call : str
        How it is called, such as ``"function(input_shape, num_classes, **options)"``.
    positional : int
        How many arguments it is given by position; it takes no more, but by name.

    Examples
    --------
    >>> import math
    >>> check_callable("model.name", math.sqrt, "function(shape, classes)", 2)
    Traceback (most recent call last):
    fedweight.core.errors.ConfigurationError: model.name: <built-in function sqrt> \
takes (x, /), but it is called as function(shape, classes).
    """
    if not callable(function):
        raise ConfigurationError(
            f"{what} must be a function or a class, but it is {shown(function)}."
        )
    try:
        signature = _signature(function)
    except ConfigurationError as error:
        raise ConfigurationError(f"{what}: {error}") from None
    parameters = signature.parameters.values()
    by_position = [p for p in parameters if p.kind <= p.POSITIONAL_OR_KEYWORD]
    enough = len(by_position) >= positional
    enough = enough or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    needless = [
        p
        for p in by_position[positional:]
        if p.kind is p.POSITIONAL_ONLY and p.default is p.empty
    ]
    if needless or not enough:
        raise ConfigurationError(
            f"{what}: {shown(function)} takes {signature}, but it is called as {call}."
        )


def check_options(
    what: str,
    function: Callable[..., Any],
    options: Mapping[str, Any],
    given: Collection[str],
    error: type[FedweightError] = ConfigurationError,
) -> None:
    """Raise unless ``function`` takes these options and has all it needs.

    Each must be what the function's annotations say, or else the type of its default
    where that is a flag or a number.

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
    fedweight.core.errors.ConfigurationError: model 'mlp' has no option 'hiden'. \
Did you mean 'hidden'? It takes hidden.
    """
    named = {k: o for k, o in options_of(function).items() if k not in given}
    if named.pop(ANY, None) is None:
        for option in options:
            if option not in named:
                takes = ", ".join(named) or "none"
                near = closest(option, named)
                raise error(f"{what} has no option '{option}'.{near} It takes {takes}.")
    for name, taken in named.items():
        if taken.default is inspect.Parameter.empty and name not in options:
            raise error(f"{what} needs the option '{name}'.")
        kind = taken.annotation
        if kind is Any and isinstance(taken.default, int | float):
            kind = type(taken.default)
        if name in options and not _fits(options[name], kind):
            raise error(_misfit(f"{what}: {name}", options[name], kind))


def check_type(where: str, value: Any, annotation: Any) -> None:
    """Raise :class:`ConfigurationError` unless a value fits a type annotation.

    Examples
    --------
    >>> check_type("run.rounds", 20, int)
    >>> check_type("rounds", "many", int)
    Traceback (most recent call last):
    fedweight.core.errors.ConfigurationError: rounds must be a whole number, got 'many'.
    """
    if not _fits(value, annotation):
        raise ConfigurationError(_misfit(where, value, annotation))


def _misfit(where: str, value: Any, annotation: Any) -> str:
    near = ""
    if typing.get_origin(annotation) is Literal:
        near = closest(str(value), map(str, typing.get_args(annotation)))
    return f"{where} must be {_described(annotation)}, got {shown(value)}.{near}"


def _fits(value: Any, annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or isinstance(annotation, typing.TypeVar):
        return True
    if annotation is None or annotation is types.NoneType:
        return value is None
    if origin is Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in arguments)
    if origin is not None:
        if not (isinstance(origin, type) and issubclass(origin, Iterable)):
            return True
        if issubclass(origin, Mapping):
            inner = arguments[1] if len(arguments) == 2 else Any
            return isinstance(value, Mapping) and all(
                _fits(v, inner) for v in value.values()
            )
        inner = arguments[0] if arguments else Any
        return isinstance(value, list | tuple) and all(_fits(v, inner) for v in value)
    if annotation in (int, float):
        kind = numbers.Integral if annotation is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    if annotation is Path:
        return isinstance(value, str | Path)
    try:
        return isinstance(value, annotation) if isinstance(annotation, type) else True
    except TypeError:  # A protocol that says nothing of values, or the like.
        return True


def _described(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        kinds = [a for a in arguments if a is not types.NoneType]
        return " or ".join(_described(a) for a in kinds)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        inner = arguments[1] if len(arguments) == 2 else Any
        return "a table" if inner is Any else f"a table, each {_described(inner)}"
    if origin is not None:
        inner = arguments[0] if arguments else Any
        return f"a list, each {_described(inner)}"
    named = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        Path: "a path",
    }
    return named.get(annotation, getattr(annotation, "__name__", str(annotation)))


def make(what: str, call: Callable[[], T]) -> T:
    """Call what a user named, and say in one line what goes wrong in it.

    Parameters
    ----------
    what : str
        How the message calls it, such as ``"model 'own:net'"``.
    call : Callable
        Calls it.

    Raises
    ------
    ConfigurationError
        With the error's text and where it was raised, from that error.

    Examples
    --------
    >>> make("model 'own:net'", lambda: [].pop())
    Traceback (most recent call last):
    fedweight.core.errors.ConfigurationError: model 'own:net' cannot be made: \
IndexError: pop from empty list (<doctest fedweight.core.options.make[0]>, line 1).
    """
    try:
        return call()
    except FedweightError:
        raise
    except (Exception, SystemExit) as error:
        *_, place = traceback.extract_tb(error.__traceback__)
        text = " ".join(str(error).split()).rstrip(".")
        raise ConfigurationError(
            f"{what} cannot be made: {type(error).__name__}: {text} "
            f"({Path(place.filename).name}, line {place.lineno})."
        ) from error


def resolve_options(
    where: str,
    options: Mapping[str, Option],
    given: Mapping[str, Any],
    fixed: Collection[str] = (),
) -> dict[str, Any]:
    """Check the keys that a file gives beside its fixed ones, and fill in defaults.

    Parameters
    ----------
    where : str
        How a message calls the table, such as ``"data"``.
    options : Mapping[str, Option]
        What there is, by its name in Python; see :func:`options_of`.
    given : Mapping[str, Any]
        What the file says, by keys in which a hyphen may stand for an underscore.
    fixed : Collection[str]
        Keys of the table that are no options.

    Returns
    -------
    dict
        Keys in kebab-case; without those whose default no file can hold.

    Raises
    ------
    ConfigurationError
        If a key is unknown, missing, or does not fit.

    Examples
    --------
    >>> def split(dataset, *, alpha: float = 0.5, min_size: int = 0): ...
    >>> taken = {k: o for k, o in options_of(split).items() if k != "dataset"}
    >>> resolve_options("partition", taken, {"min-size": 3})
    {'alpha': 0.5, 'min-size': 3}
    """
    options = dict(options)
    any_key = options.pop(ANY, None) is not None
    for key in given:
        if not any_key and key not in fixed and key.replace("-", "_") not in options:
            allowed = [*fixed, *map(kebab, options)]
            raise ConfigurationError(
                f"{where} has no key {shown(key)}.{closest(key, allowed)} "
                f"It takes {', '.join(allowed)}."
            )
    resolved = {}
    for name, option in options.items():
        key = kebab(name)
        if key in fixed:
            continue
        written = next((k for k in (key, name) if given.get(k) is not None), None)
        value = option.default if written is None else given[written]
        if value is inspect.Parameter.empty:
            raise ConfigurationError(f"{where} needs the key '{key}'.")
        if written is not None:
            check_type(f"{where}.{key}", value, option.annotation)
            resolved[key] = value
        elif _is_toml(value):
            resolved[key] = toml_value(f"{where}.{key}", value)
    known = {*fixed, *options}
    others = {
        key: value
        for key, value in given.items()
        if value is not None and not known & {key, key.replace("-", "_")}
    }
    return resolved | others


def kebab(key: str) -> str:
    """Return a name of Python's as a key of a file."""
    return key.replace("_", "-")


def _is_toml(value: Any) -> bool:
    """Tell whether a default can be written down; others stay the function's own."""
    if isinstance(value, list | tuple):
        return all(_is_toml(v) for v in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_toml(v) for k, v in value.items())
    return isinstance(value, bool | int | float | str)


def toml_value(where: str, value: Any) -> Any:
    """Return a value as a simulation file can hold it, or raise if none can.

    NumPy's numbers become Python's, and tuples lists.

    Parameters
    ----------
    where : str
        The key, as the user writes it.
    value : Any
        What the user gave.

    Raises
    ------
    ConfigurationError
        For a whole number of more than 64 bits, a text that is not Unicode or holds
        NUL, or lists within lists without end.

    Examples
    --------
    >>> toml_value("model.hidden", (np.int64(64), 32))
    [64, 32]
    """
    return _toml_value(where, value, 0)


def _toml_value(where: str, value: Any, depth: int) -> Any:
    if depth > _DEPTH:
        raise ConfigurationError(
            f"{where} is nested more than {_DEPTH} deep. Give a flatter value."
        )
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list | tuple):
        return [_toml_value(where, v, depth + 1) for v in value]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigurationError(
                    f"{where}: the keys of a table are texts, got {shown(key)}."
                )
            check_text(where, key)
        return {k: _toml_value(where, v, depth + 1) for k, v in value.items()}
    if isinstance(value, Path):
        value = str(value)
    if depth == 0 and value is None:  # From Python: as if it were not given.
        return value
    if not isinstance(value, bool | int | float | str | date | time):
        raise ConfigurationError(
            f"{where} must be something that a simulation file can hold, got "
            f"{shown(value)}."
        )
    if isinstance(value, int) and not _LEAST <= value <= _MOST:
        raise ConfigurationError(
            f"{where} must lie between -2^63 and 2^63 - 1, got {shown(value)}."
        )
    if isinstance(value, str):
        check_text(where, value)
    return value


def check_text(where: str, text: str) -> None:
    """Raise :class:`ConfigurationError` unless a text can be written to any file."""
    if "\0" in text:
        raise ConfigurationError(f"{where} must not hold NUL, got {shown(text)}.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(
            f"{where} must be Unicode text, got {shown(text)}. Is your terminal's "
            "encoding UTF-8?"
        ) from None


def parse_setting(setting: str) -> tuple[str, str, Any]:
    """Read ``"table.key=value"``; the value is TOML, or else plain text.

    Examples
    --------
    >>> parse_setting("partition.alpha=0.1")
    ('partition', 'alpha', 0.1)
    >>> parse_setting("strategy.name=ida")
    ('strategy', 'name', 'ida')
    """
    dotted, equals, text = setting.partition("=")
    table, key = split_key(dotted if equals else "", setting)
    try:
        read = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # No TOML, or too much of it for Python.
        read = {"value": text.strip()}
    # A line break in the text would begin other keys, which nobody would see.
    value = read["value"] if len(read) == 1 else text.strip()
    return table, key, value


def split_key(dotted: str, setting: str) -> tuple[str, str]:
    """Read ``"table.key"``, a part of a setting that an error message names."""
    table, _, key = dotted.strip().partition(".")
    if not (table and key):
        raise ConfigurationError(
            f"setting {shown(setting)} must be written table.key=value, such as "
            "partition.alpha=0.1."
        )
    return table, key
