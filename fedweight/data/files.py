"""The user's own data: CSV and NPZ files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Unpack

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Lt

from ..core.errors import DataError, closest
from ..core.extras import Imported
from ..core.options import check_options, validated
from ..core.paths import clean_path, readable_file
from ..core.rng import Purpose, generator
from ..core.settings import names_of
from ..core.texts import shown
from .encoding import (
    Encoder,
    Label,
    attribute_of,
    check_float32,
    codes_of,
    values_of,
)
from .examples import DataSet, Examples, as_inputs, check, name_clients
from .groups import codes_among, groups_of, missing_values
from .schema import NUMBER, Schema
from .sources import Source, faults, read_source, read_test
from .tables import FEW_CLASSES, Reading, Table, is_numeric, text_fault
from .targets import as_flags, as_labels, as_numbers
from .tasks import CLASSIFICATION, TASKS, MultiLabel

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = Imported("pandas", "studies", "a CSV file")

NPZ_ARRAYS = ("x", "y", "x_test", "y_test", "client")

# Labels of a file of arrays are class numbers, and the largest says how many there are.
# Where that leaves so many times as many classes without an example as with one, and
# more than a few, the labels are no class numbers.
EMPTY_CLASSES = 10
FEW_EMPTY_CLASSES = 100

# From so many rows on, whole numbers that are all different are said to name the rows.
MANY_ROWS = 100

# Numbers to predict whose spread is so many times 1, or less than one of so many parts
# of it, make steps of usual learning rates far too long or too short.
FAR_FROM_ONE = 100

Array = npt.NDArray[Any]
# What columns can say of an example; a class of each pixel takes arrays.
TableTask = Literal["classification", "multi-label", "regression"]
ArrayTask = Literal[TableTask, "segmentation"]


@validated
def load_csv(
    path: Path | None = None,
    seed: int = 0,
    *,
    task: TableTask = "classification",
    label: str | Sequence[str] | None = None,
    classes: Sequence[Label] | None = None,
    client: str | None = None,
    sensitive: str | Sequence[str] = (),
    sensitive_features: bool = True,
    standardise: bool = True,
    test: str | Path | None = None,
    test_fraction: Annotated[float, Ge(0), Lt(1)] = 0.2,
    **reading: Unpack[Reading],
) -> DataSet:
    """Your own table: a CSV file with a header; label, client and sensitive columns.

    Numeric feature columns are standardised and others one-hot encoded, both by the
    training rows; a category that none of these has is all zeros.

    Parameters
    ----------
    path : Path
        The file.
    seed : int
        Draws the test rows, where there is no test file.
    task : {"classification", "multi-label", "regression"}
        Whether the label is a class, some columns of 0 and 1 say which labels hold, or
        it is a number to predict, which stays as it is.
    label : str or sequence of str, optional
        The column with the class, or the number; by default the last. Of
        ``"multi-label"`` all columns that say whether a label holds.
    classes : sequence, optional
        The labels in the order of their numbers; by default sorted. Labels that look
        like quantities or like names of rows are refused unless they stand here, or
        ``dtype`` calls the column a category.
    client : str, optional
        The column that says to which client a row belongs. Clients are numbered in
        the sorted order of their names, whichever rows are drawn for testing.
    sensitive : str or sequence of str
        Columns that become attributes; in one text they stand between commas. Those
        that are not numeric become codes in sorted order, named in ``attribute_names``.
        A run measures by their groups (``groups.csv``); whole numbers of few different
        values are groups, too.
    sensitive_features : bool
        Whether the sensitive columns are also features.
    standardise : bool
        Whether numeric features get mean 0 and standard deviation 1.
    test : str or Path, optional
        A CSV file with the test rows and the same columns.
    test_fraction : float
        Share of the rows, in [0, 1), that are drawn for testing if there is no test
        file. It is drawn from all rows alike.
    **reading
        How the file is written, and what of it is taken: ``sep``, ``decimal``,
        ``encoding``, ``header``, ``na_values``, ``drop_missing``, ``drop``, ``dtype``;
        see :class:`~fedweight.data.tables.Reading`.
    """
    source = read_source(path, label, client, sensitive, sensitive_features, reading)
    extra = None if test is None else read_test(source, test, reading)
    for fault in faults(source, extra, classes, task):
        raise DataError(fault)
    frame, path = source.table.frame, source.table.path
    if extra is not None:
        train, tested = frame, extra.frame
    else:
        rows, test_rows = _split(len(frame), test_fraction, seed)
        train, tested = frame.iloc[rows], frame.iloc[test_rows]
    if not len(train):
        raise DataError(
            f"{path} has {len(frame)} rows, and test-fraction = {test_fraction:g} "
            "leaves none to train on. Lower it."
        )
    if classes is None and TASKS[task].has_classes:
        classes = values_of(train[source.label], tested[source.label])
    names = {
        column: tuple(map(str, values_of(train[column], tested[column])))
        for column in source.sensitive
        if not is_numeric(train[column])
    }
    encoder = Encoder(path, train[source.features], standardise)
    train_part, test_part = (
        Examples(
            encoder(part),
            _targets(source, part, task, classes),
            {c: attribute_of(path, part[c], names.get(c)) for c in source.sensitive},
        )
        for part in (train, tested)
    )
    natural, sizes = None, None
    natural_names: tuple[str, ...] = ()
    if client is not None:
        # By all rows: who is drawn for testing renumbers nobody.
        natural_names, numbers = name_clients(frame[client].to_numpy())
        sizes = np.bincount(numbers)
        natural = numbers if extra is not None else numbers[rows]
    several = source.labels if task == MultiLabel.name else classes or ()
    return DataSet(
        name=path.stem,
        train=train_part,
        test=test_part,
        num_classes=len(several),
        natural_clients=natural,
        class_names=tuple(str(value) for value in several),
        attribute_names=names,
        natural_names=natural_names,
        natural_sizes=sizes,
        feature_names=encoder.names,
        notes=tuple(remarks(source, task)),
        task=task,
        file_rows=(_numbers(train), _numbers(tested)),
    )


@validated
def load_npz(
    path: Path | None = None,
    seed: int = 0,
    *,
    task: ArrayTask = "classification",
    num_classes: int | None = None,
    sensitive: str | Sequence[str] = (),
    test_fraction: Annotated[float, Ge(0), Lt(1)] = 0.2,
) -> DataSet:
    """Your own arrays: an NPZ file with x and y; x_test, y_test and client if you like.

    Parameters
    ----------
    path : Path
        The file. ``x`` is ``[n, ...]`` (floating, or integers for tokens), ``y`` is
        ``[n]`` with classes from 0, or as another task has it. Images are ``[n, c, h,
        w]``; scale them yourself. ``client``, ``[n]``, says to which client an example
        belongs: a number or a name. A file that would have to be unpickled is refused.
    seed : int
        Draws the test examples, where there is no ``x_test``.
    task : {"classification", "multi-label", "regression", "segmentation"}
        What ``y`` has: a class of each example; 0 and 1 for each label, ``[n, L]``;
        numbers to predict; or the class of each pixel, ``[n, h, w]``, where 0 is the
        background.
    num_classes : int, optional
        C; by default one more than the largest label, unless that leaves most classes
        without an example. Of ``"multi-label"`` L, which ``y`` tells.
    sensitive : str or sequence of str
        Further arrays of the file, ``[n]``, that become attributes, as
        :func:`load_csv` has them; with ``x_test`` there are such of its examples, too,
        each with ``_test`` behind its name. A model never sees them.
    test_fraction : float
        Share of the examples, in [0, 1), that are drawn for testing if there is no
        ``x_test``.
    """
    path = readable_file(path, "npz")
    sensitive = _npz_names(path, sensitive)
    arrays = _read_arrays(path, sensitive)
    train = _examples(path, arrays, "", task, sensitive)
    natural, sizes = None, None
    names: tuple[str, ...] = ()
    if "client" in arrays:
        _same_length(path, "client", arrays["client"], "y", train.y)
        names, natural = name_clients(arrays["client"], f"{path}: 'client'")
        sizes = np.bincount(natural)
    if "x_test" in arrays:
        test = _examples(path, arrays, "_test", task, sensitive)
        rows, test_rows = np.arange(len(train)), np.arange(len(test))
    else:
        rows, test_rows = _split(len(train), test_fraction, seed)
        train, test = train.take(rows), train.take(test_rows)
        natural = None if natural is None else natural[rows]
    if not TASKS[task].whole:
        several = 0 if train.y.ndim == 1 else train.y.shape[1]
        num_classes = several if num_classes is None else num_classes
    else:
        num_classes = _count_classes(path, train.y, test.y, num_classes)
    return DataSet(
        name=path.stem,
        train=train,
        test=test,
        num_classes=num_classes or 0,
        natural_clients=natural,
        natural_names=names,
        natural_sizes=sizes,
        notes=tuple(
            filter(None, (_no_groups(path.name, n, arrays[n]) for n in sensitive))
        ),
        task=task,
        file_rows=(rows, test_rows),
    )


# ------------------------------------------------------------- one client's own file


def load_one_csv(
    path: Path,
    *,
    label: str | None = None,
    classes: Sequence[Label] | None = None,
    client: str | None = None,
    sensitive: str | Sequence[str] = (),
    sensitive_features: bool = True,
    schema: Schema | None = None,
    **reading: Unpack[Reading],
) -> tuple[Examples, Schema]:
    """Read one client's own CSV file, its values as they stand, and what it holds.

    Nothing is derived from the rows, since other clients have other rows: columns must
    be numbers that were scaled and encoded alike everywhere, and labels must be class
    numbers unless ``classes`` lists them. With a ``schema`` the columns are put in its
    order, or refused, and sensitive columns become codes of the groups that it has;
    otherwise they stay as they are. Other options are those of :func:`load_csv`.
    """
    if schema is not None:
        label = (schema.label or None) if label is None else label
        classes = (schema.classes or None) if classes is None else classes
    source = read_source(
        path, label, client, sensitive, sensitive_features, reading, one=True
    )
    table, features = source.table, source.features
    if table.fault is not None:
        raise DataError(table.fault)
    if schema is not None:
        features = schema.check_columns(table.path, source.kinds())
    groups = {} if schema is None else schema.groups
    coded = [c for c in source.sensitive if schema is None or c in groups]
    for column in [*features, *(c for c in source.sensitive if c not in coded)]:
        if not is_numeric(table.frame[column]):
            fault = text_fault(table, table.frame[column], feature=False)
            raise DataError(
                fault
                or f"{table.path}: column '{column}' is not numeric. Encode it in the "
                "same way on every client first."
            )
    labels = table.frame[source.label]
    if classes is None:
        y = as_labels(f"{table.path}: '{source.label}' is", labels.to_numpy())
    else:
        y = codes_of(table.path, labels, classes)
    attributes = {
        c: codes_of(table.path, table.frame[c], groups[c])
        if c in groups
        else table.frame[c].to_numpy()
        for c in source.sensitive
    }
    with np.errstate(over="ignore"):
        x = table.frame[features].to_numpy(np.float32)
    check_float32(table.path, features, x)
    found = Schema(
        source=table.path.name,
        label=source.label,
        classes=tuple(map(str, classes or ())),
        columns=dict.fromkeys(features, NUMBER),
        shape=(len(features),),
    )
    return Examples(x, y, attributes), found


def load_one_npz(
    path: Path,
    *,
    sensitive: str | Sequence[str] = (),
    schema: Schema | None = None,
) -> tuple[Examples, Schema]:
    """Read one client's own NPZ file: ``x`` and ``y`` as :func:`load_npz` takes them.

    So are sensitive arrays; with a ``schema`` they become codes of the groups that it
    has. Test examples, and clients, are ignored.
    """
    path = readable_file(path, "npz")
    sensitive = _npz_names(path, sensitive)
    groups = {} if schema is None else schema.groups
    arrays = _read_arrays(path, sensitive)
    examples = _examples(path, arrays, "", CLASSIFICATION, sensitive)
    coded = {
        name: codes_among(f"{path}: '{name}'", examples.attributes[name], names)
        for name, names in groups.items()
        if name in sensitive
    }
    examples = replace(examples, attributes={**examples.attributes, **coded})
    shape = examples.x.shape[1:]
    if schema is not None:
        schema.check_shape(path, shape)
    return examples, Schema(path.name, "", (), {}, shape)


def load_one(
    path: str | Path, schema: Schema | None = None, **options: Any
) -> tuple[Examples, Schema]:
    """Read one client's own file, a CSV or an NPZ, and check what it holds.

    Parameters
    ----------
    path : str or Path
        The file; its name ends in ``.csv`` or ``.npz``.
    schema : Schema, optional
        What columns others have: the file's are put in its order, or refused.
    **options
        What :func:`load_one_csv`, or :func:`load_one_npz`, takes.
    """
    path = clean_path("the data's path", path)
    readers: dict[str, Callable[..., tuple[Examples, Schema]]]
    readers = {".csv": load_one_csv, ".npz": load_one_npz}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise DataError(f"{path}: the name must end in .csv or .npz.")
    read = readers[suffix]
    given = ["path", "schema"]
    check_options(f"a client's {suffix} file", read, options, given, DataError)
    examples, found = read(path, schema=schema, **options)
    num_classes = int(examples.y.max(initial=0)) + 1
    if schema is not None and 0 < len(schema.classes) < num_classes:
        raise DataError(
            f"{path}: labels reach {num_classes - 1}, but {schema.source} has "
            f"{len(schema.classes)} classes, from 0. Number them alike."
        )
    nothing = examples.take(slice(0, 0))
    return check(DataSet(str(path), examples, nothing, num_classes)).train, found


# ------------------------------------------------------------------------- CSV files


def remarks(source: Source, task: str = CLASSIFICATION) -> list[str]:
    """Return what a user should know of a file that is no reason to refuse it."""
    table = source.table
    lines = []
    if table.dropped_rows:
        lines.append(
            f"{table.path.name}: left out {table.dropped_rows:,} of "
            f"{len(table) + table.dropped_rows:,} rows, which miss a value "
            "(drop-missing)"
        )
    labels = table.frame[source.label]
    if not TASKS[task].least_classes:
        lines += _scale_remark(table, labels)
    elif not TASKS[task].has_classes:
        pass  # Of 0 and 1 there is nothing to say.
    elif source.label not in table.categories and pd.api.types.is_integer_dtype(labels):
        least, most, different = labels.min(), labels.max(), labels.nunique()
        numbered = most - least + 1 == different and least in (0, 1)
        if different > FEW_CLASSES and not numbered:
            lines.append(
                f"{table.path.name}: the label '{source.label}' has {different:,} "
                f"different whole numbers from {least} to {most}, each a class of its "
                "own; to predict them as numbers set task = 'regression'"
            )
    named = [*source.features, *source.sensitive, *source.labels, source.client]
    for column in dict.fromkeys(name for name in named if name is not None):
        alike = _capitals(table.frame[column])
        if alike:
            lines.append(
                f"{table.path.name}: '{column}' holds {shown(alike[0])} and "
                f"{shown(alike[1])}, which differ by capitals only and count as two"
            )
    for name in source.sensitive:
        line = _no_groups(table.path.name, name, table.frame[name].to_numpy())
        lines += [line] if line else []
    for name in source.features:
        if len(table) >= MANY_ROWS and _counts_rows(table.frame[name]):
            lines.append(
                f"{table.path.name}: '{name}' is another whole number in every row, as "
                f"a number of the row is; if it is one, leave it out: drop = ['{name}']"
            )
    return lines


def _no_groups(file: str, name: str, values: Array) -> str:
    """Say of a sensitive column that it makes no groups; nothing where it does."""
    if groups_of(values) is not None:
        return ""
    different = len({str(value) for value in values.tolist()})
    return (
        f"{file}: the sensitive column '{name}' has {different:,} different values, "
        "which make no groups; nothing is measured by it. Add a column with ranges of "
        "it, such as 20-29, and name that"
    )


def _scale_remark(table: Table, targets: pd.Series[Any]) -> list[str]:
    """Say of numbers to predict that they are far from a spread of 1."""
    spread = float(targets.to_numpy(np.float64).std())
    if 1 / FAR_FROM_ONE <= spread <= FAR_FROM_ONE:
        return []
    return [
        f"{table.path.name}: '{targets.name}' has a standard deviation of "
        f"{spread:.3g}; squared errors of such numbers make steps of usual learning "
        "rates far too long or too short: divide them first"
    ]


def _capitals(values: pd.Series[Any]) -> tuple[str, str] | None:
    """Return two texts of a column that differ by capitals only, if there are any."""
    seen: dict[str, str] = {}
    for text in () if is_numeric(values) else map(str, values.unique()):
        before = seen.setdefault(text.casefold(), text)
        if before != text:
            return before, text
    return None


def _counts_rows(values: pd.Series[Any]) -> bool:
    """Tell whether a column looks like numbers of rows: different, dense or rising."""
    if not pd.api.types.is_integer_dtype(values) or not values.is_unique:
        return False
    reach = int(values.max()) - int(values.min()) + 1
    return reach <= 2 * len(values) or values.is_monotonic_increasing


def _targets(
    source: Source, part: pd.DataFrame, task: str, classes: Sequence[Label] | None
) -> Array:
    """Return what is to be predicted of rows of a table."""
    path = source.table.path
    if classes is not None:
        return codes_of(path, part[source.label], classes)
    if task == MultiLabel.name:
        flags = part[source.labels].to_numpy(np.float32)
        return as_flags(f"{path}: labels are", flags)
    return as_numbers(f"{path}: '{source.label}' is", part[source.label].to_numpy())


def _numbers(part: pd.DataFrame) -> Array:
    """Return which rows of their file some are, from 0."""
    return part.index.to_numpy(np.int64)


def _split(n: int, fraction: float, seed: int) -> tuple[Array, Array]:
    order = generator(seed, Purpose.DATA).permutation(n)
    size = round(fraction * n)
    return np.sort(order[size:]), np.sort(order[:size])


# ------------------------------------------------------------------------- NPZ files


def _npz_names(path: Path, sensitive: str | Sequence[str]) -> list[str]:
    """Return the names of sensitive arrays, which are no others'."""
    names = list(names_of(sensitive, {""}))  # Which is refused as any other.
    for name in names:
        if name in NPZ_ARRAYS:
            raise DataError(
                f"{path}: sensitive names '{name}', which is no attribute of the "
                "examples. Give the attribute an array of its own."
            )
    return names


