import math

import pytest

from fedweight.core import errors
from fedweight.core.errors import (
    ConfigurationError,
    check_choice,
    check_range,
    closest,
    describe_failure,
)


def test_every_error_is_one_of_ours():
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ]
    assert len(kinds) >= 6
    assert all(issubclass(kind, errors.FedweightError) for kind in kinds)
    assert issubclass(ConfigurationError, ValueError)


@pytest.mark.parametrize(
    ("value", "bounds", "options"),
    [
        (0, (0, 1), {}),
        (1, (0, 1), {}),
        (0.5, (0, 1), {"low_open": True, "high_open": True}),
        (-3, (), {}),
        (10**400, (0,), {}),
    ],
)
def test_what_is_in_range_passes(value, bounds, options):
    check_range("x", value, *bounds, **options)


@pytest.mark.parametrize(
    ("value", "bounds", "options", "text"),
    [
        (-0.1, (0, 1), {}, "x must be in [0, 1], got -0.1."),
        (0, (0, 1), {"low_open": True}, "x must be in (0, 1], got 0."),
        (1, (0, 1), {"high_open": True}, "x must be in [0, 1), got 1."),
        (math.inf, (0,), {}, "x must be in [0, inf), got inf."),
        (-math.inf, (), {}, "x must be in (-inf, inf), got -inf."),
        (math.nan, (), {}, "x must be in (-inf, inf), got nan."),
        (math.nan, (0, 1), {}, "x must be in [0, 1], got nan."),
    ],
)
def test_what_is_out_of_range_is_told_the_range(value, bounds, options, text):
    with pytest.raises(ConfigurationError) as caught:
        check_range("x", value, *bounds, **options)
    assert str(caught.value) == text


def test_a_choice_is_told_what_there_is():
    check_choice("x", "a", iter(["a", "b"]))
    with pytest.raises(ConfigurationError) as caught:
        check_choice("x", "fedavgg", iter(["fedavg", "ida"]))
    assert str(caught.value) == (
        "x must be one of 'fedavg', 'ida', got 'fedavgg'. Did you mean 'fedavg'?"
    )


def test_closest_reads_underscores_as_hyphens():
    assert closest("held_out", ["held-out"]) == " Did you mean 'held-out'?"
    assert closest("qqq", ["held-out"]) == ""
    assert closest("x", []) == ""


def test_an_error_that_cannot_be_shown_is_described():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no words")

    found = describe_failure(3, "train", Mute())
    assert found.startswith("client 3, train: Mute: an error that cannot be shown\n")
