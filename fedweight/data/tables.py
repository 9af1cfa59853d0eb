"""CSV files as tables, read as their options say, or refused with the option to set.

pandas reads them. What it would guess without a word is looked for here: another
separator, no header, lines of different lengths, numbers with a few texts among them,
names that are numbers of rows.
"""

from __future__ import annotations

import codecs
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt

from ..core.errors import ConfigurationError, DataError, check_choice, closest
from ..core.extras import Imported
from ..core.texts import NAME_LENGTH, listed, plain, shown

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = Imported("pandas", "studies", "a CSV file")

Array = npt.NDArray[Any]

# What stands for a missing value besides the empty cell. "None" is not among them: it
# is the name of a class or a category as often as not, and never a number.
MISSING = (
    *("NA", "N/A", "n/a", "<NA>", "#N/A", "#N/A N/A", "#NA", "NaN", "nan", "-NaN"),
    *("-nan", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN", "NULL", "null"),
)

# Marks of a missing value; none is the name of a class.
MARKS = ("?", "-", "--", ".", "*")

# Texts of a feature become a column of zeros and ones each. A few may all be different;
# of more than these, where every second row has another, they name rows and teach
# nothing.
FEW_CATEGORIES = 20
ROWS_PER_CATEGORY = 2

# A column that has another text in each of more rows than this names rows, too.
FEW_ROWS = 5

# So wide a table of zeros and ones is a matter for an embedding.
MOST_CATEGORIES = 10_000

# A column is one of numbers, and the texts among them are no categories, if more than
# half of its cells are numbers, and more different ones than this; or than FEW_ROWS,
# where every second is another.
FEW_NUMBERS = 20

# Labels: with more different values than this they may be quantities or names of rows.
# Numbers are taken for classes if they are whole and come ten times each on average,
# texts if they come twice.
FEW_CLASSES = 20
ROWS_PER_NUMBER = 10
ROWS_PER_TEXT = 2

# How files begin that are not CSV.
_BEGINNINGS = {
    b"PK\x03\x04": "an Excel workbook or another ZIP archive: save it as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook: save it as CSV",
    b"\x1f\x8b": "packed with gzip: unpack it, or let its name end in .gz",
    b"PAR1": "a Parquet file: write it with DataFrame.to_csv(index=False)",
    b"\x93NUMPY": "a NumPy array: write it with numpy.savez, as data 'npz'",
    b"\x89HDF": "an HDF5 file: write it with DataFrame.to_csv(index=False)",
    b"%PDF": "a PDF",
    b"<!": "a web page",
    b"<html": "a web page",
    b"<?xml": "XML",
    b'{"': "JSON",
    b"[{": "JSON",
}
_PACKED = (".gz", ".bz2", ".zip", ".xz", ".zst", ".tar")

_SEPARATORS = (";", "\t", "|", ",")
_POINT_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", re.A)
_COMMA_NUMBER = re.compile(r"\s*[-+]?(\d+,?\d*|,\d+)([eE][-+]?\d+)?\s*", re.A)

# Other minus signs than "-".
_DASHES = str.maketrans(dict.fromkeys("\u2012\u2013\u2212\ufe63\uff0d", "-"))


class Reading(TypedDict, total=False):
    """How a CSV file is written; every reader of one takes these options.

    Parameters
    ----------
    sep : str
        What stands between cells: one character, by default a comma.
    decimal : {".", ","}
        What stands before the decimals of a number, by default a point.
    encoding : str
        As Python names it, such as ``"cp1252"``; by default UTF-8.
    header : bool
        Whether the first line names the columns, as by default; otherwise they are
        called 0, 1, 2, ... A first line of numbers is refused unless this says what
        it is.
    na_values : sequence
        Cells that stand for a missing value, besides empty ones; by default NA, NaN,
        null and the like (:data:`MISSING`).
    drop_missing : bool
        Whether rows with a missing value are left out; by default they are refused.
    drop : sequence of str
        Columns that are left out.
    dtype : Mapping[str, str]
        Columns that are not what they look like: ``"category"`` takes numbers as
        names, as they are written, and lets any number of different ones pass;
        ``"number"`` insists on numbers.
    """

    sep: str
    decimal: Literal[".", ","]
    encoding: str
    header: bool | None
    na_values: Sequence[str | int | float]
    drop_missing: bool
    drop: str | Sequence[str]
    dtype: Mapping[str, Literal["category", "number"]]


@dataclass(frozen=True)
class Table:
    """A CSV file that was read.

    Attributes
    ----------
    path : Path
        The file.
    frame : DataFrame
        Its columns but for those that are left out; the index counts data rows from 0
        in the file.
    decimal : str
        What stands before decimals.
    header : bool or None
        Whether the first line was taken for a header, as told or by default.
    categories : frozenset of str
        Columns that ``dtype`` says are categories.
    dropped : tuple of str
        Columns that were left out.
    repeated : frozenset of str
        Names that the header has more than once.
    dropped_rows : int
        How many rows were left out.
    missing : Mapping[str, int]
        How many cells of a column have no finite value, where some have none.
    fault : str or None
        Why it may not be used: where such a cell is, and what to do.
    """

    path: Path
    frame: pd.DataFrame
    decimal: str = "."
    header: bool | None = None
    categories: frozenset[str] = frozenset()
    dropped: tuple[str, ...] = ()
    repeated: frozenset[str] = frozenset()
    dropped_rows: int = 0
    missing: Mapping[str, int] = field(default_factory=dict)
    fault: str | None = None

    @property
    def columns(self) -> list[str]:
        """The columns' names."""
        return list(self.frame.columns)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.frame)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise unless the file has these columns, each once."""
        for column in columns:
            if column in self.repeated:
                raise DataError(
                    f"{self.path} has more than one column '{column}'. Give each a "
                    "name of its own."
                )
            if column in self.dropped:
                raise DataError(f"{self.path}: column '{column}' is left out by drop.")
            if column not in self.frame.columns:
                names = [plain(name, NAME_LENGTH) for name in self.columns]
                raise DataError(
                    f"{self.path} has no column {shown(column)}."
                    f"{closest(column, names)} It has {listed(names, most=20)}."
                )


def read_table(
    path: Path,
    *,
    sep: str = ",",
    decimal: str = ".",
    encoding: str = "utf-8",
    header: bool | None = None,
    na_values: Sequence[str | int | float] = MISSING,
    drop_missing: bool = False,
    drop: str | Sequence[str] = (),
    dtype: Mapping[str, str] | None = None,
    lenient: bool = False,
) -> Table:
    """Read a CSV file; see :class:`Reading` for the options.

    With ``lenient``, columns that ``drop`` and ``dtype`` name need not be there: other
    files that are read with the same options may have them.

    Raises
    ------
    DataError
        If it is no CSV file, or written otherwise than the options say; the message is
        one line and names the option that helps.
    ConfigurationError
        If an option is out of its range.
    """
    sep = {"\\t": "\t", "tab": "\t"}.get(sep, sep)
    dtype = dict(dtype or {})
    drop = [drop] if isinstance(drop, str) else list(drop)
    _check_form(sep, decimal, encoding)
    _check_beginning(path, encoding)
    form: dict[str, Any] = {"sep": sep, "encoding": encoding}
    names = _names(path, form, decimal, header)
    categories = [name for name, kind in dtype.items() if kind == "category"]
    frame = _parse(
        path,
        decimal=decimal,
        header=None if header is False else 0,
        names=names if header is False else None,
        low_memory=False,  # or columns of mixed kinds are guessed in pieces
        keep_default_na=False,
        na_values=["", *na_values],
        dtype=dict.fromkeys(categories, "str"),
        **form,
    )
    if frame.empty:
        raise DataError(f"{path} has no rows below its header.")
    for name in frame.columns:
        if not is_numeric(frame[name]):  # pandas misses some beside long numbers
            missing = frame[name].isin(["", *map(str, na_values)])
            frame[name] = frame[name].mask(missing) if missing.any() else frame[name]
    table = Table(
        path,
        frame,
        decimal,
        header,
        frozenset(categories),
        repeated=frozenset(name for name, n in Counter(names).items() if n > 1),
    )
    if header is None:
        _check_header(path, frame, names, decimal)
    elif header is False:
        _check_no_header(table)
    named = [*drop, *dtype]
    table.check_columns(c for c in named if not lenient or c in frame.columns)
    frame = frame.drop(columns=[name for name in drop if name in frame.columns])
    if not len(frame.columns):
        raise DataError(f"{path}: drop leaves no column. Leave fewer out.")
    gaps = _Gaps(frame)
    if gaps.missing.any() and drop_missing:
        frame = _restored(table, frame[~gaps.missing].copy(), gaps.counts, form)
        if frame.empty:
            raise DataError(
                f"{path}: drop-missing leaves no row: each has a missing value. Leave "
                "columns out instead, with drop."
            )
        gaps = _Gaps(frame)
    return replace(
        table,
        frame=frame if gaps.missing.any() else _settled(table, frame, dtype),
        dropped=tuple(drop),
        dropped_rows=len(table) - len(frame),
        missing=gaps.counts,
        fault=_gap(table, frame, gaps, form) if gaps.counts else None,
    )


# ------------------------------------------------------------- what kind of file it is


def _check_form(sep: str, decimal: str, encoding: str) -> None:
    check_choice("decimal", decimal, (".", ","))
    if len(sep) != 1 or not sep.isascii() or sep.isalnum() or sep in "\"'.+-\r\n":
        raise ConfigurationError(
            "sep must be one character that stands between cells, such as ',', ';', "
            f"'|' or '\\t', got {shown(sep)}."
        )
    try:
        "".encode(encoding)
    except (LookupError, ValueError):
        raise ConfigurationError(
            "encoding must be one that Python knows, such as 'utf-8', 'cp1252', "
            f"'latin-1' or 'utf-16', got {shown(encoding)}."
        ) from None


def _check_beginning(path: Path, encoding: str) -> None:
    """Refuse a file that begins as no text in this encoding does."""
    if path.suffix.lower() in _PACKED:
        return  # pandas unpacks it.
    with path.open("rb") as file:
        start = file.read(4096)
    for beginning, kind in _BEGINNINGS.items():
        if start.lstrip().lower().startswith(beginning.lower()):
            raise DataError(f"{path} is no CSV file, but {kind}.")
    family = codecs.lookup(encoding).name.split("-")[:2]
    wide = family in (["utf", "16"], ["utf", "32"])
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and not wide:
        raise DataError(
            f"{path} begins with the byte order mark of UTF-16. Set encoding = "
            "'utf-16'."
        )
    if start.startswith(codecs.BOM_UTF8) and family != ["utf", "8"]:
        raise DataError(
            f"{path} begins with the byte order mark of UTF-8, but encoding is "
            f"'{encoding}'. Leave encoding out."
        )
    if b"\0" in start and not wide:
        raise DataError(
            f"{path} holds NUL bytes: it is no text, or UTF-16. For that, set encoding "
            "= 'utf-16-le'."
        )


def _names(
    path: Path, form: Mapping[str, Any], decimal: str, header: bool | None
) -> list[str]:
    """Return what stands in the first line, if that can be a header."""
    look: dict[str, Any] = {"header": None, "dtype": "str", "na_filter": False}
    first: list[str] = _parse(path, nrows=1, **look, **form).iloc[0].tolist()
    if len(first) == 1:
        counts = {s: first[0].count(s) for s in _SEPARATORS if s != form["sep"]}
        other = max(counts, key=lambda s: counts[s])
        if not counts[other] and first[0].strip().count(" "):
            other = " "
        if other == " " or counts[other]:
            raise DataError(
                f"{path} has one column only, {shown(first[0])}. Are its cells "
                f"separated by {other!r}? Then set sep = {_quoted(other)}."
            )
    number = _number(decimal)
    if header is None and any(number.fullmatch(name) for name in first):
        texts = [name.strip() for name in first]
        counting = [[str(k + start) for k in range(len(texts))] for start in (0, 1)]
        whole = all(text.isdigit() or not number.fullmatch(text) for text in texts)
        if not whole or (all(map(str.isdigit, texts)) and texts not in counting):
            raise DataError(_no_header(path, shown(", ".join(texts)), "are numbers"))
    _parse(path, nrows=20, **look, **form)  # Are the next lines as long?
    return [str(k) for k in range(len(first))] if header is False else first


def _check_header(
    path: Path, frame: pd.DataFrame, names: Sequence[str], decimal: str
) -> None:
    """Refuse a first line whose cells stand in the columns that they would name."""
    found = [
        (name, values)
        for name, (_, values) in zip(names, frame.items(), strict=True)
        if _names_itself(name, values)
    ]
    numbers = any(_number(decimal).fullmatch(name) for name in names)
    if len(found) > 1 or (found and numbers):
        name, values = found[0]
        reason = f"stands in its column, too, in {_cells(values, name)}"
        raise DataError(_no_header(path, shown(name), reason))


def _check_no_header(table: Table) -> None:
    """Refuse a first line of texts only, one of which stands above numbers only."""
    first = table.frame.iloc[0].tolist()
    number = _number(table.decimal)
    if any(not isinstance(text, str) or number.fullmatch(text) for text in first):
        return
    for name, text in zip(table.columns, first, strict=True):
        below = table.frame[name].iloc[1:].dropna().astype(str).unique()
        if name in table.categories or text in MARKS or not len(below):
            continue
        if all(number.fullmatch(other) for other in below):
            raise DataError(
                f"{table.path} begins with {shown(text)}, which stands above numbers "
                f"in column '{name}'. If that is a header, leave header out; if it is "
                f"a name like the numbers, set dtype = {{'{name}' = 'category'}}."
            )


def _names_itself(name: str, values: pd.Series[Any]) -> bool:
    if pd.api.types.is_bool_dtype(values):
        return name.lower() in ("true", "false")
    return not is_numeric(values) and bool((values.astype(str) == name).any())


def _no_header(path: Path, line: str, reason: str) -> str:
    return (
        f"{path} begins with {line}, which {reason}. Where it has no header, set "
        "header = false (columns are then called 0, 1, 2, ...); where these are names, "
        "header = true."
    )


def _parse(path: Path, **options: Any) -> pd.DataFrame:
    """Let pandas read a file; what it refuses is told in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pd.errors.ParserWarning)
            frame: pd.DataFrame = pd.read_csv(path, **options)
            return frame
    except UnicodeError:
        raise DataError(
            f"{path} is not written in {options['encoding']}. Set encoding: files of "
            "older programs and of Excel are often 'cp1252' or 'latin-1'."
        ) from None
    except (ValueError, OSError, OverflowError, MemoryError) as error:
        text = str(error)
        longer = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", text)
        if longer:
            expected, line, fields = longer.groups()
            text = (
                f"line {line} has {fields} cells where {expected} are named. A text "
                "that holds the separator stands in double quotes; with decimals after "
                "a comma set sep and decimal"
            )
        elif isinstance(error, pd.errors.EmptyDataError):
            text = "it is empty"
        elif "EOF inside string" in text:
            text = "a double quote is opened and not closed"
        text = " ".join((text or type(error).__name__).split()).rstrip(".")
        raise DataError(f"{path} cannot be read as CSV: {text}.") from None


