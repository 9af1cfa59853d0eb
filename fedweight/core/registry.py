"""Things that a user picks by name: strategies, objectives, models, data, partitions.

Wherever a name is taken, ``"module:attribute"`` is taken too, for what is the
user's own.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigurationError, closest
from .texts import shown


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

    def descriptions(self) -> dict[str, str]:
        """Return each name with the first line of its object's docstring.

        Read from the source: nothing is imported that PyTorch belongs to.
        """
        return {name: _first_line(path) for name, path in sorted(self.entries.items())}


def _first_line(path: str) -> str:
    """Return the first line of the docstring of ``"module:attribute"``."""
    module, _, attribute = path.partition(":")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"there is no module {module}")
    tree = ast.parse(Path(spec.origin).read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    raise ImportError(f"{module} defines no {attribute}")
