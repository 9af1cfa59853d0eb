"""The process's environment, changed and put back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping


def set_environment(wanted: Mapping[str, str]) -> None:
    """Make this process's environment what is wanted, and leave alone what is so."""
    if dict(os.environ) == wanted:
        return
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update(wanted)


@contextlib.contextmanager
def set_for_a_while(settings: Mapping[str, str]) -> Iterator[None]:
    """Have variables in the environment for a ``with`` block, unless they are there."""
    added = [name for name in settings if name not in os.environ]
    os.environ.update({name: settings[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
