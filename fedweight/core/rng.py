"""Every random number of a run, as a function of what it is for.

A stream is named by ``(seed, purpose, round, client)`` and by nothing else, so it
does not matter which worker draws from it, in which order, or whether the run was
interrupted in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
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
    SPEED = 12
    ARRIVALS = 13
    PHASE = 14
    BOOTSTRAP = 15
    PERSONAL_SHUFFLE = 16
    PERSONAL_DROPOUT = 17
    CONTRIBUTION = 18
    VALIDATION = 19
    CLIENT_APP = 20
    CODING = 21
    FLIPS = 22


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
    import torch

    return torch.Generator().manual_seed(torch_seed(seed, purpose, round, client))


def keys(
    seed: int, purpose: Purpose, round: int, clients: Sequence[int]
) -> npt.NDArray[np.uint64]:
    """Return a 64-bit key for each of some clients, for all of them at once.

    A key is a number of SplitMix64, whose start is hashed from seed, purpose and
    round: the client's number says which of its numbers. So a client's key is the
    same among few and many, and no two clients of a round have the same.

    Parameters
    ----------
    seed : int
        The run's seed, 0 or more.
    purpose : Purpose
        What the keys are for.
    round : int
        The round, from 1; 0 where rounds do not matter.
    clients : sequence of int
        The clients' numbers, 0 to ``2**64 - 1``.

    Returns
    -------
    ndarray of uint64, [K]

    Examples
    --------
    >>> several = keys(7, Purpose.SHUFFLE, 1, [41, 42])
    >>> several[1] == keys(7, Purpose.SHUFFLE, 1, [42])[0]
    np.True_
    """
    sequence = np.random.SeedSequence([seed, int(purpose), round])
    start = sequence.generate_state(1, np.uint64)
    numbers = np.asarray(clients, dtype=np.uint64)
    return _mix64(start + (numbers + np.uint64(1)) * np.uint64(GOLDEN))


def part_of(keys: npt.NDArray[np.uint64], part: int) -> npt.NDArray[np.uint64]:
    """Return the keys of a part of streams, from 0; the first has the streams' own.

    Examples
    --------
    >>> keys = np.array([7], np.uint64)
    >>> part_of(keys, 0).tolist(), part_of(keys, 1) == part_of(keys, 2)
    ([7], array([False]))
    """
    if not part:
        return keys
    step = GOLDEN * part & 0xFFFFFFFFFFFFFFFF
    return _mix64(keys + np.uint64(step))


def permutation(key: int, pass_number: int, n: int) -> npt.NDArray[np.int64]:
    """Return an order of ``range(n)``: by the hash of key, pass and place.

    Examples
    --------
    >>> sorted(permutation(key=1, pass_number=0, n=4).tolist())
    [0, 1, 2, 3]
    """
    order: npt.NDArray[np.int64] = permutations(
        np.array([key], np.uint64), pass_number, n
    )[0]
    return order


def permutations(
    keys: npt.NDArray[np.uint64], pass_number: int, n: int | npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return an order of ``range(n)`` for each key, ``[K, n]``; see `permutation`.

    ``n`` may be one for each key, ``[K]``: the columns are as many as the largest then,
    and a row goes on with the places that it does not have.

    Examples
    --------
    >>> keys = np.array([1, 2], np.uint64)
    >>> both = permutations(keys, 0, np.array([3, 2]))
    >>> both[1].tolist() == [*permutation(2, 0, 2).tolist(), 2]
    True
    """
    step = np.uint64(GOLDEN * (pass_number + 1) & 0xFFFFFFFFFFFFFFFF)
    base = _mix64(keys + step)
    sizes = np.asarray(n)
    most = int(sizes.max())
    places = np.arange(1, most + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    hashes = _mix64(base[:, None] + places)
    if not sizes.ndim:
        order: npt.NDArray[np.int64] = np.argsort(hashes, axis=1)
        return order
    hashes[np.arange(most) >= sizes[:, None]] = LARGEST
    order = np.argsort(hashes, axis=1)
    last = np.take_along_axis(order, sizes[:, None] - 1, axis=1)
    if (last >= sizes[:, None]).any():  # A real hash is the largest, too.
        order = np.argsort(hashes, axis=1, kind="stable")
    return order


# The finaliser of SplitMix64 (G. Steele et al., "Fast Splittable Pseudorandom Number
# Generators", OOPSLA 2014), and its increment.
GOLDEN = 0x9E3779B97F4A7C15

LARGEST = np.iinfo(np.uint64).max


def _mix64(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = z ^ (z >> np.uint64(30))
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z
