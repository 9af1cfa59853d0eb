"""The fork server: what it imports, and when it is started.

It is the standard library's (:mod:`multiprocessing`), one for this process. Nothing is
imported here that takes time, so that it can begin before this process imports PyTorch
and Flower itself.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver

from ...core.environment import set_environment

# What the processes have in their environment, whatever this one has: no GPU, as with
# Flower, and one thread each, as there is a process for each core.
SETTINGS = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

# Names the modules for the fork server to import (:mod:`.preload`).
PRELOAD = "FEDWEIGHT_PRELOAD"

# These start threads when they are imported, and who has threads must not fork.
WITH_THREADS = ("jax", "tensorflow")

# Windows has no fork: there every process imports for itself.
HAS_FORK_SERVER = "forkserver" in multiprocessing.get_all_start_methods()
METHOD = "forkserver" if HAS_FORK_SERVER else "spawn"

_starting = threading.Lock()


@contextmanager
def as_fork_server_needs(modules: Iterable[str]) -> Iterator[None]:
    """Let a process, and the fork server if there is none yet, start as it must.

    The server takes its environment, and what it imports, from here. Without a file
    ``__main__`` is not run again in every process, which a script does not expect.
    """
    settings = {
        **SETTINGS,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        PRELOAD: ",".join(modules),
    }
    with _starting:
        before, main = dict(os.environ), sys.modules["__main__"]
        if HAS_FORK_SERVER:
            multiprocessing.set_forkserver_preload([f"{__package__}.preload"])
        os.environ.update(settings)
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main
            set_environment(before)


def start_early(folder: str, module: str) -> None:
    """Start the fork server now, to import an app while this process does, too.

    Parameters
    ----------
    folder : str
        Where the app's modules are found first.
    module : str
        The one to import.
    """
    if not HAS_FORK_SERVER:
        return
    sys.path.insert(0, folder)
    try:
        with as_fork_server_needs([module]):
            forkserver.ensure_running()
    finally:
        sys.path.remove(folder)
