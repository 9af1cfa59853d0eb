"""Values as simulation files and settings write them."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from datetime import date, time
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConfigurationError
from .texts import shown

# Whole numbers are as long as TOML and Flower write them.
_LEAST, _MOST = -(2**63), 2**63 - 1

# Values are nested no deeper: nothing needs it, and what reads them recurses.
_DEPTH = 20


def kebab(key: str) -> str:
    """Return a name of Python's as a key of a file."""
    return key.replace("_", "-")


def kebab_key(dotted: str, setting: str = "") -> str:
    """Return ``table.key`` as files have it, however the key is spelled.

    Examples
    --------
    >>> kebab_key("training.learning_rate")
    'training.learning-rate'
    """
    table, key = split_key(dotted, setting or dotted)
    return f"{table}.{kebab(key)}"


def names_of(value: Any, known: Collection[str] = ()) -> Any:
    """Return names as a list; one text is a name, or several between commas.

    What is no text is returned as it is, and a list is never taken apart.

    Parameters
    ----------
    value : Any
        What the user gave.
    known : Collection[str]
        Names that may have commas in them.

    Examples
    --------
    >>> names_of("sex, race"), names_of(["a,b"]), names_of("a,b", ["a,b"])
    (['sex', 'race'], ['a,b'], ['a,b'])
    """
    if not isinstance(value, str):
        return value
    if value in known:
        return [value]
    return [name.strip() for name in value.split(",") if name.strip()]


def toml_value(where: str, value: Any) -> Any:
    """Return a value as a simulation file can hold it, or raise if none can.

    NumPy's numbers become Python's, and tuples lists.

    Parameters
    ----------
    where : str
        The key, as the user writes it.
    value : Any
        What the user gave.

    Raises
    ------
    ConfigurationError
        For a whole number of more than 64 bits, a text that is not Unicode or holds
        NUL, or lists within lists without end.

    Examples
    --------
    >>> toml_value("model.hidden", (np.int64(64), 32))
    [64, 32]
    """
    return _toml_value(where, value, 0)


def _toml_value(where: str, value: Any, depth: int) -> Any:
    if depth > _DEPTH:
        raise ConfigurationError(
            f"{where} is nested more than {_DEPTH} deep. Give a flatter value."
        )
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list | tuple):
        return [_toml_value(where, v, depth + 1) for v in value]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigurationError(
                    f"{where}: the keys of a table are texts, got {shown(key)}."
                )
            check_text(where, key)
        return {k: _toml_value(where, v, depth + 1) for k, v in value.items()}
    if isinstance(value, Path):
        value = str(value)
    if depth == 0 and value is None:  # From Python: as if it were not given.
        return value
    if not isinstance(value, bool | int | float | str | date | time):
        raise ConfigurationError(
            f"{where} must be something that a simulation file can hold, got "
            f"{shown(value)}. Give a number, a text, true or false, or a list or table "
            "of them."
        )
    if isinstance(value, int) and not _LEAST <= value <= _MOST:
        raise ConfigurationError(
            f"{where} must lie between -2^63 and 2^63 - 1, got {shown(value)}."
        )
    if isinstance(value, str):
        check_text(where, value)
    return value


def check_text(where: str, text: str) -> None:
    """Raise :class:`ConfigurationError` unless a text can be written to any file."""
    if "\0" in text:
        raise ConfigurationError(f"{where} must not hold NUL, got {shown(text)}.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(
            f"{where} must be Unicode text, got {shown(text)}. Is your terminal's "
            "encoding UTF-8?"
        ) from None


def parse_setting(setting: str) -> tuple[str, str, Any]:
    """Read ``"table.key=value"``; the value is TOML, or else plain text.

    Examples
    --------
    >>> parse_setting("partition.alpha=0.1")
    ('partition', 'alpha', 0.1)
    >>> parse_setting("strategy.name=ida")
    ('strategy', 'name', 'ida')
    """
    dotted, equals, text = setting.partition("=")
    table, key = split_key(dotted if equals else "", setting)
    try:
        read = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # No TOML, or too much of it for Python.
        read = {"value": text.strip()}
    # A line break in the text would begin other keys, which nobody would see.
    value = read["value"] if len(read) == 1 else text.strip()
    return table, key, value


def split_key(dotted: str, setting: str) -> tuple[str, str]:
    """Read ``"table.key"``, a part of a setting that an error message names."""
    table, _, key = dotted.strip().partition(".")
    if not (table and key):
        raise ConfigurationError(
            f"setting {shown(setting)} must be written table.key=value, such as "
            "partition.alpha=0.1."
        )
    return table, key
