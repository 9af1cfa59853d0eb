"""Options of whatever is picked by name, and values that a file can hold."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, NewType, Protocol, TypedDict, Unpack

import numpy as np
import pytest
import torch
from annotated_types import Ge, Gt, Le, Lt, MinLen

from fedweight.core.errors import ConfigurationError, DataError
from fedweight.core.options import (
    ANY,
    Option,
    check_options,
    options_of,
    resolve_options,
)
from fedweight.core.registry import check_callable, make
from fedweight.core.settings import parse_setting, toml_value


class More(TypedDict, total=False):
    sep: str
    header: bool | None


def reader(path, *, label: str | None = None, size: int = 3, **more: Unpack[More]): ...


def test_options_of_a_typed_dict_are_options():
    assert list(options_of(reader)) == ["path", "label", "size", "sep", "header"]
    check_options("data 'x'", reader, {"sep": ";", "size": np.int64(3)}, ["path"])
    with pytest.raises(DataError, match=r"no option 'sepp'. Did you mean 'sep'"):
        check_options("data 'x'", reader, {"sepp": ";"}, ["path"], DataError)
    with pytest.raises(ConfigurationError, match="size must be a whole number"):
        check_options("data 'x'", reader, {"size": True}, ["path"])


def test_an_option_must_be_what_its_annotation_says():
    def reader(path, *, label: str | None = None, classes: Sequence[str] = ()): ...

    check_options("data 'x'", reader, {"label": None, "classes": ["a"]}, ["path"])
    with pytest.raises(ConfigurationError, match="label must be a text, got 3"):
        check_options("data 'x'", reader, {"label": 3}, ["path"])
    with pytest.raises(ConfigurationError, match="classes must be a list, each a text"):
        check_options("data 'x'", reader, {"classes": 5}, ["path"])
    assert ANY not in options_of(reader)


def test_keys_are_checked_and_only_what_is_given_is_written_down():
    options = {k: o for k, o in options_of(reader).items() if k != "path"}
    assert resolve_options("data", options, {}) == {"size": 3}
    assert resolve_options("data", options, {"sep": ";"}) == {"size": 3, "sep": ";"}
    with pytest.raises(ConfigurationError, match=r"data.header must be true or false"):
        resolve_options("data", options, {"header": 3})


@pytest.mark.parametrize(
    ("function", "positional", "reason"),
    [
        (dict, 0, "does not say which options it takes"),
        (math.sqrt, 0, r"takes \(x, /\), but it is called as"),
        (math.sqrt, 2, r"takes \(x, /\), but it is called as"),
        (lambda x: x, 2, "but it is called as"),
        (math.pi, 0, "must be a function or a class"),
        ("text", 0, "must be a function or a class"),
    ],
)
def test_what_cannot_be_called_so_is_refused(function, positional, reason):
    with pytest.raises(ConfigurationError, match=f"model.name.*{reason}"):
        check_callable("model.name", function, "f(a, b)", positional)


def test_what_can_be_called_so_passes():
    class Model:
        def __init__(self, shape, classes, *, hidden=3): ...

    check_callable("x", Model, "f(a, b)", 2)
    check_callable("x", lambda *a, **k: None, "f(a, b)", 2)
    check_callable("x", lambda **k: None, "f()", 0)


def test_an_error_in_ones_own_code_is_one_line_that_says_where():
    def broken():
        return 1 // 0

    with pytest.raises(ConfigurationError) as caught:
        make("model 'own:net'", broken)
    assert str(caught.value).startswith(
        "model 'own:net' cannot be made: ZeroDivisionError: integer division or modulo "
        "by zero (test_options.py, line "
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(DataError, match=r"^ours$"):
        make("x", lambda: (_ for _ in ()).throw(DataError("ours")))


def test_numbers_of_numpy_and_tuples_become_what_toml_holds():
    value = toml_value(
        "k", {"a": (np.int64(1), np.float32(0.5)), "b": Path("x"), "c": True}
    )
    assert value == {"a": [1, 0.5], "b": "x", "c": True}
    assert [type(v) for v in value["a"]] == [int, float]
    assert toml_value("k", date(2026, 1, 2)) == date(2026, 1, 2)


def nested(depth: int) -> list[Any]:
    value: list[Any] = [1]
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (2**63, "must lie between -2^63 and 2^63 - 1"),
        ([10**400], "must lie between"),
        (10**5000, "must lie between"),
        ({"a": -(10**30)}, "must lie between"),
        ("a\0b", "must not hold NUL"),
        (["\ud800"], "must be Unicode text"),
        ({3: 1}, "the keys of a table are texts"),
        ({"a\0": 1}, "must not hold NUL"),
        (nested(30), "nested more than 20 deep"),
        (nested(900), "nested more than 20 deep"),
        (object(), "something that a simulation file can hold"),
        (b"x", "something that a simulation file can hold"),
        ([None], "something that a simulation file can hold"),
        (np.zeros(2), "something that a simulation file can hold"),
        ({1, 2}, "something that a simulation file can hold"),
        (1j, "something that a simulation file can hold"),
    ],
    ids=range(16),
)
def test_what_no_file_can_hold_is_refused(value, reason):
    with pytest.raises(ConfigurationError) as caught:
        toml_value("k", value)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 300


class Speaks(Protocol):
    def speak(self) -> str: ...


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (np.int64(3), int),
        (np.float32(3), float),
        (3, float),
        ({"a": "category"}, Mapping[str, Literal["category", "number"]]),
        ({"a": 3}, dict[str, int]),
        (["a"], str | Sequence[str]),
        ("a", str | Sequence[str]),
        (3, Speaks),
    ],
)
def test_values_that_fit_their_annotation(value, annotation):
    Option(None, annotation).checked("k", value)


@pytest.mark.parametrize(
    ("value", "annotation", "wanted"),
    [
        (True, int, "a whole number"),
        ({"a": "text"}, Mapping[str, Literal["category"]], "a table, each one of"),
        (3, Mapping[str, int], "a table, each a whole number"),
        (3, Mapping[str, Any], "a table, got 3"),
        (3, str | Sequence[str], "a text or a list, each a text"),
    ],
)
def test_values_that_do_not_fit_are_told_what_does(value, annotation, wanted):
    with pytest.raises(ConfigurationError, match=f"k must be {wanted}"):
        Option(None, annotation).checked("k", value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=" + "9" * 5000, "9" * 5000),
        ("a.b=" + "[" * 5000, "[" * 5000),
        ("a.b=1\nc=2", "1\nc=2"),
        ("a.b=1 # note", 1),
        ('a.b=";"', ";"),
        ("a.b=;", ";"),
    ],
    ids=range(6),
)
def test_a_settings_value_is_read_whole_or_taken_as_text(text, value):
    assert parse_setting(text) == ("a", "b", value)


Number = NewType("Number", int)
Between = Annotated[int, Ge(1), Le(8)] | Annotated[float, Gt(0), Lt(1)]


@pytest.mark.parametrize(
    ("annotation", "value", "taken"),
    [
        (Literal[1, 2], 1, 1),
        (Number, np.int64(3), 3),
        (Annotated[float | None, Gt(0)], 1, 1.0),
        (Annotated[float | None, Gt(0)], None, None),
        (list[int], (1, np.int32(2)), [1, 2]),
        (tuple[int, ...], [1, 2], (1, 2)),
        (Collection[str], {"a"}, {"a"}),
        (Collection[str], {"a": 1}.keys(), {"a"}),
        (set[str], {"a"}, {"a"}),
        (Sequence[float], np.ones(2), [1.0, 1.0]),
        (Between, 0.5, 0.5),
        (str | Path, Path("a"), Path("a")),
    ],
)
def test_what_is_taken_becomes_what_was_asked_for(annotation, value, taken):
    found = Option(None, annotation).checked("k", value)
    assert found == taken
    assert type(found) is type(taken)


@pytest.mark.parametrize(
    ("annotation", "value", "said"),
    [
        (Literal[1, 2], True, "one of 1, 2, got True"),
        (Literal[1, 2], 1.0, "one of 1, 2, got 1.0"),
        (Number, True, "Number, got True"),
        (Number, "3", "Number, got '3'"),
        (Annotated[float | None, Gt(0)], math.inf, "in (0, inf), got inf"),
        (
            dict[str, Annotated[float, Gt(0)]],
            {"a": -1},
            "each a number in (0, inf), got",
        ),
        (Between, 9, "a whole number in [1, 8] or a number in (0, 1), got 9"),
        (Annotated[str, MinLen(3)], "a", "should have at least 3 characters), got 'a'"),
        (Sequence[str], "sex", "k must be a list, each a text, got 'sex'."),
        (Annotated[int, Ge(1), Le(2**31)], 2**32, "at most 2,147,483,648, got"),
    ],
)
def test_what_does_not_fit_is_told_with_its_bounds(annotation, value, said):
    with pytest.raises(ConfigurationError) as caught:
        Option(None, annotation).checked("k", value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_and_arrays_stay_what_they_are():
    tensor, array = torch.ones(3), np.ones(2)
    assert Option(None, torch.Tensor | None).checked("k", tensor) is tensor
    assert Option(None, np.ndarray).checked("k", array) is array
