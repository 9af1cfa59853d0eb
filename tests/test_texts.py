"""Texts from outside: short, on one terminal line or several, and harmless."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedweight.texts import plain, shown


@given(st.text(), st.integers(1, 40))
def test_a_text_has_its_length_and_nothing_that_a_terminal_obeys(text, limit):
    found = plain(text, limit)
    assert len(found) <= limit
    assert all(c.isprintable() or c in "\n\t" for c in found)
    if len(text) <= limit and all(c.isprintable() for c in text):
        assert found == text


@given(st.one_of(st.integers(), st.text(), st.lists(st.floats())), st.integers(1, 60))
def test_any_value_can_be_shown(value, limit):
    assert len(shown(value, limit)) <= limit


def test_a_value_that_cannot_be_written_is_called_by_its_kind():
    class Odd:
        def __repr__(self):
            raise RuntimeError

    assert shown(Odd()) == "a Odd"
