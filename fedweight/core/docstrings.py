"""What a docstring says of each parameter, in numpy's style."""

from __future__ import annotations

import inspect
from typing import Any


def meanings(documented: Any) -> dict[str, str]:
    """Return what a function's or a class's docstring says of its parameters.

    Of a class, also what the classes that it derives from say.

    Examples
    --------
    >>> from fedweight.core.rng import generator
    >>> meanings(generator)["seed"]
    "The run's seed, 0 or more."
    """
    found: dict[str, str] = {}
    for one in getattr(documented, "__mro__", (documented,)):
        for names, text in _parameters(inspect.cleandoc(one.__doc__ or "")):
            for name in names.split(", "):
                found.setdefault(name.lstrip("*"), text)
    return found


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
