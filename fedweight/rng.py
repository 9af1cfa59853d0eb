"""Every random number of a run, as a function of what it is for.

A stream is named by ``(seed, purpose, round, client)`` and by nothing else, so it
does not matter which worker draws from it, in which order, or whether the run was
interrupted in between.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a stream is for. The numbers are part of every result: never reuse one."""

    MODEL = 1
    DATA = 2
    PARTITION = 3
    HOLD_OUT = 4
    PROXY = 5
    SAMPLING = 6
    STRAGGLERS = 7
    SHUFFLE = 8
    DROPOUT = 9
    SERVER = 10
    EVALUATION = 11


def generator(
    seed: int, purpose: Purpose, round: int = 0, client: int = 0
) -> np.random.Generator:
    """Return the NumPy generator of one stream.

    Parameters
    ----------
    seed : int
        The run's seed, 0 or more.
    purpose : Purpose
        What the numbers are for.
    round : int
        The round, from 1; 0 where rounds do not matter.
    client : int
        The client's number; 0 where clients do not matter.

    Examples
    --------
    >>> a = generator(0, Purpose.SHUFFLE, round=1, client=7).permutation(5)
    >>> b = generator(0, Purpose.SHUFFLE, round=1, client=7).permutation(5)
    >>> bool((a == b).all())
    True
    """
    sequence = np.random.SeedSequence([seed, int(purpose), round, client])
    return np.random.Generator(np.random.PCG64(sequence))


def torch_seed(seed: int, purpose: Purpose, round: int = 0, client: int = 0) -> int:
    """Return a 63-bit seed of one stream, for a torch generator."""
    sequence = np.random.SeedSequence([seed, int(purpose), round, client])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def torch_generator(
    seed: int, purpose: Purpose, round: int = 0, client: int = 0
) -> torch.Generator:
    """Return the torch generator (CPU) of one stream; see :func:`generator`."""
    return torch.Generator().manual_seed(torch_seed(seed, purpose, round, client))
