"""What a client does to its process is undone: no other client finds it, nor a server.

Flower runs an app's clients in processes of their own, and so do we; but a process
handles one client after another, and in a debugger all of them are in the server's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TextIO

import numpy as np

from ..core.environment import set_environment
from ..core.pytorch import is_imported, torch
from ..core.rng import Purpose, torch_seed


def seed_generators(seed: int, client: int, nth: int) -> None:
    """Let the process's generators begin where a client's do for one of its messages.

    Parameters
    ----------
    seed : int
        The run's seed, 0 or more.
    client : int
        The client's number.
    nth : int
        Which of the messages to the client this is, from 1.

    Examples
    --------
    >>> with undone():
    ...     seed_generators(0, client=3, nth=1)
    ...     first = random.random()
    ...     seed_generators(0, client=3, nth=1)
    ...     first == random.random()
    True
    """
    own = torch_seed(seed, Purpose.CLIENT_APP, nth, client)
    random.seed(own)
    np.random.seed(own & 0xFFFFFFFF)  # noqa: NPY002
    _with_pytorch(lambda: torch.manual_seed(own))


@contextlib.contextmanager
def undone() -> Iterator[None]:
    """Put back, after a ``with`` block, what the block has changed of the process.

    The generators of ``random``, NumPy and PyTorch (of CUDA devices, too, where CUDA
    is in use), PyTorch's default type and device, whether gradients are recorded, its
    number of threads; the environment, the working folder, ``sys.argv``; the root
    logger's level and the filters of warnings. Not what the block has stored in
    modules: many an app keeps its data there.
    """
    back = [_argv(), _environment(), _folder(), _generators(), _warnings()]
    _with_pytorch(lambda: back.extend([_torch_generators(), _torch()]))
    try:
        yield
    finally:
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Waiting)]
        for put_back in back:
            put_back()


def _with_pytorch(do: Callable[[], object]) -> None:
    """Do something with PyTorch, now or as soon as a client has imported it."""
    if is_imported():
        do()
    else:
        sys.meta_path.insert(0, _Waiting(do))


class _Waiting(MetaPathFinder):
    """Waits for PyTorch to be imported. Who waits last does its part last."""

    def __init__(self, do: Callable[[], object]) -> None:
        self._do = do

    def find_spec(
        self, name: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Let the others find it, and what is to be done follow its import."""
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._do()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _argv() -> Callable[[], None]:
    argv = list(sys.argv)
    level = logging.getLogger().level

    def put_back() -> None:
        sys.argv[:] = argv
        if logging.getLogger().level != level:
            logging.getLogger().setLevel(level)

    return put_back


def _environment() -> Callable[[], None]:
    before = dict(os.environ)
    return lambda: set_environment(before)


def _folder() -> Callable[[], None]:
    try:
        before = os.getcwd()
    except OSError:  # It is gone, and there is nothing to go back to.
        return lambda: None

    def put_back() -> None:
        with contextlib.suppress(OSError):
            os.chdir(before)

    return put_back


def _generators() -> Callable[[], None]:
    python = random.getstate()
    numbers = np.random.get_state()  # noqa: NPY002

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002

    return put_back


def _torch_generators() -> Callable[[], None]:
    on_cpu = torch.get_rng_state()
    on_cuda = torch.cuda.get_rng_state_all() if _on_cuda() else None

    def put_back() -> None:
        torch.set_rng_state(on_cpu)
        if on_cuda is not None:
            torch.cuda.set_rng_state_all(on_cuda)

    return put_back


def _on_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _torch() -> Callable[[], None]:
    dtype, device = torch.get_default_dtype(), _default_device()
    recorded, threads = torch.is_grad_enabled(), torch.get_num_threads()

    def put_back() -> None:
        if _default_device() != device:
            # "cpu" is what it is when nobody has said anything.
            torch.set_default_device(None if device.type == "cpu" else device)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(recorded)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)

    return put_back


def _default_device() -> torch.device:
    # PyTorch 2.9's own function fails once the default was put back to nothing.
    return torch.empty(0).device


def _warnings() -> Callable[[], None]:
    before = list(warnings.filters)

    def put_back() -> None:
        if list(warnings.filters) != before:
            warnings.resetwarnings()  # Says that what was decided is to be asked anew.
            warnings.filters[:] = before  # type: ignore[index]

    return put_back


class Prefixed:
    """A stream whose lines begin with whose they are, while somebody's are written.

    Parameters
    ----------
    stream : TextIO
        Where they go.
    """

    prefix = ""  # of all streams of a process: it handles one client at a time

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._fresh = True

    def write(self, text: str) -> int:
        """Write some text; return its length."""
        if Prefixed.prefix and text:
            lines = text.splitlines(keepends=True)
            begun = "" if self._fresh else lines.pop(0)
            out = begun + "".join(Prefixed.prefix + line for line in lines)
            self._stream.write(out)
            self._fresh = text.endswith("\n")
        else:
            self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's."""
        return getattr(self._stream, name)


def prefix_output() -> None:
    """Let what this process prints and logs pass through :class:`Prefixed`."""
    streams: dict[int, Any] = {}
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Prefixed):
            streams[id(stream)] = Prefixed(stream)
            setattr(sys, name, streams[id(stream)])
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler):
                new = streams.get(id(handler.stream))
                if new is not None:
                    handler.setStream(new)


@contextlib.contextmanager
def prefixed(text: str) -> Iterator[None]:
    """Let lines begin with a text, for a ``with`` block."""
    Prefixed.prefix = text
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
        Prefixed.prefix = ""
