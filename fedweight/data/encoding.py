"""How columns of a CSV file become arrays: values, codes of classes, inputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..core.errors import DataError
from ..core.extras import Imported
from ..core.memory import check_memory
from ..core.texts import listed, shown
from .tables import is_numeric
from .targets import Array

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = Imported("pandas", "studies", "a CSV file")

Label = str | int | float | bool


def values_of(*parts: pd.Series[Any]) -> list[Any]:
    """Return the different values of one column in some files, sorted.

    ``0`` in one file and ``0.0`` in another are one value, as the first writes it.
    """
    if len({is_numeric(part) for part in parts}) == 1:
        first: list[Any] = list(parts[0].unique().tolist())
        if is_numeric(parts[0]):
            every = {v for part in parts for v in part.unique().tolist()} - set(first)
            kind = float if any(isinstance(v, float) for v in first) else int
            others = [kind(v) if float(v).is_integer() else v for v in every]
        else:
            known = set(map(str, first))
            first = list(known)
            others = list({str(v) for part in parts for v in part.unique()} - known)
        return sorted([*first, *others])
    texts = {text_of(v) for part in parts for v in part.unique().tolist()}
    return sorted(texts)


def text_of(value: Any) -> str:
    """Return a value as text: a whole number without decimals, in whatever form."""
    if isinstance(value, str) and value.strip().lower() not in ("nan", "inf", "-inf"):
        try:
            number = float(value)
        except ValueError:
            return value
        return (
            str(int(number)) if number.is_integer() and abs(number) < 2**53 else value
        )
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value)


def codes_of(
    path: Path, values: pd.Series[Any], known: Sequence[Label]
) -> npt.NDArray[np.int64]:
    """Return the place of each value among the known ones."""
    places = {v if isinstance(v, str) else text_of(v): k for k, v in enumerate(known)}
    if not known or len(places) < len(known):
        raise DataError(
            f"{path}: classes must be the different values of '{values.name}', got "
            f"{shown(list(known))}."
        )
    numbers = {_number(v): k for k, v in enumerate(known)}
    rows, different = pd.factorize(values)
    codes = np.empty(len(different), np.int64)
    for k, value in enumerate(different.tolist()):
        code = places.get(value) if isinstance(value, str) else None
        code = places.get(text_of(value)) if code is None else code
        code = numbers.get(_number(value)) if code is None else code
        if code is None:
            raise DataError(
                f"{path}: column '{values.name}' holds {shown(value)}, which is none "
                f"of {listed(map(repr, known), most=20)}."
            )
        codes[k] = code
    return codes[rows]


def _number(value: Any) -> Any:
    """Return a value as the number that it is or reads as, or else as it is."""
    if isinstance(value, str):
        for kind in (int, float):  # A float holds no more than 15 digits for sure.
            with suppress(ValueError):
                return kind(value)
    return value


def attribute_of(
    path: Path, values: pd.Series[Any], names: Sequence[str] | None
) -> Array:
    """Return a sensitive column as numbers, or as codes of the groups with names."""
    return numbers_of(path, values) if names is None else codes_of(path, values, names)


def numbers_of(path: Path, values: pd.Series[Any]) -> Array:
    """Return a column of numbers as float64, or say that it has something else."""
    try:
        return np.asarray(values, np.float64)
    except (ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: column '{values.name}' is numeric, but not in the test file: "
            f"{error}."
        ) from error


class Encoder:
    """Turns rows of a table into a model's inputs, by what the training rows hold."""

    def __init__(self, path: Path, train: pd.DataFrame, standardise: bool) -> None:
        self.path = path
        self.columns: list[tuple[str, Sequence[str] | None, float, float]] = []
        names = []
        for name in train.columns:
            seen = train[name]
            categories, mean, spread = None, 0.0, 1.0
            if not is_numeric(seen):
                categories = sorted(set(seen.astype(str)))
            elif standardise and not pd.api.types.is_bool_dtype(seen):
                with np.errstate(over="ignore", invalid="ignore"):
                    mean, spread = float(seen.mean()), float(seen.std(ddof=0)) or 1.0
            self.columns.append((name, categories, mean, spread))
            names += (
                [name] if categories is None else [f"{name}={c}" for c in categories]
            )
        self.names = tuple(names)

    def __call__(self, part: pd.DataFrame) -> npt.NDArray[np.float32]:
        """Return the inputs, ``[n, d]``."""
        check_memory(
            f"{self.path}: {len(part):,} rows of {len(self.names):,} features",
            4.0 * len(part) * len(self.names),
            "Leave columns of many different texts out, with drop.",
            DataError,
        )
        x = np.zeros((len(part), len(self.names)), np.float32)
        at = 0
        for name, categories, mean, spread in self.columns:
            values = part[name]
            if categories is not None:
                texts = (
                    map(text_of, values) if is_numeric(values) else values.astype(str)
                )
                codes = pd.Index(categories).get_indexer(pd.Index(list(texts)))
                there = np.flatnonzero(codes >= 0)
                x[there, at + codes[there]] = 1
                at += len(categories)
            else:
                with np.errstate(over="ignore", invalid="ignore"):
                    x[:, at] = (numbers_of(self.path, values) - mean) / spread
                at += 1
        check_float32(self.path, self.names, x)
        return x


def check_float32(path: Path, names: Sequence[str], x: Array) -> None:
    """Raise a DataError if columns, ``[n, d]``, hold numbers beyond float32."""
    if not np.isfinite(x.sum(dtype=np.float64)):
        bad = ~np.isfinite(x).all(axis=0)
        if bad.any():
            raise DataError(
                f"{path}: column '{names[int(bad.argmax())]}' has numbers beyond 3e38, "
                "which a 32-bit float cannot hold. Divide it first, or leave it out "
                "with drop."
            )
