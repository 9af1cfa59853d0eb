"""What the fork server imports, so that the processes forked from it need not."""

from __future__ import annotations

import contextlib
import importlib
import os

from .processes import PRELOAD

for _name in filter(None, os.environ.pop(PRELOAD, "").split(",")):
    # What cannot be imported here is said where it is needed.
    with contextlib.suppress(BaseException):
        importlib.import_module(_name)
