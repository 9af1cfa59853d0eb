"""What an annotation says of the values that fit: to pydantic, and in words."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt
from pydantic import AllowInfNan, BeforeValidator, Strict
from pydantic.fields import FieldInfo

from .texts import shown

# Bounds from here on only keep out mistakes. A range does not tell them.
_FAR = 1000


def plain_value(value: Any) -> Any:
    """Return NumPy's and PyTorch's numbers and arrays as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return (
            type(value)(map(plain_value, value))
            if type(value) in (list, tuple)
            else value
        )
    if isinstance(value, KeysView | ValuesView):
        return list(value)
    if isinstance(value, Mapping):
        return {plain_value(key): plain_value(v) for key, v in value.items()}
    if hasattr(value, "tolist") and hasattr(value, "shape"):
        return value.tolist()
    return value


def bare(annotation: Any) -> Any:
    """Return an annotation without what ``Annotated`` adds."""
    if typing.get_origin(annotation) is Annotated:
        return bare(typing.get_args(annotation)[0])
    return Any if isinstance(annotation, TypeVar) else annotation


def _raw_metadata(annotation: Any) -> Iterator[Any]:
    """Yield what ``Annotated`` adds, to a type or to one of its alternatives."""
    if typing.get_origin(annotation) is Annotated:
        yield from annotation.__metadata__
        annotation = bare(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for alternative in typing.get_args(annotation):
            yield from _raw_metadata(alternative)


def metadata(annotation: Any) -> list[Any]:
    """Return all of it, with the parts of pydantic's fields and of intervals."""
    found = list(_raw_metadata(annotation))
    for item in found:  # Grows meanwhile.
        if isinstance(item, FieldInfo):
            found += item.metadata
        elif isinstance(item, GroupedMetadata):
            found += item
    return found


def _bounds(annotation: Any) -> tuple[float, float, bool, bool] | None:
    """Return low, high, and whether each is itself left out; ``None`` without any."""
    low, high, low_open, high_open = -math.inf, math.inf, True, True
    for item in metadata(annotation):
        if isinstance(item, Ge):
            low, low_open = item.ge, False  # type: ignore[assignment]
        elif isinstance(item, Gt):
            low, low_open = item.gt, True  # type: ignore[assignment]
        elif isinstance(item, Le):
            high, high_open = item.le, False  # type: ignore[assignment]
        elif isinstance(item, Lt):
            high, high_open = item.lt, True  # type: ignore[assignment]
    bounded = math.isfinite(low) or math.isfinite(high)
    return (low, high, low_open, high_open) if bounded else None


def _interval(annotation: Any) -> str:
    """Return the bounds as an interval; empty without any."""
    bounds = _bounds(annotation)
    if bounds is None:
        return ""
    low, high, low_open, high_open = bounds
    if high > _FAR:
        high, high_open = math.inf, True
    left, right = "(" if low_open else "[", ")" if high_open else "]"
    return f"{left}{low:g}, {high:g}{right}"


def out_of_range(where: str, value: Any, annotation: Any) -> str:
    """Return the message about a number out of its range; empty where there are two."""
    bounds = _bounds(annotation)
    if bounds is not None and _FAR < bounds[1] < value < math.inf:
        return f"{where} must be at most {bounds[1]:,.0f}, got {shown(value)}."
    interval = _interval(annotation)
    several = [item for item in metadata(annotation) if isinstance(item, Ge | Gt)]
    if not interval or len(several) > 1:
        return ""
    return f"{where} must be in {interval}, got {shown(value)}."


def strict(annotation: Any) -> Any:
    """Return the annotation for pydantic: strict of numbers, texts and flags."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        inner, *added = arguments
        if typing.get_origin(inner) in (typing.Union, types.UnionType):
            # Bounds are those of the numbers among the alternatives.
            kinds = [
                Annotated[(kind, *added)] if kind in (int, float) else kind
                for kind in typing.get_args(inner)
            ]
            return typing.Union[tuple(map(strict, kinds))]  # noqa: UP007
        finite = bare(annotation) is float and _bounds(annotation) is not None
        extra = [AllowInfNan(False)] if finite else []
        return Annotated[(strict(inner), *extra, *added)]
    if origin is Literal:
        return Annotated[annotation, BeforeValidator(partial(_of_a_kind, arguments))]
    if hasattr(annotation, "__supertype__"):  # A NewType.
        return strict(annotation.__supertype__)
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(map(strict, arguments))]  # noqa: UP007
    if annotation in (int, float, bool, str):
        return Annotated[annotation, Strict()]
    if isinstance(annotation, TypeVar) or getattr(annotation, "_is_protocol", False):
        return Any
    if not isinstance(origin, type):
        return annotation
    if issubclass(origin, Mapping):
        return dict[tuple(map(strict, arguments))] if arguments else dict  # type: ignore[misc]
    if issubclass(origin, tuple):
        several = tuple(a if a is ... else strict(a) for a in arguments)
        return tuple[several]  # type: ignore[valid-type]
    if not issubclass(origin, Iterable):
        return annotation
    inner = strict(arguments[0]) if arguments else Any
    if origin in (list, set, frozenset):
        return origin[inner]
    if origin in (Collection, Iterable):
        return Sequence[inner] | set[inner] | frozenset[inner]  # type: ignore[valid-type]
    return Sequence[inner]  # type: ignore[valid-type]


def _of_a_kind(listed: Sequence[Any], value: Any) -> Any:
    """Refuse what equals a listed value and is none, as ``True`` equals 1."""
    if type(value) not in map(type, listed):
        raise ValueError("it is of another kind")
    return value


def choices(annotation: Any) -> Iterator[Any]:
    """Yield the values that an annotation lists."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        yield from arguments
    elif origin is Annotated:
        yield from choices(arguments[0])
    elif origin in (typing.Union, types.UnionType):
        for alternative in arguments:
            yield from choices(alternative)


def described(annotation: Any) -> str:
    """Return what fits an annotation, in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        interval = _interval(annotation)
        inside = f" in {interval}" if interval else ""
        return f"{described(arguments[0])}{inside}"
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        kinds = [a for a in arguments if a is not types.NoneType]
        return " or ".join(described(a) for a in kinds)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        inner = arguments[1] if len(arguments) == 2 else Any
        return "a table" if inner is Any else f"a table, each {described(inner)}"
    if origin is Callable:
        return "a function"
    if isinstance(origin, type) and issubclass(origin, Iterable):
        inner = arguments[0] if arguments else Any
        return f"a list, each {described(inner)}"
    named = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        Path: "a path",
        Any: "anything",
    }
    return named.get(annotation, getattr(annotation, "__name__", str(annotation)))
