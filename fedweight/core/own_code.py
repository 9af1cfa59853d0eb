"""Code that is a user's own: what of it a name stands for, and where it went wrong."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

_LIBRARY = Path(__file__).parents[1]
_INSTALLED = tuple(
    Path(sysconfig.get_path(key)).resolve()
    for key in ("stdlib", "platstdlib", "purelib", "platlib")
)
_MAIN = "__main__"


def is_own(file: str) -> bool:
    """Tell whether a file is a user's: neither this library's nor an installed one.

    Examples
    --------
    >>> is_own(ast.__file__), is_own(__file__), is_own("/home/me/mine.py")
    (False, False, True)
    """
    if file.startswith("<"):
        return False
    path = Path(file).resolve()
    return not any(path.is_relative_to(place) for place in (_LIBRARY, *_INSTALLED))


def where_raised(error: BaseException) -> str:
    """Return in which file and line an error was raised: the user's, if one is.

    Examples
    --------
    >>> try:
    ...     {}["a"]
    ... except KeyError as error:
    ...     print(where_raised(error))
    <doctest fedweight.core.own_code.where_raised[0]>, line 2
    """
    frames = traceback.extract_tb(error.__traceback__)
    return _place([(frame.filename, frame.lineno or 0) for frame in frames])


def where_told(text: str) -> str:
    r"""Return the same from the text of a traceback; empty where it has no place.

    Examples
    --------
    >>> where_told('  File "/home/me/mine.py", line 3, in weights\\nKeyError: 1')
    'mine.py, line 3'
    """
    found = _FRAME.findall(text)
    return _place([(file, int(line)) for file, line in found]) if found else ""


_FRAME = re.compile(r'^ *File "(.+)", line (\d+)', re.MULTILINE | re.ASCII)


def _place(frames: list[tuple[str, int]]) -> str:
    own = [frame for frame in frames if is_own(frame[0])]
    file, line = (own or frames)[-1]
    return f"{Path(file).name}, line {line}"


# ------------------------------------------------------------------ what it consists of


@cache
def source_digest(found: Any) -> str:
    """Return the SHA-256 of the definitions that a user's class or function needs.

    Its own, and all that it names in its module and in other modules of the user's,
    without comments and blanks. So another class in the same file changes nothing. It
    is of what was imported: the same object has the same one, whatever becomes of its
    file. Empty for what is not a user's, and for what has no source.
    """
    name = getattr(found, "__module__", None)
    module = sys.modules.get(str(name))
    attribute = str(getattr(found, "__qualname__", "")).partition(".")[0]
    if module is None or not attribute:
        return ""
    file = getattr(module, "__file__", None)
    if name != _MAIN and (file is None or not is_own(file)):
        return ""
    parts: dict[str, str] = {}
    try:
        if name == _MAIN:  # The rest of a script or a notebook is how it is run.
            parts[attribute] = ast.unparse(ast.parse(inspect.getsource(found)))
        else:
            _collect(module, attribute, parts)
    except (OSError, TypeError, SyntaxError, ValueError):
        return ""
    whole = "\n".join(f"{key}\n{text}" for key, text in sorted(parts.items()))
    return hashlib.sha256(whole.encode()).hexdigest()


def _collect(module: ModuleType, attribute: str, parts: dict[str, str]) -> None:
    """Add a module's definition, and all that it needs, by ``"module:name"``."""
    source = _Source.of(module)
    todo = [attribute, ""]  # What a module does besides defining may change all.
    while todo:
        name = todo.pop()
        key = f"{module.__name__}:{name}"
        if key in parts:
            continue
        if name in source.imports:
            parts[key] = ""
            _follow(module, *source.imports[name], parts)
            continue
        nodes = source.defined.get(name, [])
        if not nodes and name:
            continue  # A builtin, or a local name.
        parts[key] = "\n".join(map(ast.unparse, nodes))
        for node in nodes:
            todo += [one.id for one in ast.walk(node) if isinstance(one, ast.Name)]


def _follow(
    module: ModuleType, origin: str, attribute: str, parts: dict[str, str]
) -> None:
    """Go on in the module that something is imported from, if that is a user's."""
    if origin.startswith("."):
        origin = importlib.util.resolve_name(origin, module.__package__)
    inner = sys.modules.get(f"{origin}.{attribute}")
    if inner is not None and attribute:  # from package import module
        origin, attribute = inner.__name__, ""
    other = sys.modules.get(origin)
    file = getattr(other, "__file__", None)
    if other is None or file is None or not is_own(file):
        return
    named = [attribute] if attribute and attribute != "*" else _Source.of(other).names
    for name in named:
        _collect(other, name, parts)


class _Source:
    """What a module defines and imports, by name; under ``""`` what else it does."""

    def __init__(self, text: str) -> None:
        self.defined: dict[str, list[ast.stmt]] = {}
        self.imports: dict[str, tuple[str, str]] = {}
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.imports |= dict(_imported(node))
            else:
                for name in _defines(node):
                    self.defined.setdefault(name, []).append(node)

    @classmethod
    def of(cls, module: ModuleType) -> _Source:
        """Read the source of a module."""
        return cls(Path(str(module.__file__)).read_text("utf-8"))

    @property
    def names(self) -> list[str]:
        """All that a star brings."""
        return [name for name in (*self.defined, *self.imports) if name]


def _imported(
    node: ast.Import | ast.ImportFrom,
) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield names that a module gets by an import: the module, and what of it."""
    if isinstance(node, ast.Import):
        for one in node.names:
            whole = one.name if one.asname else one.name.partition(".")[0]
            yield one.asname or whole, (whole, "")
        return
    for one in node.names:
        origin = "." * node.level + (node.module or "")
        yield one.asname or one.name, (origin, one.name)


def _defines(node: ast.stmt) -> list[str]:
    """Return the names that a statement defines; ``""`` where it does something."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        stored = [one for target in targets for one in ast.walk(target)]
        names = [
            one.id
            for one in stored
            if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)
        ]
        return names or [""]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return []  # A docstring.
    if isinstance(node, ast.If) and _MAIN in ast.unparse(node.test):
        return []  # It is not run where the module is imported.
    return [""]