def _number(decimal: str) -> re.Pattern[str]:
    return _POINT_NUMBER if decimal == "." else _COMMA_NUMBER


def _quoted(text: str) -> str:
    return f"'{text}'" if text.isprintable() else '"\\t"'


# --------------------------------------------------------------- cells without a value


class _Gaps:
    """Where a table has no finite value: missing cells, and infinite ones."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.missing = np.zeros(len(frame), bool)
        self.counts: dict[str, int] = {}
        places = []
        for number, name in enumerate(frame.columns):
            values = frame[name]
            bad = missing = values.isna().to_numpy()
            if pd.api.types.is_float_dtype(values):
                bad = ~np.isfinite(values.to_numpy())
            self.missing |= missing
            if bad.any():
                self.counts[name] = int(bad.sum())
                places.append((int(bad.argmax()), number))
        self.first = min(places, default=None)


def _restored(
    table: Table,
    frame: pd.DataFrame,
    missed: Iterable[str],
    form: Mapping[str, Any],
) -> pd.DataFrame:
    """Give columns that missing values have widened the type that they had before."""
    frame = frame.infer_objects()
    for name in missed:
        texts = values = frame[name]
        if pd.api.types.is_float_dtype(values):
            if (values != values.round()).any():
                continue
            if (values.abs() < 2**53).all():
                frame[name] = values.astype(np.int64)
                continue
            # A float does not hold so many digits; the file does.
            texts = _texts(table, name, form).loc[frame.index]
        elif is_numeric(values) or name in table.categories:
            continue
        texts = texts.astype(str).str.strip()
        if texts.str.fullmatch(r"[-+]?\d+").all():
            whole = pd.to_numeric(texts)
            frame[name] = whole if pd.api.types.is_integer_dtype(whole) else texts
    return frame


def _texts(table: Table, name: str, form: Mapping[str, Any]) -> pd.Series[Any]:
    """Return a column's cells as they stand in the file."""
    column: pd.Series[Any] = _parse(
        table.path,
        header=None if table.header is False else 0,
        usecols=[table.columns.index(name)],
        dtype="str",
        na_filter=False,
        **form,
    ).iloc[:, 0]
    return column