def _read_arrays(path: Path, sensitive: Sequence[str] = ()) -> dict[str, Array]:
    with path.open("rb") as opened:
        if opened.read(2) != b"PK":
            raise DataError(
                f"{path} cannot be read as an NPZ file, which is a ZIP archive of "
                "arrays. Write it with numpy.savez; a CSV file is read with name = "
                "'csv'."
            )
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # Whatever a file holds that only claims to be one.
        raise DataError(
            f"{path} cannot be read as an NPZ file of plain arrays: "
            f"{shown(str(error))[1:-1]}. Write it with numpy.savez, without arrays of "
            "objects."
        ) from error
    tested = "x_test" in arrays
    tests = [f"{name}_test" for name in sensitive] if tested else []
    allowed = (*NPZ_ARRAYS, *sensitive, *tests)
    for name in arrays:
        if name not in allowed:
            raise DataError(
                f"{path} holds an array '{name}'.{closest(name, allowed)} Allowed are "
                f"{', '.join(allowed)}, and what data.sensitive names."
            )
    needed = {"x", "y", *sensitive, *tests} | (
        {"x_test", "y_test"} if tested else set()
    )
    for name in sorted(needed - set(arrays)):
        raise DataError(f"{path} holds no array '{name}'. Add it.")
    return arrays


