import itertools

import numpy as np
import pytest
import torch

from fedweight.rng import Purpose, generator, torch_generator, torch_seed


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


PERMUTATION = [4, 0, 3, 1, 2]
MODEL_SEED = 2918264622725855778