def _gap(
    table: Table,
    frame: pd.DataFrame,
    gaps: _Gaps,
    form: Mapping[str, Any],
) -> str:
    """Say where the first cell without a value is, and what to do."""
    assert gaps.first is not None
    row, column = gaps.first
    name, place = frame.columns[column], int(frame.index[row])
    if not pd.isna(frame[name].iloc[row]):
        cell, remedy = "an infinite number", "Give finite numbers."
    else:
        text = str(_texts(table, name, form).iloc[place])
        cell = shown(text) if text else "an empty cell"
        remedy = (
            "Fill in or drop them first, or leave such rows out with drop-missing = "
            "true, such columns with drop."
        )
        if text:
            remedy += " Where it is a value like others, set na-values = []."
    return (
        f"{table.path}: column '{name}' has no finite value in data row {place + 1}: "
        f"{cell} ({sum(gaps.counts.values())} such places in all). {remedy}"
    )


# ------------------------------------------------------------------ numbers and texts


def _settled(
    table: Table, frame: pd.DataFrame, dtype: Mapping[str, str]
) -> pd.DataFrame:
    """Make numbers of columns that hold nothing else, whatever pandas took them for."""
    frame = frame.copy(deep=False)
    for name in frame.columns:
        values = frame[name]
        if is_numeric(values):
            if dtype.get(name) == "number":
                frame[name] = values * 1  # no longer true and false
            continue
        if name in table.categories:
            continue
        texts = [str(text) for text in values.unique()]
        odd = [text for text in texts if not _number(table.decimal).fullmatch(text)]
        if odd and dtype.get(name) == "number":
            raise DataError(_odd_among_numbers(table, values, odd))
        # Numbers of so many digits are names.
        long = all(len(text.strip()) > 18 and text.strip().isdigit() for text in texts)
        if not odd and not (long and dtype.get(name) is None):
            numbers = values.astype(str).str.replace(table.decimal, ".", regex=False)
            frame[name] = numbers.astype(np.float64)
            infinite = values[~np.isfinite(frame[name])]
            if len(infinite):
                where = _cells(values, str(infinite.iloc[0]))
                raise DataError(
                    f"{table.path}: column '{name}' has no finite value in {where}: an "
                    "infinite number. Give finite numbers."
                )
    return frame


