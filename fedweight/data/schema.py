"""What a data file's columns are: told by a server, compared by every site.

Sites whose columns stand in another order, or are others, would otherwise train a
model of which each input means something else to everybody.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import DataError
from ..core.paths import clean_path, why_unreadable
from ..core.texts import listed, shown

NUMBER, TEXT = "number", "text"


@dataclass(frozen=True)
class Schema:
    """The columns of a file, in the order in which a model reads them.

    Attributes
    ----------
    source : str
        The file that it describes.
    label : str
        The column with the class; nothing where the file holds arrays.
    classes : tuple of str
        What each class is called, in the order of their numbers.
    columns : Mapping[str, str]
        The features by name, each ``"number"`` or ``"text"``; empty for arrays.
    shape : tuple of int
        The shape of one example.
    groups : Mapping[str, tuple of str]
        By sensitive column, what each group is called, in the order of their codes.

    Examples
    --------
    >>> schema = Schema("a.csv", "y", ("0", "1"), {"age": NUMBER, "dose": NUMBER}, (2,))
    >>> Schema.read(schema.write()) == schema
    True
    """

    source: str
    label: str
    classes: tuple[str, ...]
    columns: Mapping[str, str]
    shape: tuple[int, ...]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def write(self) -> str:
        """Return the schema as JSON."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def read(cls, text: str, where: str = "the schema") -> Schema:
        """Read what :meth:`write` returned.

        Raises
        ------
        DataError
            If it is something else.
        """
        try:
            given = json.loads(text)
            schema = cls(
                source=str(given["source"]),
                label=str(given["label"]),
                classes=tuple(map(str, _list(given["classes"]))),
                columns={str(k): str(v) for k, v in dict(given["columns"]).items()},
                shape=tuple(int(n) for n in _list(given["shape"])),
                groups={
                    str(k): tuple(map(str, _list(v)))
                    for k, v in dict(given.get("groups", {})).items()
                },
            )
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(
                f"{where} is none that 'fedweight check --write-schema' wrote: "
                f"{type(error).__name__}: {shown(str(error))[1:-1]}."
            ) from None
        return schema

    @classmethod
    def of_file(cls, path: str | Path) -> Schema:
        """Read a schema's file."""
        path = clean_path("the schema's file", path)
        reason = why_unreadable(path)
        if reason is not None:
            raise DataError(f"{path} cannot be read: {reason}.")
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeError) as error:
            raise DataError(f"{path} cannot be read: {error}.") from None
        return cls.read(text, str(path))

    def check_columns(self, path: Path, found: Mapping[str, str]) -> list[str]:
        """Return the features in this schema's order, or say how a file differs.

        Parameters
        ----------
        path : Path
            The file.
        found : Mapping[str, str]
            Its features and what they hold, in the file's order.

        Raises
        ------
        DataError
            If one is missing, there are others, or one holds something else.
        """
        if not self.columns:
            wide = len(found)
            if self.shape != (wide,):
                raise DataError(
                    f"{path} has {wide} feature columns, but an example of "
                    f"{self.source} has shape {list(self.shape)}. Every site's "
                    "examples have the same shape."
                )
            return list(found)
        missing = [name for name in self.columns if name not in found]
        others = [name for name in found if name not in self.columns]
        changed = [
            f"'{name}' holds a {kind} there and a {found[name]} here"
            for name, kind in self.columns.items()
            if found.get(name, kind) != kind
        ]
        differs = []
        if missing:
            differs.append(f"it lacks {_named(missing)}")
        if others:
            differs.append(f"it has {_named(others)} besides")
        if changed:
            differs.append(listed(changed, most=3))
        if differs:
            remedy = "Name and encode the columns as there"
            if others and not missing:
                remedy += ", or leave those besides out with drop"
            raise DataError(
                f"{path} has other columns than {self.source}: {'; '.join(differs)}. "
                f"{remedy}."
            )
        return list(self.columns)

    def check_shape(self, path: Path, shape: Sequence[int]) -> None:
        """Raise unless a file of arrays has examples of this schema's shape."""
        if tuple(shape) != self.shape:
            raise DataError(
                f"{path}: an example has shape {list(shape)}, one of {self.source} "
                f"{list(self.shape)}. Every site's examples have the same shape."
            )


def _named(names: Sequence[str]) -> str:
    return listed([f"'{name}'" for name in names], most=8)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"a list was expected, got {shown(value)}")
    return value
