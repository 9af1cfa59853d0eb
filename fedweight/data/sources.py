"""A CSV file's columns: what each is for, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import DataError
from ..core.extras import Imported
from ..core.paths import readable_file
from ..core.settings import names_of
from ..core.texts import listed, shown
from .encoding import Label, numbers_of, text_of, values_of
from .schema import NUMBER, TEXT
from .tables import (
    FEW_CLASSES,
    FEW_ROWS,
    MARKS,
    ROWS_PER_NUMBER,
    ROWS_PER_TEXT,
    Table,
    is_numeric,
    missing_or_name,
    read_table,
    text_fault,
)
from .tasks import CLASSIFICATION, TASKS, MultiLabel

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = Imported("pandas", "studies", "a CSV file")


@dataclass(frozen=True)
class Source:
    """A table, and what each of its columns is for."""

    table: Table
    labels: list[str]
    client: str | None
    sensitive: list[str]
    features: list[str]

    @property
    def label(self) -> str:
        """The column to predict, where there is one."""
        return self.labels[0]

    def kinds(self) -> dict[str, str]:
        """Return what each feature holds: numbers or texts."""
        frame = self.table.frame
        return {c: NUMBER if is_numeric(frame[c]) else TEXT for c in self.features}


def read_source(
    path: str | Path | None,
    label: str | Sequence[str] | None,
    client: str | None,
    sensitive: str | Sequence[str],
    sensitive_features: bool,
    reading: Mapping[str, Any],
    *,
    one: bool = False,
) -> Source:
    """Read a CSV file and find its columns; options are those of :func:`load_csv`.

    ``one`` says that it is one client's, beside others that may have more columns.
    """
    path = readable_file(path, "csv")
    table = read_table(path, **reading, lenient=one)
    label = table.columns[-1] if label is None else label
    labels = [label] if isinstance(label, str) else list(dict.fromkeys(label))
    if not labels:
        raise DataError(f"{path}: label names no column. Name one or more.")
    sensitive = list(names_of(sensitive, {*table.columns, ""}))  # "" is refused below.
    named = [*labels, client, *sensitive]
    table.check_columns(column for column in named if column is not None)
    left_out = {*labels, client} | (set() if sensitive_features else set(sensitive))
    features = [column for column in table.columns if column not in left_out]
    if not features:
        told = listed([f"'{name}'" for name in labels])
        raise DataError(f"{path} has no feature column besides {told}.")
    return Source(table, labels, client, sensitive, features)


def read_test(source: Source, test: str | Path, reading: Mapping[str, Any]) -> Table:
    """Read a source's test file, which has the same columns but for the client's."""
    path = readable_file(test, "csv")
    table = read_table(path, **reading, lenient=True)
    columns = [*source.features, *source.sensitive, *source.labels]
    table.check_columns(dict.fromkeys(columns))
    for column in () if table.fault or source.table.fault else columns:
        is_number = is_numeric(source.table.frame[column])
        other = column not in source.labels and not is_numeric(table.frame[column])
        if is_number and other:
            numbers_of(path, table.frame[column])
    return table


def faults(
    source: Source,
    test: Table | None,
    classes: Sequence[Label] | None,
    task: str = CLASSIFICATION,
) -> Iterator[str]:
    """Yield what would make a model learn something else than is meant, a line each."""
    table = source.table
    tables = [table] if test is None else [table, test]
    for file in tables:
        if file.fault is not None:
            yield file.fault
            return  # What is there cannot be judged.
    if len(source.labels) > 1 and task != MultiLabel.name:
        yield (
            f"{table.path}: label names {len(source.labels)} columns, and {task} has "
            f"one. Name one, or set task = '{MultiLabel.name}'."
        )
        return
    for name in dict.fromkeys([*source.features, *source.sensitive]):
        values = table.frame[name]
        if not is_numeric(values):
            fault = text_fault(table, values, feature=name in source.features)
            if not fault and name not in table.categories:
                fault = _number_fault(table, values)
            if fault:
                yield fault
    if source.client is not None:
        clients = table.frame[source.client]
        if not is_numeric(clients):
            named = replace(table, categories=frozenset([source.client]))
            fault = text_fault(named, clients, feature=False)
            if not fault and source.client not in table.categories:
                fault = _number_fault(table, clients)
        else:
            fault = _digits_fault(table, clients)
        if fault:
            yield fault
    for name in source.labels:
        labels = [file.frame[name] for file in tables]
        if TASKS[task].has_classes:
            fault = _label_fault(table, labels, classes)
        elif task == MultiLabel.name:
            fault = _flag_fault(table, labels, classes)
        else:
            fault = _target_fault(table, labels, classes)
        if fault:
            yield fault


def _flag_fault(
    table: Table, parts: Sequence[pd.Series[Any]], classes: Sequence[Label] | None
) -> str | None:
    """Return what is wrong with a column that says where a label holds, or ``None``."""
    what = f"{table.path}: the label '{parts[0].name}'"
    if classes is not None:
        return (
            f"{what} holds or does not, and classes lists names of some. Leave classes "
            "out: the labels are called as their columns."
        )
    values = values_of(*parts)
    odd = [v for v in values if isinstance(v, str) or v not in (0, 1)]
    if odd:
        return (
            f"{what} has the value {shown(odd[0])}, and is to say where a label holds. "
            "Write 1 where it does and 0 where not; a column of one class each is of "
            "task = 'classification'."
        )
    return None


def _target_fault(
    table: Table, parts: Sequence[pd.Series[Any]], classes: Sequence[Label] | None
) -> str | None:
    """Return what is wrong with a column of numbers to predict, or ``None``."""
    what, name = f"{table.path}: the label '{parts[0].name}'", parts[0].name
    if classes is not None:
        return (
            f"{what} is a number to predict, and classes lists names of some. Leave "
            "classes out, or set task = 'classification'."
        )
    for part in parts:
        if name in table.categories or not is_numeric(part):
            fault = None
            if name not in table.categories:
                fault = text_fault(table, part, feature=False)
            return fault or (
                f"{what} has texts such as {shown(part.iloc[0])}, and is to be "
                "predicted as a number. Name another column with label (by default "
                "the last), or set task = 'classification'."
            )
    values = pd.concat(list(parts)).to_numpy(np.float64)
    if (values == values[0]).all():
        return f"{what} has one value only, {values[0]:g}: nothing is left to predict."
    return None


def _digits_fault(table: Table, values: pd.Series[Any]) -> str | None:
    """Return why numbers cannot tell clients or classes apart, or ``None``."""
    large = values[values.abs() >= 2**53] if values.dtype.kind == "f" else values[:0]
    if not len(large):
        return None
    return (
        f"{table.path}: column '{values.name}' holds numbers such as {large.iloc[0]} "
        "among decimals, where two that differ in their last digits become one. Set "
        f"dtype = {{'{values.name}' = 'category'}}."
    )


def _number_fault(table: Table, values: pd.Series[Any]) -> str | None:
    """Return which texts of a column are one number, written differently."""
    seen: dict[str, str] = {}
    for text in map(str, values.unique()):
        before = seen.setdefault(text_of(text), text)
        if before != text:
            return (
                f"{table.path}: column '{values.name}' holds {shown(before)} and "
                f"{shown(text)}, which are one number. Write them alike, or where they "
                f"differ set dtype = {{'{values.name}' = 'category'}}."
            )
    return None


def _label_fault(
    table: Table, parts: Sequence[pd.Series[Any]], classes: Sequence[Label] | None
) -> str | None:
    """Return what is wrong with a column of labels, or ``None``."""
    path, name = table.path, parts[0].name
    texts = [part for part in parts if not is_numeric(part)]
    if texts:
        named = replace(table, categories=frozenset([str(name)]))
        fault = text_fault(named, pd.concat(texts), feature=False)
        if fault:
            return fault
    for part in parts:
        fault = _digits_fault(table, part) if is_numeric(part) else None
        if fault:
            return fault
    if classes is not None:
        return None
    values = values_of(*parts)
    rows = sum(len(part) for part in parts)
    what = f"{path}: the label '{name}' has"
    if len(values) == 1:
        return (
            f"{what} one value only, {shown(values[0])}. There must be two classes or "
            "more to tell apart."
        )
    if name in table.categories:
        return None
    for value in values:
        if value in MARKS:
            return f"{what} the value {value!r}. {missing_or_name(name, value)}"
    numeric = all(is_numeric(part) for part in parts)
    whole = numeric and all(float(value).is_integer() for value in values)
    each = ROWS_PER_NUMBER if numeric else ROWS_PER_TEXT
    many = len(values) > FEW_CLASSES and len(values) * each > rows
    own = len(values) > FEW_ROWS and 2 * len(values) > rows
    if not (many or own or (numeric and not whole and len(values) > FEW_CLASSES)):
        return None
    insist = f"If these are classes, say so: dtype = {{'{name}' = 'category'}}."
    if numeric:
        return (
            f"{what} {len(values):,} different numbers in {rows:,} rows, from "
            f"{values[0]} to {values[-1]}. To predict them as numbers set task = "
            "'regression'; else name another column with label (by default the last), "
            f"or make classes of this one. {insist}"
        )
    return (
        f"{what} {len(values):,} different texts in {rows:,} rows, such as "
        f"{shown(values[0])}, which look like names of rows. Name another column with "
        f"label (by default the last). {insist}"
    )
