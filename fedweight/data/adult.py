"""UCI Adult: predict an income from a census record, with sensitive attributes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from ..core.errors import DataError
from ..core.extras import Imported
from .examples import DataSet, Examples
from .fetch import find_folder

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = Imported("pandas", "studies", "data 'adult'")

COLUMNS = (
    "age",
    "workclass",
    "fnlwgt",
    "education",
    "education-num",
    "marital-status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "capital-gain",
    "capital-loss",
    "hours-per-week",
    "native-country",
    "income",
)
NUMERIC = (
    "age",
    "fnlwgt",
    "education-num",
    "capital-gain",
    "capital-loss",
    "hours-per-week",
)
Client = Literal[
    "",
    "workclass",
    "education",
    "marital-status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "native-country",
]
SENSITIVE = ("age", "race", "sex")
CLASS_NAMES = ("<=50K", ">50K")

# Upper bounds, exclusive, of the age groups but for the last.
AGE_BOUNDS = (25, 35, 45, 55, 65)
AGE_GROUPS = ("under 25", "25-34", "35-44", "45-54", "55-64", "65 and over")


def load(
    path: Path | None = None,
    *,
    sensitive_features: bool = True,
    client: Client = "",
) -> DataSet:
    """UCI Adult census income, 2 classes, 32,561 + 16,281; sensitive: sex, race, age.

    Numeric columns are standardised and categories one-hot encoded, both by what the
    training file holds; a missing entry (``?``) is a category of its own. Attributes
    beside the features are the codes ``sex``, ``race`` and ``age-group`` (named in
    ``attribute_names``) and ``age`` in years.

    Parameters
    ----------
    path : Path, optional
        A folder with ``adult.data`` and ``adult.test`` as UCI publishes them.
    sensitive_features : bool
        Whether age, race and sex are also features, as is usual. Without them, others
        such as ``relationship`` (husband, wife) still tell much of them.
    client : str
        The column of texts whose values are the clients of the partition ``natural``;
        by default there are none.

    References
    ----------
    B. Becker, R. Kohavi, "Adult", UCI Machine Learning Repository, 1996.
    """
    folder = find_folder("adult", path)
    train = _read(folder / "adult.data", first_row=0)
    test = _read(folder / "adult.test", first_row=1)
    attributes = ("race", "sex")
    names = {name: tuple(sorted(train[name].unique())) for name in attributes}
    left_out = () if sensitive_features else SENSITIVE
    sites = tuple(np.unique(train[client]).tolist()) if client else ()
    x_train, x_test = _encode(
        train.drop(columns=["income", *left_out]),
        test.drop(columns=["income", *left_out]),
    )
    return DataSet(
        name="adult",
        train=Examples(x_train, _labels(train), _attributes(train, names)),
        test=Examples(x_test, _labels(test), _attributes(test, names)),
        num_classes=2,
        class_names=CLASS_NAMES,
        attribute_names={**names, "age-group": AGE_GROUPS},
        natural_clients=_codes(train[client], sites) if client else None,
        natural_names=sites,
    )


def _read(path: Path, first_row: int) -> pd.DataFrame:
    if not path.is_file():
        raise DataError(
            f"{path} does not exist. 'fedweight data adult' fetches adult.data and "
            "adult.test."
        )
    try:
        with warnings.catch_warnings():
            # A first row of more columns would lose the last ones.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(
                path,
                names=list(COLUMNS),
                skiprows=first_row,
                skipinitialspace=True,
                na_filter=False,
                dtype=dict.fromkeys(NUMERIC, np.float64),
                index_col=False,
            )
        if not np.isfinite(table[list(NUMERIC)]).all(axis=None):
            raise ValueError("a number is infinite")
    except (ValueError, OSError, pd.errors.ParserWarning) as error:
        raise DataError(
            f"{path} is not a table of {len(COLUMNS)} columns as UCI publishes it: "
            f"{' '.join(str(error).split()).rstrip('.')}. 'fedweight data adult' "
            "fetches it again."
        ) from error
    table["income"] = table["income"].str.rstrip(".")
    unknown = set(table["income"]) - set(CLASS_NAMES)
    if unknown:
        raise DataError(
            f"{path}: the last column must be '<=50K' or '>50K', but there is "
            f"{sorted(unknown)[0]!r}. 'fedweight data adult' fetches it again."
        )
    return table


def _encode(
    train: pd.DataFrame, test: pd.DataFrame
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    parts = []
    for table in (train, test):
        columns = []
        for name in train.columns:
            values, seen = table[name].to_numpy(), train[name].to_numpy()
            if name in NUMERIC:
                spread = seen.std() or 1.0
                columns.append(((values - seen.mean()) / spread)[:, None])
            else:
                columns.append(values[:, None] == np.unique(seen)[None])
        parts.append(np.hstack(columns).astype(np.float32))
    return parts[0], parts[1]


def _labels(table: pd.DataFrame) -> npt.NDArray[np.int64]:
    return (table["income"] == CLASS_NAMES[1]).to_numpy().astype(np.int64)


def _codes(
    column: pd.Series[str], categories: tuple[str, ...]
) -> npt.NDArray[np.int64]:
    return pd.Index(list(categories)).get_indexer(pd.Index(column)).astype(np.int64)


def _attributes(
    table: pd.DataFrame, names: dict[str, tuple[str, ...]]
) -> dict[str, npt.NDArray[np.int64]]:
    attributes = {
        name: _codes(table[name], categories) for name, categories in names.items()
    }
    attributes["age"] = table["age"].to_numpy().astype(np.int64)
    attributes["age-group"] = np.digitize(attributes["age"], AGE_BOUNDS).astype(
        np.int64
    )
    return attributes
