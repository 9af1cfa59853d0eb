import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedweight.core.rng import (
    Purpose,
    generator,
    keys,
    permutation,
    permutations,
    torch_generator,
    torch_seed,
)


def test_a_stream_is_a_function_of_its_name():
    draws = [generator(3, Purpose.SHUFFLE, 2, 7).permutation(50) for _ in range(2)]
    np.testing.assert_array_equal(*draws)
    seeds = {torch_seed(3, Purpose.DROPOUT, 2, 7) for _ in range(2)}
    assert len(seeds) == 1
    noise = [torch.rand(5, generator=torch_generator(1, Purpose.MODEL)) for _ in "ab"]
    assert torch.equal(*noise)


def test_streams_with_other_names_are_others():
    names = list(itertools.product((0, 1, 2**40), Purpose, (0, 1, 2), (0, 1, 2, 2**60)))
    seeds = {torch_seed(*name) for name in names}
    assert len(seeds) == len(names)
    firsts = {int(generator(*name).integers(2**62)) for name in names}
    assert len(firsts) == len(names)


def test_the_numbers_never_change():
    # Part of every result that was ever published: see Purpose.
    assert generator(0, Purpose.SHUFFLE, 1, 7).permutation(5).tolist() == PERMUTATION
    assert torch_seed(0, Purpose.MODEL) == MODEL_SEED
    assert [p.value for p in Purpose] == list(range(1, len(Purpose) + 1))


def test_drawing_touches_nobody_elses_numbers():
    state, before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    generator(0, Purpose.DATA).random(10)
    torch.rand(10, generator=torch_generator(0, Purpose.DATA))
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before)


def test_a_negative_seed_is_no_name():
    with pytest.raises(ValueError, match="negative"):
        generator(-1, Purpose.DATA)


# Keys: the names of many streams, hashed at once.

CLIENTS = st.lists(
    st.one_of(
        st.integers(0, 300),
        st.integers(2**32 - 2, 2**32 + 2),
        st.integers(0, 2**64 - 1),
    ),
    max_size=20,
)


def one_key(seed, purpose, round, client):
    """The client-th number of SplitMix64, in Python's whole numbers."""
    word = 2**64 - 1
    sequence = np.random.SeedSequence([seed, int(purpose), round])
    state = int(sequence.generate_state(1, np.uint64)[0])
    z = (state + (client + 1) * 0x9E3779B97F4A7C15) & word
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & word
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & word
    return z ^ (z >> 31)


@given(
    st.one_of(st.integers(0, 3), st.integers(0, 2**130)),
    st.sampled_from(Purpose),
    st.one_of(st.integers(0, 1000), st.integers(0, 2**70)),
    CLIENTS,
)
def test_a_key_is_a_number_of_splitmix64(seed, purpose, round, clients):
    found = keys(seed, purpose, round, clients)
    assert found.dtype == np.uint64
    assert found.tolist() == [one_key(seed, purpose, round, c) for c in clients]


def test_a_clients_key_is_the_same_among_few_and_many():
    many = keys(3, Purpose.DROPOUT, 2, range(100))
    assert [int(keys(3, Purpose.DROPOUT, 2, [k])[0]) for k in range(100)] == (
        many.tolist()
    )
    with_a_large_one = keys(3, Purpose.DROPOUT, 2, [*range(100), 2**64 - 1])
    assert with_a_large_one[:100].tolist() == many.tolist()
    assert len(set(many.tolist())) == 100


def test_no_two_clients_rounds_or_purposes_share_a_key():
    names = itertools.product((0, 1, 2**40), Purpose, (0, 1, 2, 3, 500))
    some = [*range(200), *range(2**32 - 100, 2**32 + 100), 2**64 - 1]
    drawn = np.concatenate([keys(*name, some) for name in names])
    assert len(np.unique(drawn)) == len(drawn)
    # Each of the 64 bits is set in half of them.
    set_bits = (drawn[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(set_bits.mean(0) - 0.5).max() < 5 * 0.5 / len(drawn) ** 0.5


@pytest.mark.parametrize("client", [-1, 2**64])
def test_a_number_that_no_client_has_is_refused(client):
    with pytest.raises(OverflowError):
        keys(0, Purpose.SHUFFLE, 1, [client])


# Permutations: orders of examples, hashed.


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 200))
def test_a_permutation_is_one_and_a_function_of_key_and_pass(key, turn, n):
    order = permutation(key, turn, n)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))
    np.testing.assert_array_equal(permutation(key, turn, n), order)
    if n > 20:
        assert not np.array_equal(permutation(key, turn + 1, n), order)
        assert not np.array_equal(permutation(key ^ 1, turn, n), order)


def test_many_permutations_are_each_keys_own():
    some = keys(0, Purpose.SHUFFLE, 1, range(30))
    orders = permutations(some, 4, 17)
    assert orders.shape == (30, 17)
    for key, order in zip(some, orders, strict=True):
        np.testing.assert_array_equal(permutation(int(key), 4, 17), order)


def test_every_order_is_as_likely():
    some = keys(0, Purpose.SHUFFLE, 1, range(24_000))
    for turn in (0, 1):
        orders = permutations(some, turn, 4) @ np.array([64, 16, 4, 1])
        _, counts = np.unique(orders, return_counts=True)
        assert len(counts) == 24
        # chi2(23): above 60 with a probability of 4e-5.
        assert ((counts - 1000) ** 2 / 1000).sum() < 60


def test_passes_of_one_client_are_independent():
    orders = np.stack([permutation(12345, turn, 50) for turn in range(400)])
    together = np.corrcoef(orders[:-1].ravel(), orders[1:].ravel())[0, 1]
    assert abs(together) < 4 / (399 * 50) ** 0.5
    means = orders.mean(0)  # of 400 draws from 0 to 49: standard error 0.72
    assert np.abs(means - 24.5).max() < 4.5 * 14.43 / 20


def test_hashed_numbers_never_change_either():
    assert keys(0, Purpose.SHUFFLE, 1, [7]).tolist() == [KEY]
    assert permutation(KEY, 0, 8).tolist() == HASHED_ORDER


PERMUTATION = [4, 0, 3, 1, 2]
MODEL_SEED = 2918264622725855778
KEY = 7687535129957140171
HASHED_ORDER = [7, 3, 2, 6, 4, 0, 5, 1]
