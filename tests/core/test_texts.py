from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedweight.core.texts import cause, listed, plain, plain_lines, rounds_listed, shown

ODD = [
    "\x1b]0;title\x07\x1b[2J",
    "a\r\nb\tc\u2028d\x85e",
    "\u202eevil\u202c \u2066x\u2069 \u200f",
    "\ud800 half of a pair",
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r@x",
    "＝1",  # noqa: RUF001
    "<script>alert(1)</script>",
    "$x^2$",
    "\x00" * 5000,
    "x" * 5000,
    "",
]


@given(text=st.one_of(st.text(), st.sampled_from(ODD)), limit=st.integers(2, 80))
def test_any_text_becomes_one_harmless_line(text: str, limit: int) -> None:
    line = plain(text, limit)
    assert len(line) <= limit
    assert line.replace("\u200c", "").replace("\u200d", "").isprintable()
    line.encode("utf-8")
    assert plain(line, limit) == line
    assert line == line.strip()
    if line.startswith(tuple("=+-@＝＋－＠")):  # noqa: RUF001
        float(line.replace(",", "").removesuffix("…") or 0)


@pytest.mark.parametrize("text", ["Hôpital Nord-Est", "病院", "client 3", "a, b; c"])
def test_what_is_harmless_stays_as_it_is(text: str) -> None:
    assert plain(text) == text


@pytest.mark.parametrize("number", ["-3", "+4.5", "-1e-5", "-inf", "-1,234.5"])
def test_a_number_is_no_formula(number: str) -> None:
    assert plain(number) == number


@pytest.mark.parametrize("text", ["-", "=", "+49 171", "-3+A1", "--1", "-1e5x"])
def test_what_only_begins_like_a_number_is_marked(text: str) -> None:
    assert plain(text) == f"'{text}"


def test_a_text_is_cut_and_says_so() -> None:
    assert plain("abcdef", 4) == "abc…"
    assert plain("abcd", 4) == "abcd"
    assert plain("ab…cdef…", 4) == "ab……"
    assert plain(" " * 10_000 + "x", 4) == "x"
    assert plain("x" + " " * 10_000, 4) == "x"
    assert plain("x" + " " * 10_000 + "y", 4) == "x…"


def test_a_table_of_odd_texts_has_one_line_each() -> None:
    file = io.StringIO()
    csv.writer(file).writerows([plain(text)] for text in ODD[:-1])
    assert len(file.getvalue().splitlines()) == len(ODD) - 1


def test_lines_stay_lines() -> None:
    text = "Traceback:\r\n\tFile \x1b[31m\n\n  last\u202e\n"
    assert plain_lines(text, 100) == "Traceback:\n    File \\x1b[31m\n\n  last\\u202e"
    assert plain_lines("a" * 100, 10) == "a" * 10


def test_causes_are_alike_where_only_the_client_differs() -> None:
    reasons = ["client 3, train: E: x\nTrace", "client 44, train: E: x", "train: E: x"]
    assert {cause(reason) for reason in reasons} == {"train: E: x"}
    assert cause("") == ""
    assert cause("client error, odd") == "client error, odd"


@given(st.sets(st.integers(0, 60), min_size=1))
def test_rounds_in_words_name_each_once(rounds: set[int]) -> None:
    words = rounds_listed(rounds, most=100).replace(" and ", ", ").split(" ", 1)
    assert words[0] == ("rounds" if len(rounds) > 1 else "round")
    named: list[int] = []
    for part in words[1].split(", "):
        first, _, last = part.partition(" to ")
        named += range(int(first), int(last or first) + 1)
    assert named == sorted(rounds)


def test_long_lists_are_shortened() -> None:
    assert listed([str(n) for n in range(5)]) == "0, 1, 2 and 2 others"
    assert listed([str(n) for n in range(4)]) == "0, 1, 2 and 3"
    assert listed([]) == ""
    assert rounds_listed(range(1, 40, 2)) == "rounds 1, 3, 5, 7 and 16 others"


def test_values_and_names_are_shown_short_and_on_one_line():
    assert shown(np.str_("a")) == "'a'"
    assert shown(np.int64(3)) == "3"
    assert len(shown("x" * 10_000)) <= 100
    assert shown(10**5000) == "a value of type int that cannot be shown"
    assert "\n" not in shown(np.zeros((9, 9)))
    assert listed("abcde", most=3) == "a, b, c and 2 others"
    assert listed("abcd", most=3) == "a, b, c and d"
    assert listed([]) == ""


@given(st.one_of(st.integers(), st.text(), st.lists(st.floats())), st.integers(2, 60))
def test_any_value_can_be_shown(value, limit):
    assert len(shown(value, limit)) <= limit


def test_a_value_that_cannot_be_written_is_called_by_its_kind():
    class Odd:
        def __repr__(self):
            raise RuntimeError

    assert shown(Odd()) == "a value of type Odd that cannot be shown"
