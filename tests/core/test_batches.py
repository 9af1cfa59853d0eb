"""How examples are cut into batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedweight.core.batches import batches, least_examples, num_batches


@given(st.integers(0, 60), st.integers(1, 12), st.integers(1, 2))
def test_batches_have_every_example_once(n, size, least):
    parts = batches(n, size, least)
    assert [k for part in parts for k in range(n)[part]] == list(range(n))
    assert len(parts) == num_batches(n, size, least)
    assert len(parts) == num_batches(np.array([n]), size, least)[0]
    sizes = [part.stop - part.start for part in parts]
    assert all(k == size for k in sizes[:-1])
    if n:
        joined = least == 2 and n > size and n % size == 1
        assert sizes[-1] == (size + 1 if joined else (n - 1) % size + 1)


@pytest.mark.parametrize(("can", "least"), [((1, 2), 1), ((2,), 2), ((), 1), ((1,), 1)])
def test_what_a_model_needs(can, least):
    assert least_examples(can.__contains__) == least
