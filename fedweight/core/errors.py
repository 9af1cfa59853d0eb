"""The errors fedweight raises, and the helpers that word them.

Every message names what was given, what is allowed, and what to do next.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable

from .texts import shown


class FedweightError(Exception):
    """Base of every error that fedweight raises on purpose."""


class ConfigurationError(FedweightError, ValueError):
    """A parameter, or a key of a simulation file, is not allowed."""


class DataError(FedweightError):
    """A data set is missing, malformed, or does not fit the request."""


class AggregationError(FedweightError):
    """A round's replies cannot be turned into a new global model."""


class ClientError(FedweightError):
    """A client failed; the message carries the client, the stage and the cause."""


class EngineError(FedweightError):
    """A grid or one of its workers cannot do what was asked."""


class OutputError(FedweightError, OSError):
    """A file of a run cannot be written: a full disk, or no permission."""


def closest(name: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest allowed name, or ``""``.

    Examples
    --------
    >>> closest("fedavgg", ["fedavg", "ida"])
    " Did you mean 'fedavg'?"
    >>> closest("zzz", ["fedavg"])
    ''
    """
    others = [other for other in allowed if other != name]
    match = difflib.get_close_matches(name.replace("_", "-"), others, n=1)
    return f" Did you mean '{match[0]}'?" if match else ""


def check_range(
    name: str,
    value: float,
    low: float = float("-inf"),
    high: float = float("inf"),
    *,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raise :class:`ConfigurationError` unless ``value`` lies between the bounds.

    Parameters
    ----------
    name : str
        The parameter, as the user writes it.
    value : float
        What the user gave. NaN and infinity are never allowed.
    low, high : float
        The bounds; a finite one belongs to the range unless its ``_open`` flag is set.
    low_open, high_open : bool
        Whether the bound itself is excluded.

    Examples
    --------
    >>> check_range("alpha", 0.3, 0, low_open=True)
    >>> check_range("alpha", -1.0, 0, low_open=True)
    Traceback (most recent call last):
    fedweight.core.errors.ConfigurationError: alpha must be in (0, inf), got -1.0.
    """
    low_open = low_open or low == float("-inf")
    high_open = high_open or high == float("inf")
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if above and below:
        return
    left, right = "(" if low_open else "[", ")" if high_open else "]"
    raise ConfigurationError(
        f"{name} must be in {left}{low:g}, {high:g}{right}, got {shown(value)}."
    )


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise :class:`ConfigurationError` unless ``value`` is one of ``allowed``.

    Examples
    --------
    >>> check_choice("form", "exp", ["exp", "quad"])
    >>> check_choice("form", "expo", ["exp", "quad"])
    Traceback (most recent call last):
    fedweight.core.errors.ConfigurationError: form must be one of 'exp', 'quad', \
got 'expo'. Did you mean 'exp'?
    """
    options = list(allowed)
    if value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise ConfigurationError(
            f"{name} must be one of {listed}, got {shown(value)}."
            f"{closest(str(value), options)}"
        )


def describe_failure(client: int, stage: str, error: BaseException) -> str:
    """Return why a client failed: a line that says it, then the traceback.

    Parameters
    ----------
    client : int
        The client's number.
    stage : str
        What it was doing, such as ``"train"``.
    error : BaseException
        What its code raised.
    """
    trace = "".join(traceback.format_exception(error))
    try:
        said = str(error)
    except Exception:  # Somebody's own __str__.
        said = "an error that cannot be shown"
    return f"client {client}, {stage}: {type(error).__name__}: {said}\n{trace}"
