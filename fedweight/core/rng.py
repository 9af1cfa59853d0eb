"""Every random number of a run, as a function of what it is for.

A stream is named by ``(seed, purpose, round, client)`` and by nothing else, so it
does not matter which worker draws from it, in which order, or whether the run was
interrupted in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import cache
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
    """Return a 64-bit key for each of some clients: the name of its stream, hashed.

    The same as ``SeedSequence([seed, purpose, round, client]).generate_state(1,
    uint64)`` for each client, but for all at once.

    Examples
    --------
    >>> one = np.random.SeedSequence([7, int(Purpose.SHUFFLE), 1, 42])
    >>> several = keys(7, Purpose.SHUFFLE, 1, [41, 42])
    >>> several[1] == one.generate_state(1, np.uint64)[0]
    np.True_
    """
    result: npt.NDArray[np.uint64] = key_table(seed, [purpose], round, clients)[0]
    return result


def key_table(
    seed: int, purposes: Sequence[Purpose], round: int, clients: Sequence[int]
) -> npt.NDArray[np.uint64]:
    """Return :func:`keys` for several purposes at once, ``[purposes, clients]``."""
    numbers = np.asarray(clients, dtype=np.uint64)
    kinds = np.array([int(purpose) for purpose in purposes], np.uint32)
    # A number of more than 32 bits makes two words instead of one; and a few clients
    # are not worth arrays.
    if len(numbers) < FEW or (numbers >> np.uint64(32)).any():
        result = np.empty((len(kinds), len(numbers)), np.uint64)
        for place in np.ndindex(result.shape):
            name = [seed, int(kinds[place[0]]), round, int(numbers[place[1]])]
            sequence = np.random.SeedSequence(name)
            result[place] = sequence.generate_state(1, np.uint64)[0]
        return result
    count = len(kinds) * len(numbers)
    words = [*_words(seed), 0, *_words(round), 0]
    entropy = np.empty((len(words), count), np.uint32)
    entropy[:] = np.array(words, np.uint32)[:, None]
    entropy[len(_words(seed))] = np.repeat(kinds, len(numbers))
    entropy[-1] = np.tile(numbers.astype(np.uint32), len(kinds))
    return _generate(_mixed_pool(entropy)).reshape(len(kinds), len(numbers))


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
    keys: npt.NDArray[np.uint64], pass_number: int, n: int
) -> npt.NDArray[np.int64]:
    """Return an order of ``range(n)`` for each key, ``[K, n]``; see `permutation`."""
    step = np.uint64(GOLDEN * (pass_number + 1) & 0xFFFFFFFFFFFFFFFF)
    base = _mix64(keys + step)
    places = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    order: npt.NDArray[np.int64] = np.argsort(_mix64(base[:, None] + places), axis=1)
    return order


# The finaliser of SplitMix64 (G. Steele et al., "Fast Splittable Pseudorandom Number
# Generators", OOPSLA 2014), and its increment.
GOLDEN = 0x9E3779B97F4A7C15


def _mix64(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


# NumPy's SeedSequence (after M. O'Neill's seed_seq), for many sequences at once. NumPy
# guarantees that its output never changes, and a test compares the two.

_Words = npt.NDArray[np.uint32]  # A row a word, a column a sequence.

FEW = 8


def _words(value: int) -> list[int]:
    """Return an integer's 32-bit words, lowest first; 0 is one word."""
    words = [value & 0xFFFFFFFF]
    while value := value >> 32:
        words.append(value & 0xFFFFFFFF)
    return words


def _hashed(value: _Words, constants: tuple[_Words, _Words]) -> _Words:
    """Hash words, with a constant for a row."""
    before, after = constants
    value = value ^ before
    value *= after
    value ^= value >> np.uint32(16)
    return value


@cache
def _constants(first: int, factor: int, constants: range) -> tuple[_Words, _Words]:
    """Return what a hash begins with, and what it multiplies by, as columns.

    They are some of the numbers ``first * factor**k``.
    """
    powers = [pow(factor, k, 1 << 32) for k in (*constants, constants.stop)]
    column = np.array([[first * power & 0xFFFFFFFF] for power in powers], np.uint32)
    return column[:-1], column[1:]


def _mixed_pool(entropy: _Words) -> _Words:
    pool = _hashed(entropy[:4], _pool_constants(0, 4))
    for source in range(4):
        # All four are mixed and the source is put back: faster than to pick three.
        kept = pool[source].copy()
        _mix(pool, _hashed(kept, _constants_of_others(source)))
        pool[source] = kept
    for extra, word in enumerate(entropy[4:]):
        _mix(pool, _hashed(word, _pool_constants(16 + 4 * extra, 4)))
    return pool


def _mix(pool: _Words, other: _Words) -> None:
    """Mix each word of a pool with another one, in place."""
    pool *= np.uint32(0xCA01F9DD)
    pool -= other * np.uint32(0x4973F715)
    pool ^= pool >> np.uint32(16)


def _pool_constants(used: int, times: int) -> tuple[_Words, _Words]:
    """Return the next constants of the hash that fills the pool."""
    return _constants(0x43B0D7E5, 0x931E8875, range(used, used + times))


@cache
def _constants_of_others(source: int) -> tuple[_Words, _Words]:
    """Return the constants for three words, with a row that is not used for the source.

    The first four of all were used to fill the pool.
    """
    before, after = _pool_constants(4 + 3 * source, 3)
    return np.insert(before, source, 0, axis=0), np.insert(after, source, 0, axis=0)


def _generate(pool: _Words) -> npt.NDArray[np.uint64]:
    constants = _constants(0x8B51F9DD, 0x58F38DED, range(2))
    low, high = _hashed(pool[:2], constants).astype(np.uint64)
    return low | (high << np.uint64(32))  # type: ignore[no-any-return]