def is_numeric(values: pd.Series[Any]) -> bool:
    """Tell whether a column holds numbers, or true and false."""
    return pd.api.types.is_numeric_dtype(values)


def text_fault(table: Table, values: pd.Series[Any], *, feature: bool) -> str | None:
    """Return what is wrong with a column of texts, or ``None``.

    Parameters
    ----------
    table : Table
        What it is a column of.
    values : Series
        The column.
    feature : bool
        Whether it becomes columns of zeros and ones.
    """
    name, path = values.name, table.path
    texts = [str(text) for text in values.unique()]
    for text in texts:
        if "\0" in text:
            return f"{path}: column '{name}' holds NUL. Is it a text file?"
    seen: dict[str, str] = {}
    for text in texts:
        before = seen.setdefault(text.strip(), text)
        if before != text:
            return (
                f"{path}: column '{name}' holds {shown(before)} and {shown(text)}, "
                "which differ by spaces only. Write them alike."
            )
    if name in table.categories:
        return None
    number = _number(table.decimal)
    odd = [text for text in texts if not number.fullmatch(text)]
    numeric = int((~values.astype(str).isin(odd)).sum())
    different = len(texts) - len(odd)
    several = different > FEW_ROWS and 2 * different > numeric
    if odd and (different > FEW_NUMBERS or several) and 2 * numeric > len(values):
        return _odd_among_numbers(table, values, odd)
    remedy = _other_marks(table, name, texts)
    if remedy:
        return (
            f"{path}: column '{name}' holds numbers such as {shown(odd[0])}. {remedy}"
        )
    if not feature:
        return None
    rare = len(texts) > FEW_CATEGORIES and ROWS_PER_CATEGORY * len(texts) > len(values)
    rare = rare or len(texts) == len(values) > FEW_ROWS
    if rare or len(texts) > MOST_CATEGORIES:
        return (
            f"{path}: column '{name}' holds {len(texts):,} different texts in "
            f"{len(values):,} rows, such as {shown(texts[0])}, and each would be a "
            f"feature. Leave it out with drop = ['{name}'], or insist with dtype = "
            f"{{'{name}' = 'category'}}."
        )
    return None


