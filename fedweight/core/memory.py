"""How much memory the machine has, asked before something large is made."""

from __future__ import annotations

import os

from .errors import ConfigurationError, FedweightError


def physical_memory() -> int | None:
    """Return the machine's memory in bytes, or ``None`` where it does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


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
