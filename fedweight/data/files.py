"""The user's own data: CSV and NPZ files."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from ..errors import DataError, check_range, closest
from ..rng import Purpose, generator
from .examples import DataSet, Examples

NPZ_ARRAYS = ("x", "y", "x_test", "y_test", "client")

Array = npt.NDArray[Any]


def load_csv(
    path: Path | None = None,
    seed: int = 0,
    *,
    label: str | None = None,
    classes: Sequence[Any] | None = None,
    client: str | None = None,
    sensitive: Sequence[str] = (),
    sensitive_features: bool = True,
    standardise: bool = True,
    test: str | Path | None = None,
    test_fraction: float = 0.2,
) -> DataSet:
    """Your own table: a CSV file with a header; label, client and sensitive columns.

    Numeric feature columns are standardised and others one-hot encoded, both by the
    training rows.

    Parameters
    ----------
    path : Path
        The file.
    seed : int
        Draws the test rows, where there is no test file.
    label : str, optional
        The column with the class; by default the last.
    classes : sequence, optional
        The labels in the order of their numbers; by default sorted.
    client : str, optional
        The column that says to which client a row belongs.
    sensitive : sequence of str
        Columns that become attributes. Those that are not numeric become codes in
        sorted order, named in ``attribute_names``.
    sensitive_features : bool
        Whether the sensitive columns are also features.
    standardise : bool
        Whether numeric features get mean 0 and standard deviation 1.
    test : str or Path, optional
        A CSV file with the test rows and the same columns.
    test_fraction : float
        Share of the rows, in [0, 1), that are drawn for testing if there is no test
        file. It is drawn from all rows alike.
    """
    path = _existing_file(path, "csv")
    table = _read_table(path)
    label = str(table.columns[-1]) if label is None else label
    sensitive = [sensitive] if isinstance(sensitive, str) else list(sensitive)
    _check_columns(path, table, [label, *([client] if client else []), *sensitive])
    if test is not None:
        test_path = _existing_file(Path(test), "csv")
        test_table = _read_table(test_path)
        _check_columns(test_path, test_table, [c for c in table.columns if c != client])
    else:
        rows, test_rows = _split(len(table), test_fraction, seed)
        table, test_table = table.iloc[rows], table.iloc[test_rows]

    left_out = {label, client} | (set() if sensitive_features else set(sensitive))
    features = [column for column in table.columns if column not in left_out]
    if not features:
        raise DataError(f"{path} has no feature column besides '{label}'.")
    if classes is None:
        classes = _values_of(table[label], test_table[label])
    names = {
        column: tuple(_values_of(table[column], test_table[column]))
        for column in sensitive
        if not pd.api.types.is_numeric_dtype(table[column])
    }
    train_part, test_part = (
        Examples(
            _encode(path, table[features], part[features], standardise),
            _codes(path, part[label], classes),
            {c: _attribute(path, part[c], names.get(c)) for c in sensitive},
        )
        for part in (table, test_table)
    )
    return DataSet(
        name=path.stem,
        train=train_part,
        test=test_part,
        num_classes=len(classes),
        natural_clients=None if client is None else _numbers(table[client]),
        class_names=tuple(str(value) for value in classes),
        attribute_names=names,
    )


def load_npz(
    path: Path | None = None,
    seed: int = 0,
    *,
    num_classes: int | None = None,
    test_fraction: float = 0.2,
) -> DataSet:
    """Your own arrays: an NPZ file with x and y; x_test, y_test and client if you like.

    Parameters
    ----------
    path : Path
        The file. ``x`` is ``[n, ...]`` (floating, or integers for tokens), ``y`` is
        ``[n]`` with classes from 0. Images are ``[n, c, h, w]``; scale them yourself.
        ``client``, ``[n]``, says to which client an example belongs. A file that would
        have to be unpickled is refused.
    seed : int
        Draws the test examples, where there is no ``x_test``.
    num_classes : int, optional
        C; by default one more than the largest label.
    test_fraction : float
        Share of the examples, in [0, 1), that are drawn for testing if there is no
        ``x_test``.
    """
    path = _existing_file(path, "npz")
    arrays = _read_arrays(path)
    x, y = _inputs(path, arrays["x"], "x"), _labels(path, arrays["y"], "y")
    _same_length(path, "x", x, "y", y)
    train = Examples(x, y)
    natural = None
    if "client" in arrays:
        _same_length(path, "client", arrays["client"], "y", y)
        natural = _numbers(pd.Series(arrays["client"]))
    if "x_test" in arrays:
        x_test = _inputs(path, arrays["x_test"], "x_test")
        y_test = _labels(path, arrays["y_test"], "y_test")
        _same_length(path, "x_test", x_test, "y_test", y_test)
        test = Examples(x_test, y_test)
    else:
        rows, test_rows = _split(len(y), test_fraction, seed)
        train, test = train.take(rows), train.take(test_rows)
        natural = None if natural is None else natural[rows]
    largest = max(int(part.y.max(initial=0)) for part in (train, test))
    return DataSet(
        name=path.stem,
        train=train,
        test=test,
        num_classes=largest + 1 if num_classes is None else num_classes,
        natural_clients=natural,
    )


def load_one_csv(
    path: Path,
    *,
    label: str | None = None,
    classes: Sequence[Any] | None = None,
    client: str | None = None,
    sensitive: Sequence[str] = (),
    sensitive_features: bool = True,
) -> Examples:
    """Read one client's own CSV file, its values as they stand.

    Nothing is derived from the rows, since other clients have other rows: columns must
    be numbers that were scaled and encoded alike everywhere, and labels must be class
    numbers unless ``classes`` lists them. Options are those of :func:`load_csv`.
    """
    table = _read_table(_existing_file(path, "csv"))
    label = str(table.columns[-1]) if label is None else label
    sensitive = [sensitive] if isinstance(sensitive, str) else list(sensitive)
    _check_columns(path, table, [label, *([client] if client else []), *sensitive])
    left_out = {label, client} | (set() if sensitive_features else set(sensitive))
    features = [column for column in table.columns if column not in left_out]
    for column in [*features, *sensitive]:
        if not pd.api.types.is_numeric_dtype(table[column]):
            raise DataError(
                f"{path}: column '{column}' is not numeric. Encode it in the same way "
                "on every client first."
            )
    if classes is None:
        y = _labels(path, table[label].to_numpy(), label)
    else:
        y = _codes(path, table[label], classes)
    attributes = {column: table[column].to_numpy() for column in sensitive}
    return Examples(table[features].to_numpy(np.float32), y, attributes)


def load_one_npz(path: Path) -> Examples:
    """Read one client's own NPZ file: ``x`` and ``y`` as :func:`load_npz` takes them.

    What else the file holds is ignored.
    """
    arrays = _read_arrays(_existing_file(path, "npz"))
    x, y = _inputs(path, arrays["x"], "x"), _labels(path, arrays["y"], "y")
    _same_length(path, "x", x, "y", y)
    return Examples(x, y)


def _existing_file(path: Path | None, kind: str) -> Path:
    if path is None:
        raise DataError(f"data '{kind}' needs the option path: your .{kind} file.")
    if not path.is_file():
        raise DataError(f"{path} does not exist. Give the path of a .{kind} file.")
    return path


def _read_table(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}.") from error
    table.columns = table.columns.astype(str)
    if table.empty:
        raise DataError(f"{path} has no rows below its header.")
    holes = (table.isna() | table.isin([np.inf, -np.inf])).to_numpy()
    if holes.any():
        row, column = np.argwhere(holes)[0]
        raise DataError(
            f"{path}: column '{table.columns[column]}' has no finite value in data "
            f"row {row + 1} ({holes.sum()} such places in all). Fill in or "
            "drop them first."
        )
    return table


def _check_columns(path: Path, table: pd.DataFrame, columns: Sequence[str]) -> None:
    for column in columns:
        if column not in table.columns:
            near = closest(column, list(table.columns))
            raise DataError(
                f"{path} has no column '{column}'.{near} It has "
                f"{', '.join(table.columns)}."
            )


def _split(n: int, fraction: float, seed: int) -> tuple[Array, Array]:
    check_range("test_fraction", fraction, 0, 1, high_open=True)
    order = generator(seed, Purpose.DATA).permutation(n)
    size = round(fraction * n)
    return np.sort(order[size:]), np.sort(order[:size])


def _values_of(train: pd.Series[Any], test: pd.Series[Any]) -> list[Any]:
    if train.dtype != test.dtype:
        train, test = train.astype(str), test.astype(str)
    return sorted(set(train) | set(test))


def _encode(
    path: Path, train: pd.DataFrame, part: pd.DataFrame, standardise: bool
) -> npt.NDArray[np.float32]:
    columns = []
    for name in train.columns:
        seen, values = train[name], part[name]
        if not pd.api.types.is_numeric_dtype(seen):
            categories = sorted(set(seen.astype(str)))
            codes = pd.Index(categories).get_indexer(pd.Index(values.astype(str)))
            columns.append(codes[:, None] == np.arange(len(categories))[None])
            continue
        numbers = _as_numbers(path, values)
        if standardise and not pd.api.types.is_bool_dtype(seen):
            mean, spread = float(seen.mean()), float(seen.std(ddof=0))
            numbers = (numbers - mean) / (spread or 1.0)
        columns.append(numbers[:, None])
    return np.hstack(columns).astype(np.float32)


def _as_numbers(path: Path, values: pd.Series[Any]) -> Array:
    try:
        return np.asarray(values, np.float64)
    except ValueError as error:
        raise DataError(
            f"{path}: column '{values.name}' is numeric, but not in the test file: "
            f"{error}."
        ) from error


def _codes(
    path: Path, values: pd.Series[Any], known: Sequence[Any]
) -> npt.NDArray[np.int64]:
    codes = pd.Index(list(known)).get_indexer(pd.Index(values))
    if (codes < 0).any():
        codes = pd.Index([str(value) for value in known]).get_indexer(
            pd.Index(values.astype(str))
        )
    if (codes < 0).any():
        raise DataError(
            f"{path}: column '{values.name}' holds {values.iloc[codes.argmin()]!r}, "
            f"which is none of {', '.join(repr(value) for value in known)}."
        )
    return np.asarray(codes, np.int64)


def _attribute(
    path: Path, values: pd.Series[Any], names: Sequence[str] | None
) -> Array:
    return _as_numbers(path, values) if names is None else _codes(path, values, names)


def _numbers(values: pd.Series[Any]) -> npt.NDArray[np.int64]:
    """Return each client's number, from 0 in the sorted order of their names."""
    _, numbers = np.unique(values.to_numpy(), return_inverse=True)
    return np.asarray(numbers, np.int64)


