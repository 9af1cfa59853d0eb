"""Data sets, and how they are split over clients.

Most users need :func:`load` and :func:`federate` only.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.digests import digest_of, digest_of_file
from ..core.errors import DataError
from ..core.options import check_options, options_of
from ..core.paths import clean_path
from ..core.registry import Registry, check_callable, make
from .examples import DataSet, Examples, check
from .federated import ClientData, FederatedData, federate, load_client, take_proxy
from .fetch import default_folder, fetch
from .notes import notes
from .partitions import partition, partition_catalogue
from .schema import Schema

__all__ = [
    "DATA_SETS",
    "ClientData",
    "DataSet",
    "Examples",
    "FederatedData",
    "Schema",
    "catalogue",
    "check",
    "default_folder",
    "digest_of_files",
    "federate",
    "fetch",
    "load",
    "load_client",
    "notes",
    "partition",
    "partition_catalogue",
    "take_proxy",
]

DATA_SETS = Registry(
    "data set",
    {
        "adult": "fedweight.data.adult:load",
        "csv": "fedweight.data.files:load_csv",
        "digits": "fedweight.data.digits:load",
        "fashion-mnist": "fedweight.data.fashion_mnist:load",
        "npz": "fedweight.data.files:load_npz",
        "shakespeare": "fedweight.data.shakespeare:load",
        "shapes": "fedweight.data.shapes:load",
    },
)


def load(
    name: str, path: str | Path | None = None, seed: int = 0, **options: Any
) -> DataSet:
    """Load a data set.

    Parameters
    ----------
    name : str
        One of :func:`catalogue`, or ``"module:function"`` for one of your own: the
        function gets the options, and ``path`` and ``seed`` where it has parameters of
        these names, and returns a :class:`DataSet`.
    path : str or Path, optional
        The file or folder that holds it.
    seed : int
        Draws what the data set itself draws: the test rows of a ``csv`` or ``npz``
        without test data. The other data sets have a fixed test set.
    **options
        What the data set's own function takes.

    Raises
    ------
    DataError
        If a file is missing or malformed, or an option is unknown.

    Examples
    --------
    >>> digits = load("digits")
    >>> len(digits.train), len(digits.test), digits.input_shape
    (1438, 359, (1, 8, 8))
    """
    what, function, given, options = _asked(name, path, seed, options)
    dataset = make(what, lambda: function(**given, **options))
    if not isinstance(dataset, DataSet):
        raise DataError(
            f"{what} returned {type(dataset).__name__}. Return a "
            "fedweight.data.DataSet."
        )
    digest = _digest_of_files(function, {**given, **options})
    return check(dataset).known_by(digest) if digest else check(dataset)


def digest_of_files(name: str, path: str | Path | None = None, **options: Any) -> str:
    """Return the digest of data that are known by their files, without reading these.

    Empty where data are known by what they hold: :attr:`DataSet.digest`.
    """
    _, function, given, options = _asked(name, path, 0, options)
    return _digest_of_files(function, {**given, **options})


def _digest_of_files(function: Any, given: Mapping[str, Any]) -> str:
    kinds = {k: typing.get_args(o.annotation) for k, o in options_of(function).items()}
    named = [v for k, v in given.items() if k == "path" or Path in kinds.get(k, ())]
    paths = [Path(one) for one in named if one]
    if not paths or not all(path.is_file() for path in paths):
        return ""
    return digest_of(map(digest_of_file, paths))


def _asked(
    name: str, path: str | Path | None, seed: int, options: Mapping[str, Any]
) -> tuple[str, Any, dict[str, Any], dict[str, Any]]:
    """Return what a message calls a data set, its function, and what that is given."""
    function = DATA_SETS.resolve(name)
    what = f"data '{name}'"
    check_callable(what, function, "function(**options)", 0)
    parameters = inspect.signature(function).parameters
    given: dict[str, Any] = {"seed": seed}
    if path is not None or name in DATA_SETS.entries:
        given["path"] = None if path is None else clean_path("path", path)
    if path is not None and "path" not in parameters:
        raise DataError(f"{what} takes no path, got '{path}'. Leave it out.")
    given = {key: value for key, value in given.items() if key in parameters}
    checked = check_options(what, function, options, given, DataError)
    return what, function, given, checked


def catalogue() -> dict[str, str]:
    """Return each data set's name with a line that describes it."""
    return DATA_SETS.descriptions()