def _cells(values: pd.Series[Any], text: str) -> str:
    """Say in which data rows of a column a text stands: the first, and how many."""
    texts = values.astype(str)
    if pd.api.types.is_bool_dtype(values):
        texts, text = texts.str.lower(), text.lower()
    places = (texts == text).to_numpy()
    first = int(values.index.to_numpy()[places.argmax()]) + 1
    return (
        f"data row {first} ({int(places.sum()):,} such cells in {len(values):,} rows)"
    )


def _odd_among_numbers(table: Table, values: pd.Series[Any], odd: list[str]) -> str:
    """Say which texts stand among a column's numbers, and what to do."""
    texts = values.astype(str)
    text = str(texts[texts.isin(odd)].iloc[0])
    remedy = _other_marks(table, values.name, [text]) or missing_or_name(
        values.name, text
    )
    if table.header is False and str(texts.iloc[0]) == text:
        remedy += " If the file has a header, leave header out."
    others = f" and {len(odd) - 1:,} other texts" if len(odd) > 1 else ""
    return (
        f"{table.path}: column '{values.name}' holds numbers, but {shown(text)} in "
        f"{_cells(values, text)}{others}. {remedy}"
    )


def _other_marks(table: Table, name: Any, texts: Sequence[str]) -> str | None:
    """Say what to do where texts are numbers with other marks than the table's.

    ``None`` where one of them is no number in any way.
    """
    mark = "," if table.decimal == "." else "."
    number, grouped = _number(table.decimal), _grouped(mark, table.decimal)
    odd = [text for text in texts if not number.fullmatch(text)]
    if not odd:
        return None
    thousands = all(grouped.fullmatch(text) for text in odd)
    if all(_number(mark).fullmatch(text) for text in texts):
        remedy = f"Where '{mark}' stands before decimals, set decimal = '{mark}'."
        if thousands:
            remedy += " Where it stands between thousands, remove it from the file."
        return remedy
    plain_signs = (text.strip().translate(_DASHES) for text in odd)
    if thousands:
        what = "Remove the marks between thousands from the file"
    elif all(number.fullmatch(text) for text in plain_signs):
        what = "Write its minus sign as '-' and no space of another kind beside it"
    else:
        return None
    return f"{what}; if it is a name, set dtype = {{'{name}' = 'category'}}."


def _grouped(mark: str, decimal: str) -> re.Pattern[str]:
    """Return the pattern of numbers with a mark or a space between thousands."""
    return re.compile(
        rf"\s*[-+]?\d{{1,3}}([{re.escape(mark)}\s'’]\d{{3}})+"
        rf"({re.escape(decimal)}\d*)?\s*"
    )


def missing_or_name(name: Any, text: str) -> str:
    """Return what to do about a text that may stand for a missing value."""
    return (
        f"If that stands for a missing value, set na-values = [{text!r}] and "
        f"drop-missing = true; if it is a name, dtype = {{'{name}' = 'category'}}."
    )
