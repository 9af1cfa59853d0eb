import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedweight.metrics import client_spread

NAN = math.nan


def test_by_hand():
    spread = client_spread([0.4, 0.1, 0.3, 0.2])
    assert spread["mean"] == pytest.approx(0.25)
    assert spread["std"] == pytest.approx(math.sqrt(0.0125))
    assert spread["worst10"] == 0.1
    assert spread["best10"] == 0.4


def test_a_tenth_is_rounded_up_to_whole_clients():
    values = [k / 100 for k in range(11)]
    spread = client_spread(values)
    assert spread["worst10"] == pytest.approx(0.005)
    assert spread["best10"] == pytest.approx(0.095)
    assert client_spread(values[:10])["worst10"] == 0.0


def test_clients_without_a_value_are_left_out():
    assert client_spread([NAN, 0.5, NAN]) == client_spread([0.5])
    assert client_spread(iter([0.5, 0.7])) == client_spread([0.7, 0.5])


@pytest.mark.parametrize("values", [[], [NAN, NAN]])
def test_nobody_is_nan(values):
    spread = client_spread(values)
    assert list(spread) == ["mean", "std", "worst10", "best10"]
    assert all(map(math.isnan, spread.values()))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_order(values):
    spread = client_spread(values)
    slack = 1e-12
    assert min(values) - slack <= spread["worst10"] <= spread["mean"] + slack
    assert spread["mean"] - slack <= spread["best10"] <= max(values) + slack
    assert spread["std"] == pytest.approx(np.std(values), abs=1e-12)
