"""Things that a user picks by name: strategies, objectives, models, data, partitions.

Wherever a name is taken, ``"module:attribute"`` is taken too, for what is the
user's own.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .docstrings import unmarked
from .errors import ConfigurationError, FedweightError, closest
from .own_code import where_raised
from .texts import shown

T = TypeVar("T")


def load_object(kind: str, path: str) -> Any:
    """Import ``"module:attribute"``; the working directory counts as a source.

    Raises
    ------
    ConfigurationError
        If the module or the attribute does not exist. An error inside the user's
        module is the user's: it passes through as it is.
    """
    module_name, _, attribute = path.partition(":")
    if not (attribute and all(part.isidentifier() for part in module_name.split("."))):
        raise ConfigurationError(
            f"{kind} {shown(path)} must be written 'package.module:name'."
        )
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigurationError(
            f"{kind} {shown(path)}: there is no module {shown(module_name)} here or on "
            "the Python path. Write it as 'package.module:name'."
        ) from None
    try:
        return getattr(module, attribute)
    except AttributeError:
        public = [name for name in vars(module) if not name.startswith("_")]
        raise ConfigurationError(
            f"{kind} {shown(path)}: module '{module_name}' has no {shown(attribute)}."
            f"{closest(attribute, public)}"
        ) from None


class Registry:
    """A table of names to objects that are imported when they are asked for.

    Parameters
    ----------
    kind : str
        What the names stand for, in the singular; error messages use it.
    entries : Mapping[str, str]
        ``name -> "module:attribute"``.
    """

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self.entries = dict(entries)

    def resolve(self, name: str) -> Any:
        """Return the object behind a name, or behind a ``"module:attribute"``."""
        if name in self.entries:
            return load_object(self.kind, self.entries[name])
        if ":" in name:
            return load_object(self.kind, name)
        listed = ", ".join(sorted(self.entries))
        raise ConfigurationError(
            f"there is no {self.kind} {shown(name)}.{closest(name, self.entries)} "
            f"There are {listed}; your own is written 'module:name'."
        )

    def name_of(self, entry: Any) -> str:
        """Return the name of a class or a function, or its ``"module:attribute"``."""
        path = f"{entry.__module__}:{entry.__qualname__}"
        named = {listed: name for name, listed in self.entries.items()}
        return named.get(path, path)

    def descriptions(self) -> dict[str, str]:
        """Return each name with the first line of its object's docstring, unmarked.

        Where there is source it is read from there, without importing anything.
        """
        entries = sorted(self.entries.items())
        return {name: unmarked(_first_line(path)) for name, path in entries}


def _first_line(path: str) -> str:
    """Return the first line of the docstring of ``"module:attribute"``."""
    module, _, attribute = path.partition(":")
    spec = importlib.util.find_spec(module)
    source = Path((spec and spec.origin) or "")
    tree = ast.parse(source.read_text("utf-8") if source.suffix == ".py" else "")
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    doc = inspect.getdoc(load_object("object", path)) or ""
    return doc.partition("\n")[0]


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Return a function's signature, or raise if it does not tell it."""
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
        signature = signature_of(function)
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
IndexError: pop from empty list (<doctest fedweight.core.registry.make[0]>, line 1).
    """
    try:
        return call()
    except FedweightError:
        raise
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split()).rstrip(".")
        raise ConfigurationError(
            f"{what} cannot be made: {type(error).__name__}: {text} "
            f"({where_raised(error)})."
        ) from error
