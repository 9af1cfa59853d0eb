"""How much memory the machine has, and what of it is not looked through for garbage."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import ConfigurationError, FedweightError
from .pytorch import torch


def physical_memory() -> int | None:
    """Return the machine's memory in bytes, or ``None`` where it does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def device_memory(device: torch.device) -> int | None:
    """Return a GPU's memory in bytes, or ``None`` for what does not tell."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def check_memory(
    what: str,
    nbytes: float,
    remedy: str,
    error: type[FedweightError] = ConfigurationError,
) -> None:
    """Raise if something would take more memory than the machine has.

    Parameters
    ----------
    what : str
        What it is, with its size: the beginning of the message.
    nbytes : float
        How many bytes it takes.
    remedy : str
        What to do instead, a sentence.
    error : type[FedweightError]
        What is raised.

    Examples
    --------
    >>> check_memory("a model of 10^15 parameters", 4e15, "Make it smaller.")
    Traceback (most recent call last):
    fedweight.core.errors.ConfigurationError: a model of 10^15 parameters would take \
4,000,000 GB of memory, more than this machine has. Make it smaller.
    """
    memory = physical_memory()
    if memory is not None and nbytes > memory:
        raise error(
            f"{what} would take {nbytes / 1e9:,.0f} GB of memory, more than this "
            f"machine has. {remedy}"
        )


@contextmanager
def settled() -> Iterator[None]:
    """Leave all there is alone when garbage is collected, in a ``with`` block.

    Python now and then looks through all objects for those that only hold each other:
    the more often, the more are made meanwhile, as by thousands of clients in every
    round. What was imported before, PyTorch above all, makes each look take long. A
    program does the same with :func:`~fedweight.core.lazy.kept_imports`.
    """
    if gc.get_freeze_count():  # Somebody has, and may put it back.
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
