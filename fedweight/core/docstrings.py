"""What a docstring says of each parameter, in numpy's style."""

from __future__ import annotations

import contextlib
import inspect
import re
import typing
from typing import Any


def unmarked(text: str) -> str:
    """Return a docstring's text without the marks that only a page of it shows.

    Examples
    --------
    >>> unmarked("as in :class:`~fedweight.data.DataSet`, ``x ** 2``")
    'as in DataSet, x ** 2'
    """
    text = re.sub(r":\w+:`~?([^`]*)`", lambda m: m[1].rsplit(".", 1)[-1], text)
    return text.replace("``", "")


def meanings(documented: Any) -> dict[str, str]:
    """Return what a function's or a class's docstring says of its parameters.

    Of a class, also what the classes that it derives from say; of a function, what the
    table says that its keyword arguments are (``**reading: Unpack[Reading]``).

    Examples
    --------
    >>> from fedweight.core.rng import generator
    >>> meanings(generator)["seed"]
    "The run's seed, 0 or more."
    """
    found: dict[str, str] = {}
    for one in getattr(documented, "__mro__", (documented, *_tables(documented))):
        for names, text in _parameters(inspect.cleandoc(one.__doc__ or "")):
            for name in names.split(", "):
                found.setdefault(name.lstrip("*"), text)
    return found


def _tables(function: Any) -> list[Any]:
    """Return the TypedDict that a function's keyword arguments are, if they are one."""
    with contextlib.suppress(NameError, TypeError, ValueError, AttributeError):
        hints = typing.get_type_hints(function)
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                return list(typing.get_args(hints.get(parameter.name)))
    return []


def _parameters(doc: str) -> list[tuple[str, str]]:
    """Return the entries of the section Parameters: names, and what is said of them."""
    lines = doc.splitlines()
    if "Parameters" not in lines:
        return []
    entries: list[tuple[str, str]] = []
    for line, after in zip(
        lines[lines.index("Parameters") + 2 :],
        [*lines[lines.index("Parameters") + 3 :], ""],
        strict=True,
    ):
        if after.startswith("---"):
            break
        if line and not line.startswith(" "):
            entries.append((line.partition(" :")[0], ""))
        elif line and entries:
            names, text = entries[-1]
            entries[-1] = names, f"{text} {line.strip()}".strip()
    return entries