def _examples(
    path: Path,
    arrays: Mapping[str, Array],
    suffix: str,
    task: str,
    sensitive: Sequence[str] = (),
) -> Examples:
    """Return the examples whose arrays have a suffix behind their names."""
    x, y = f"x{suffix}", f"y{suffix}"
    inputs, labels = arrays[x], arrays[y]
    if inputs.ndim < 2:
        raise DataError(f"{path}: '{x}' has shape {inputs.shape}, expected [n, ...].")
    labels = TASKS[task].cast(f"{path}: '{y}' is", np.atleast_1d(labels), np.float32)
    _same_length(path, x, inputs, y, labels)
    attributes = {}
    for name in sensitive:
        column = arrays[f"{name}{suffix}"]
        _same_length(path, f"{name}{suffix}", column, y, labels)
        missing = int(missing_values(column).sum())
        if missing:
            raise DataError(
                f"{path}: '{name}{suffix}' is missing for {missing:,} of "
                f"{len(column):,} examples. Give them a group of their own, such as "
                "'unknown', or leave them out."
            )
        attributes[name] = column
    return Examples(as_inputs(f"{path}: '{x}' is", inputs), labels, attributes)


def _count_classes(path: Path, train: Array, test: Array, told: int | None) -> int:
    labels = np.unique(np.concatenate([np.unique(train), np.unique(test)]))
    if len(labels) == 1 and told in (None, 1):
        raise DataError(
            f"{path}: 'y' has one value only, {labels[0]}. There must be two classes "
            "or more to tell apart; where others have them, set num-classes."
        )
    if told is not None:
        return told
    largest, occur = int(labels.max(initial=0)), len(labels)
    empty = largest + 1 - occur
    if empty > max(FEW_EMPTY_CLASSES, EMPTY_CLASSES * occur):
        raise DataError(
            f"{path}: 'y' reaches {largest}, but {occur} classes occur. Number them "
            "from 0 without gaps, numpy.unique(y, return_inverse=True)[1], or set "
            f"num-classes = {largest + 1}."
        )
    return largest + 1


def _same_length(path: Path, first: str, a: Array, second: str, b: Array) -> None:
    if a.ndim == 0 or len(a) != len(b):
        raise DataError(
            f"{path}: '{first}' has {np.size(a) if a.ndim == 0 else len(a)} rows and "
            f"'{second}' has {len(b)}. Make them equal."
        )