def _read_arrays(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} cannot be read as an NPZ file of plain arrays: {error}. Write it "
            "with numpy.savez, without arrays of objects."
        ) from error
    for name in arrays:
        if name not in NPZ_ARRAYS:
            raise DataError(
                f"{path} holds an array '{name}'.{closest(name, NPZ_ARRAYS)} Allowed "
                f"are {', '.join(NPZ_ARRAYS)}."
            )
    needed = {"x", "y"} | ({"x_test", "y_test"} if "x_test" in arrays else set())
    for name in sorted(needed - set(arrays)):
        raise DataError(f"{path} holds no array '{name}'. Add it.")
    return arrays


def _inputs(path: Path, x: Array, name: str) -> Array:
    if x.ndim < 2:
        raise DataError(f"{path}: '{name}' has shape {x.shape}, expected [n, ...].")
    if np.issubdtype(x.dtype, np.integer):
        return x.astype(np.int64, copy=False)
    if np.issubdtype(x.dtype, np.floating):
        return x.astype(np.float32, copy=False)
    raise DataError(f"{path}: '{name}' is {x.dtype}. Give floating numbers or tokens.")


def _labels(path: Path, y: Array, name: str) -> npt.NDArray[np.int64]:
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise DataError(
            f"{path}: '{name}' is {y.dtype} of shape {y.shape}. Give integer classes "
            "from 0, of shape [n]."
        )
    return y.astype(np.int64, copy=False)


def _same_length(path: Path, first: str, a: Array, second: str, b: Array) -> None:
    if len(a) != len(b):
        raise DataError(
            f"{path}: '{first}' has {len(a)} rows and '{second}' has {len(b)}. Make "
            "them equal."
        )
