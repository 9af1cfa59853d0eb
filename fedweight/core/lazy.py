"""Packages whose names are imported when they are asked for.

What `fedweight list` or a look at a run's folder needs should not wait for PyTorch.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def lazy_exports(
    package: str, where: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's ``__getattr__`` and ``__dir__``.

    Parameters
    ----------
    package : str
        The package's full name.
    where : Mapping[str, str]
        Names, and the modules that define them, as seen from the package.

    Examples
    --------
    >>> get, names = lazy_exports("fedweight", {"closest": ".core.errors"})
    >>> get("closest").__module__
    'fedweight.core.errors'
    >>> get("nothing")
    Traceback (most recent call last):
    AttributeError: module 'fedweight' has no attribute 'nothing'
    """

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(where[name], package), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *where})

    return get, names


@contextmanager
def kept_imports() -> Iterator[None]:
    """Import, in a ``with`` block, what a program keeps until it ends.

    The garbage collector does not look at what is made there, neither then nor later:
    PyTorch and what comes with it are 200,000 objects, and a look at them takes a
    tenth of a second. For programs only, as it concerns whatever the process holds.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
