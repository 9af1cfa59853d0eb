"""What the fork server imports, so that the processes forked from it need not."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys

from . import processes  # noqa: F401  What every process needs.
from .forking import PRELOAD, WITH_THREADS

for _name in filter(None, os.environ.pop(PRELOAD, "").split(",")):
    # What cannot be imported here is said where it is needed.
    with contextlib.suppress(BaseException):
        importlib.import_module(_name)

if any(_name in sys.modules for _name in WITH_THREADS):
    os._exit(0)  # Another will be started, and import less.
