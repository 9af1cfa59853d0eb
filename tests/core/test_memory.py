import gc
import weakref

import pytest

from fedweight.core.memory import settled


@pytest.fixture(autouse=True)
def nothing_is_settled():
    """Begin as a notebook does; the command line keeps what it imports."""
    gc.unfreeze()


class Ring:
    """Holds itself, so that only the collector lets go of it."""

    def __init__(self):
        self.itself = self


def test_what_was_there_is_left_alone_and_what_is_new_is_collected():
    old = Ring()
    seen = weakref.ref(old)
    with settled():
        del old
        new = Ring()
        seen_too = weakref.ref(new)
        del new
        gc.collect()
        assert seen() is not None
        assert seen_too() is None
    gc.collect()
    assert seen() is None


def test_whoever_settled_first_ends_it():
    with settled():
        with settled():
            pass
        # Not a certain number: what is let go of anywhere counts no more.
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_an_error_ends_it():
    with pytest.raises(KeyError), settled():
        raise KeyError
    assert gc.get_freeze_count() == 0
